"""What the HTTP side needs of a wire format: one request that was read, and how to write its answer.

Invariant: `chunks` and `body` are two renderings of the same stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from server.exchange import ChatTask
from server.replies import Reply
from server.sse import Framing

Json = dict[str, Any]


class Asked(Protocol):
    """One checked request in its wire format."""

    @property
    def task(self) -> ChatTask:
        """What is asked for, free of the wire format."""

    @property
    def streamed(self) -> bool:
        """True when the client wants events."""

    @property
    def framing(self) -> Framing:
        """How its chunks become events."""

    async def body(self, reply: Reply) -> Json:
        """The answer as one document. Raises ApiError when the engine gives up."""

    def chunks(self, reply: Reply) -> AsyncGenerator[Json, None]:
        """The answer as it comes. Raises ApiError when the engine gives up."""
