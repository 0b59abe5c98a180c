"""Who is served, what is committed next, and what has been delivered: bookkeeping in plain Python.

Knows requests, slots and token counts; nothing of tensors, so it is tested in milliseconds. The engine asks it for
work (`admit`, `next_commit`, `ready`), reports results (`passed`, `deliver`, `fail`) and hands on its events.

Invariants: every accepted request gets exactly one `Finished`, and no event after it; a slot denoises only when
all ids before its canvas are committed; reply tokens never exceed max_tokens or the context.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.interface import (
    CanvasDone,
    CanvasRead,
    EngineError,
    Event,
    Finished,
    FinishReason,
    QueueFull,
    Request,
    RequestTooLong,
    TokenLogprobs,
    Usage,
)


@dataclass
class Reply:
    """The progress of one request that has a slot."""

    request: Request
    room: int  # reply tokens that may still be delivered, the eos token included
    pending: deque[int] = field(default_factory=deque)  # ids to commit before the next pass
    completion_tokens: int = 0
    canvases: int = 0
    denoise_steps: int = 0
    redrawn_canvases: int = 0

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=self.completion_tokens,
            canvases=self.canvases,
            denoise_steps=self.denoise_steps,
            redrawn_canvases=self.redrawn_canvases,
        )


@dataclass
class Slot:
    """A seat on the device: the request in it, if any."""

    index: int
    reply: Reply | None = None


@dataclass(frozen=True)
class CommitChunk:
    """Ids to append to one slot's committed prefix now."""

    slot: int
    token_ids: tuple[int, ...]


def cut(token_ids: tuple[int, ...], eos_ids: frozenset[int], room: int) -> tuple[tuple[int, ...], int | None]:
    """What of a finished canvas belongs to the reply, and the eos id that ended it if one did.

    Only the first `room` ids count, an eos id among them included, so an eos id right behind them ends nothing.
    """
    for position, token_id in enumerate(token_ids[:room]):
        if token_id in eos_ids:
            return token_ids[:position], token_id
    return token_ids[:room], None


class Scheduler:
    """First come, first served: `slots` requests at a time, at most `max_waiting` behind them."""

    def __init__(
        self, *, slots: int, max_waiting: int, commit_chunk: int, context_length: int, eos_ids: frozenset[int]
    ) -> None:
        self.slots = tuple(Slot(index) for index in range(slots))
        self._waiting: deque[Request] = deque()
        self._events: list[Event] = []
        self._active: set[str] = set()  # ids whose Finished has not been collected yet
        self._last_commit = slots - 1  # the slot that committed last
        self._max_waiting = max_waiting
        self._commit_chunk = commit_chunk
        self._context_length = context_length
        self._eos_ids = eos_ids

    # What the caller asks for

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestTooLong, QueueFull, or EngineError for an id that is still running."""
        if len(request.prompt_ids) + 1 > self._context_length:
            raise RequestTooLong(len(request.prompt_ids), self._context_length)
        if request.id in self._active:
            raise EngineError(f"a request with id {request.id!r} is already running")
        free = sum(slot.reply is None for slot in self.slots)
        if len(self._waiting) >= self._max_waiting + free:
            raise QueueFull(f"{len(self._waiting)} requests are waiting already; try again later")
        self._waiting.append(request)
        self._active.add(request.id)

    def cancel(self, request_id: str) -> int | None:
        """End a request now; its Finished comes with the next `collect`. Returns the slot it leaves, if it had one."""
        for request in self._waiting:
            if request.id == request_id:
                self._waiting.remove(request)
                usage = Usage(prompt_tokens=len(request.prompt_ids))
                self._events.append(Finished(request_id=request_id, reason="cancelled", usage=usage))
                return None
        for slot in self.slots:
            if slot.reply is not None and slot.reply.request.id == request_id:
                self._finish(slot, "cancelled")
                return slot.index
        return None

    @property
    def has_work(self) -> bool:
        """True while a submitted request's Finished has not been collected."""
        return bool(self._active)

    # What the engine does next

    def admit(self) -> list[Slot]:
        """Give free slots to waiting requests, oldest first; returns the slots just filled."""
        filled = []
        for slot in self.slots:
            if slot.reply is None and self._waiting:
                request = self._waiting.popleft()
                room = min(request.max_tokens, self._context_length - len(request.prompt_ids))
                slot.reply = Reply(request=request, room=room, pending=deque(request.prompt_ids))
                filled.append(slot)
        return filled

    def next_commit(self) -> CommitChunk | None:
        """The next ids to commit, at most one chunk; slots take turns. They count as committed from here on."""
        for offset in range(1, len(self.slots) + 1):
            slot = self.slots[(self._last_commit + offset) % len(self.slots)]
            if slot.reply is not None and slot.reply.pending:
                self._last_commit = slot.index
                pending = slot.reply.pending
                size = min(self._commit_chunk, len(pending))
                return CommitChunk(slot.index, tuple(pending.popleft() for _ in range(size)))
        return None

    def ready(self) -> list[Slot]:
        """Slots whose prefix is fully committed: each has, or may open, a canvas."""
        return [slot for slot in self.slots if slot.reply is not None and not slot.reply.pending]

    # What the engine reports

    def passed(self, slot: Slot, *, redrawn: bool) -> None:
        """One denoise pass ran for `slot`; `redrawn` says that it ended in a re-draw."""
        reply = self._reply(slot)
        reply.denoise_steps += 1
        reply.redrawn_canvases += redrawn

    def deliver(
        self, slot: Slot, token_ids: tuple[int, ...], steps: int, logprobs: tuple[TokenLogprobs, ...] = ()
    ) -> None:
        """A canvas converged: deliver what belongs to the reply, then end it or queue the canvas for commit."""
        reply = self._reply(slot)
        delivered, stop_id = cut(token_ids, self._eos_ids, reply.room)
        self._events.append(
            CanvasDone(
                request_id=reply.request.id,
                index=reply.canvases,
                token_ids=delivered,
                steps=steps,
                logprobs=logprobs[: len(delivered)],
            )
        )
        used = len(delivered) + (stop_id is not None)
        reply.canvases += 1
        reply.completion_tokens += used
        reply.room -= used
        if stop_id is not None:
            self._finish(slot, "stop", stop_id=stop_id)
        elif reply.room == 0:
            self._finish(slot, "length")
        else:
            reply.pending.extend(token_ids)

    def conclude(self, slot: Slot, read: CanvasRead) -> None:
        """The slot's request wanted one canvas read, and here it is."""
        reply = self._reply(slot)
        reply.canvases += 1
        reply.completion_tokens += reply.request.max_tokens
        self._events.append(read)
        self._finish(slot, "stop")

    def fail(self, slot: Slot, reason: FinishReason, error: str) -> None:
        """End the slot's request without another canvas, and say why."""
        self._finish(slot, reason, error=error)

    def collect(self) -> list[Event]:
        """Everything that happened since the last call, in order."""
        events, self._events = self._events, []
        self._active.difference_update(event.request_id for event in events if isinstance(event, Finished))
        return events

    def _finish(self, slot: Slot, reason: FinishReason, stop_id: int | None = None, error: str | None = None) -> None:
        reply = self._reply(slot)
        slot.reply = None
        self._events.append(
            Finished(request_id=reply.request.id, reason=reason, usage=reply.usage(), stop_id=stop_id, error=error)
        )

    @staticmethod
    def _reply(slot: Slot) -> Reply:
        assert slot.reply is not None, f"slot {slot.index} is empty"
        return slot.reply
