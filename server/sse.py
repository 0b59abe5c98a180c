"""A stream of JSON chunks as server-sent events, with heartbeats, an error event and `[DONE]`.

Knows event framing, not what the chunks mean. Framing and heartbeats are sse-starlette's. Invariant: every `data:`
line is one JSON object or `[DONE]`, which comes last and always, also after an error; there is never an event line
without data (it crashes official clients).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from server.errors import ApiError

logger = logging.getLogger(__name__)

_LINE_END = "\n"
# Line ends of Unicode that JSON leaves alone, but at which some clients split lines.
_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
DONE = "[DONE]"


class ChunkStream(EventSourceResponse):
    """The response. `close` runs when it ends, however it ends, even if it never began."""

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        *,
        close: Callable[[], Awaitable[None]],
        heartbeat_seconds: float,
        drain_seconds: float,
    ) -> None:
        super().__init__(
            _events(chunks),
            ping=heartbeat_seconds,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep=_LINE_END),
            sep=_LINE_END,
            shutdown_grace_period=drain_seconds,  # 0, the default, would cut replies off at ctrl-C
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator: one that was never started runs no `finally`.
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def _events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[ServerSentEvent, None]:
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk)
    except ApiError as error:
        yield _event(error.body())
    except Exception:  # the status line is out: an error event is the only way left to tell
        logger.exception("a stream failed")
        yield _event(ApiError(500, "Internal server error", code="internal_error").body())
    yield ServerSentEvent(DONE, sep=_LINE_END)


def _event(payload: dict[str, Any]) -> ServerSentEvent:
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return ServerSentEvent(text.translate(_LINE_BREAKS), sep=_LINE_END)
