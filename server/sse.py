"""A stream of JSON chunks as server-sent events, with heartbeats, an error event and, in most formats, `[DONE]`.

Knows event framing, not what the chunks mean. Framing and heartbeats are sse-starlette's. Invariant: every `data:`
line is one JSON object or `[DONE]`, which comes last and always, also after an error; there is never an event line
without data (it crashes official clients).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from server.errors import ApiError

logger = logging.getLogger(__name__)

_LINE_END = "\n"
# Line ends of Unicode that JSON leaves alone, but at which some clients split lines.
_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
DONE = "[DONE]"


def _unnamed(_: dict[str, Any]) -> str | None:
    return None


def typed(chunk: dict[str, Any]) -> str | None:
    """The chunk's "type" is its name."""
    return str(chunk["type"])


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How the chunks of one wire format become events."""

    name: Callable[[dict[str, Any]], str | None] = _unnamed  # of a chunk: what its `event:` line says, if it has one
    done: bool = True  # `[DONE]` at the end
    error: Callable[[ApiError], dict[str, Any]] = ApiError.body  # the chunk that tells of an error


class ChunkStream(EventSourceResponse):
    """The response. `close` runs when it ends, however it ends, even if it never began."""

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        *,
        framing: Framing,
        close: Callable[[], Awaitable[None]],
        heartbeat_seconds: float,
        drain_seconds: float,
        send_seconds: float,
    ) -> None:
        super().__init__(
            _events(chunks, framing),
            ping=heartbeat_seconds,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep=_LINE_END),
            sep=_LINE_END,
            send_timeout=send_seconds,  # or a client that stops reading would hold its reply's slot
            shutdown_grace_period=drain_seconds,  # 0, the default, would cut replies off at ctrl-C
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator: one that was never started runs no `finally`.
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def _events(
    chunks: AsyncGenerator[dict[str, Any], None], framing: Framing
) -> AsyncGenerator[ServerSentEvent, None]:
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk, framing)
    except ApiError as error:
        yield _event(framing.error(error), framing)
    except Exception:  # the status line is out: an error event is the only way left to tell
        logger.exception("a stream failed")
        yield _event(framing.error(ApiError(500, "Internal server error", code="internal_error")), framing)
    if framing.done:
        yield ServerSentEvent(DONE, sep=_LINE_END)


def ending(error: ApiError, framing: Framing) -> bytes:
    """What ends a stream, from outside, that cannot go on: the error and, where the format has it, `[DONE]`."""
    text = _event(framing.error(error), framing).encode()
    return text + ServerSentEvent(DONE, sep=_LINE_END).encode() if framing.done else text


def _event(payload: dict[str, Any], framing: Framing) -> ServerSentEvent:
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return ServerSentEvent(text.translate(_LINE_BREAKS), event=framing.name(payload), sep=_LINE_END)
