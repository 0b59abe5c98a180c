"""A reply on its way, whoever makes it, and what its stream adds up to.

Knows the internal stream, no engine and no wire format. Invariant: the fold of a stream is the whole reply.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from server.exchange import ChoiceDone, ContentToken, Delta, Draft, FinishReason, ReplyDone, StreamItem, ToolCall


@dataclass(frozen=True)
class FoldedChoice:
    """One choice of a finished reply."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    stop_string: str | None = None
    logprobs: tuple[ContentToken, ...] = ()


@dataclass(frozen=True)
class Folded:
    """A finished reply: what its stream adds up to."""

    choices: tuple[FoldedChoice, ...]
    done: ReplyDone


class Reply(Protocol):
    """A reply on its way. Stream it or fold it, once; then close it."""

    @property
    def id(self) -> str:
        """The same on every chunk; a wire format puts its own word in front."""

    @property
    def created(self) -> int:
        """When it was begun, in seconds since 1970."""

    @property
    def model(self) -> str:
        """The model's name, as the client called it."""

    @property
    def choices(self) -> int:
        """How many choices the reply has."""

    @property
    def logprobs(self) -> int | None:
        """As in ChatTask."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""

    def stream(self) -> AsyncGenerator[StreamItem, None]:
        """The reply as it comes. Raises ApiError when the engine gives up."""

    def watched(self) -> AsyncGenerator[StreamItem | Draft, None]:
        """The stream, with the drafts between if the task asked for them."""

    async def fold(self) -> Folded:
        """The whole reply at once: the sum of its stream."""

    async def close(self) -> None:
        """Cancel whatever still runs. May be called at any time, also twice."""


async def without_drafts(items: AsyncGenerator[StreamItem | Draft, None]) -> AsyncGenerator[StreamItem, None]:
    """What of a watched stream belongs to the reply."""
    async with aclosing(items):
        async for item in items:
            if not isinstance(item, Draft):
                yield item


async def fold(items: AsyncIterator[StreamItem], choices: int) -> Folded:
    """Add a stream up to the reply it describes."""
    reasoning, content = [""] * choices, [""] * choices
    calls: list[tuple[ToolCall, ...]] = [()] * choices
    reasons: list[FinishReason] = ["stop"] * choices
    stops: list[str | None] = [None] * choices
    logprobs: list[tuple[ContentToken, ...]] = [()] * choices
    done: ReplyDone | None = None
    async for item in items:
        if isinstance(item, Delta):
            reasoning[item.choice] += item.reasoning
            content[item.choice] += item.content
            calls[item.choice] += item.tool_calls
            logprobs[item.choice] += item.logprobs
        elif isinstance(item, ChoiceDone):
            reasons[item.choice], stops[item.choice] = item.finish_reason, item.stop_string
        else:
            done = item
    assert done is not None, "a stream ends with ReplyDone"
    folded = zip(reasoning, content, calls, reasons, stops, logprobs, strict=True)
    return Folded(tuple(FoldedChoice(*parts) for parts in folded), done)
