"""Canvases with held positions, from the asyncio side: a few at a time, their errors as a client sees them.

Knows the bridge and requests for one canvas; no prompts, no wire format. Invariant: whoever stops waiting stops the
engine's work; results come in the order of the requests.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine import CanvasRead, CanvasRequest, Finished, QueueFull, RequestTooLong, Usage
from server import errors
from server.bridge import Bridge, EngineUnavailable

LONG_PROMPT = 256  # tokens: from here on the first canvas goes ahead, so that the others find its prompt committed
AT_ONCE = 8  # of one client's canvases in the engine: the others of its canvases wait here, not before other clients


@dataclass(frozen=True)
class CanvasResult:
    """One canvas; `read` is None where it never became certain."""

    read: CanvasRead | None
    usage: Usage


async def read_canvases(bridge: Bridge, requests: Sequence[CanvasRequest], *, param: str) -> list[CanvasResult]:
    """Ask for all of them. `param`: the field to name where a prompt is too long. Raises ApiError."""
    name, places = secrets.token_hex(12), asyncio.Semaphore(AT_ONCE)

    async def one(index: int, request: CanvasRequest) -> CanvasResult:
        async with places:
            return await _read(bridge, replace(request, id=f"{name}/{index}"), param)

    first: list[CanvasResult] = []
    if len(requests) > 1 and len(requests[0].prompt_ids) >= LONG_PROMPT:
        first.append(await one(0, requests[0]))
    tasks = [
        asyncio.ensure_future(one(index, request)) for index, request in enumerate(requests) if index >= len(first)
    ]
    try:
        return [*first, *await asyncio.gather(*tasks)]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(bridge: Bridge, request: CanvasRequest, param: str) -> CanvasResult:
    read: CanvasRead | None = None
    finished: Finished | None = None
    try:
        async with bridge.generate(request) as events:
            async for event in events:
                if isinstance(event, CanvasRead):
                    read = event
                elif isinstance(event, Finished):
                    finished = event
    except RequestTooLong as error:
        raise errors.context_length_exceeded(
            prompt_tokens=error.prompt_tokens, completion_tokens=1, context_length=error.context_length, param=param
        ) from error
    except QueueFull as error:
        raise errors.queue_full() from error
    except EngineUnavailable as error:
        raise errors.unavailable(str(error).capitalize()) from error
    assert finished is not None, "events end with Finished"
    if finished.reason == "error":
        raise errors.generation_failed(f"Generation failed: {finished.error or 'unknown cause'}")
    if finished.reason == "cancelled":
        raise errors.unavailable("The server is shutting down")
    return CanvasResult(read, finished.usage)
