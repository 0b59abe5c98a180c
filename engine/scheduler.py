"""Who is served, what is committed next, and what has been delivered: bookkeeping in plain Python.

Knows requests, slots and token counts; nothing of tensors or pages, so it is tested in milliseconds. The engine asks it
for work (`next_in_line`, `next_commits`, `ready`), reports results (`passed`, `deliver`, `fail`) and hands on its
events. First come, first served: nobody overtakes a request that waits, and slots take turns at committing prompts.

Invariants: every accepted request gets exactly one `Finished`, and no event after it; a slot denoises only when
all ids before its canvas are committed; reply tokens never exceed max_tokens or the context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.images import begin_of_image, book_ids, end_of_image
from engine.interface import (
    CanvasDone,
    CanvasDraft,
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
from engine.pages import PAGE


@dataclass(eq=False)
class Reply:
    """The progress of one request."""

    request: Request
    number: int  # in the order of arrival
    room: int  # reply tokens that may still be delivered, the eos token included
    ids: list[int] = field(default_factory=list)  # to be committed: `book_ids`, then all canvases but the last
    committed: int = 0  # of `ids`
    cached_tokens: int = 0
    completion_tokens: int = 0
    canvases: int = 0
    denoise_steps: int = 0
    redrawn_canvases: int = 0
    preempted: bool = False  # lost its slot once
    between_canvases: bool = False  # all that is left to commit is the last canvas

    @property
    def pending(self) -> int:
        """Ids to commit before the next denoise pass."""
        return len(self.ids) - self.committed

    @property
    def said(self) -> Sequence[int]:
        """Ids of the canvases so far."""
        return self.ids[len(self.request.prompt_ids) :]

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            canvases=self.canvases,
            denoise_steps=self.denoise_steps,
            redrawn_canvases=self.redrawn_canvases,
        )


@dataclass
class Slot:
    """A seat on the device: the request in it, if any, or the end of the last one's reply, to be committed when there
    is nothing else to do."""

    index: int
    reply: Reply | None = None
    rest: tuple[int, ...] = ()


@dataclass(frozen=True)
class CommitChunk:
    """Ids of the books to append to one slot's committed prefix now."""

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


@dataclass(kw_only=True)
class Totals:
    """Counts since the start."""

    prompt_tokens: int = 0  # of requests that got a slot
    cached_tokens: int = 0  # prompt tokens whose KV was reused
    committed_tokens: int = 0
    preemptions: int = 0


def _size(reply: Reply, budget: int, *, alone: bool) -> int:
    """How much of a prompt to commit: all, or up to the end of a page, or if no page ends within `budget` that much
    where no other prompt is committed. An image is committed whole, beyond `budget` if it stands first and alone: its
    tokens see each other."""
    if reply.pending <= budget:
        return reply.pending
    whole = (reply.committed + budget) // PAGE * PAGE - reply.committed
    size = whole if whole > 0 else budget * alone
    if not size:
        return 0
    end = begin_of_image(reply.ids, reply.committed + size)
    if end <= reply.committed < reply.committed + size:
        end = end_of_image(reply.ids, reply.committed + size) if alone else reply.committed
    return end - reply.committed


class Scheduler:
    """First come, first served: `slots` requests at a time, at most `max_waiting` behind them.

    A pass commits at most `commit_chunk` ids of prompts, and `chunk_beside` where other slots denoise in it.
    """

    def __init__(
        self,
        *,
        slots: int,
        max_waiting: int,
        commit_chunk: int,
        chunk_beside: int | None = None,
        context_length: int,
        eos_ids: frozenset[int],
    ) -> None:
        """`chunk_beside`: None = commit_chunk."""
        self.slots = tuple(Slot(index) for index in range(slots))
        self.totals = Totals()
        self._waiting: deque[Reply] = deque()
        self._events: list[Event] = []
        self._active: set[str] = set()  # ids whose Finished has not been collected yet
        self._arrived = 0
        self._last_commit = slots - 1  # the slot that committed part of a prompt last
        self._waits_for_leaver = False  # somebody lost his slot; nobody gets one before another has left his
        self._max_waiting = max_waiting
        self._commit_chunk = commit_chunk
        self._chunk_beside = min(chunk_beside or commit_chunk, commit_chunk)
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
        self._waiting.append(
            Reply(
                request=request,
                number=self._arrived,
                room=min(request.max_tokens, self._context_length - len(request.prompt_ids)),
                ids=book_ids(request),
            )
        )
        self._arrived += 1
        self._active.add(request.id)

    def cancel(self, request_id: str) -> int | None:
        """End a request now; its Finished comes with the next `collect`. Returns the slot it leaves, if it had one."""
        for reply in self._waiting:
            if reply.request.id == request_id:
                self._waiting.remove(reply)
                self._events.append(Finished(request_id=request_id, reason="cancelled", usage=reply.usage()))
                return None
        for slot in self.slots:
            if slot.reply is not None and slot.reply.request.id == request_id:
                self._finish(slot, "cancelled")
                return slot.index
        return None

    @property
    def has_work(self) -> bool:
        """True while a submitted request's Finished has not been collected, or the end of a reply is not committed."""
        return bool(self._active) or any(slot.rest for slot in self.slots)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Ids of the requests that have no slot, first in line first."""
        return tuple(reply.request.id for reply in self._waiting)

    @property
    def running(self) -> tuple[Slot, ...]:
        """Slots with a request."""
        return tuple(slot for slot in self.slots if slot.reply is not None)

    # What the engine does next

    def next_in_line(self) -> Reply | None:
        """The request that would get a slot now."""
        if not self._waiting or self._waits_for_leaver or len(self.running) == len(self.slots):
            return None
        return self._waiting[0]

    def seat(self) -> Slot:
        """Give the next in line a slot; one with a rest, which is then lost, only if there is no other."""
        slot = min((slot for slot in self.slots if slot.reply is None), key=lambda slot: bool(slot.rest))
        slot.reply, slot.rest = self._waiting.popleft(), ()
        if not slot.reply.preempted:
            self.totals.prompt_tokens += len(slot.reply.request.prompt_ids)
        return slot

    def resumed(self, slot: Slot, length: int) -> None:
        """The slot's first `length` ids need not be committed: their keys and values were there."""
        reply = self._reply(slot)
        gained = min(length, len(reply.request.prompt_ids)) - reply.committed
        if gained > 0 and not reply.preempted:
            reply.cached_tokens += gained
            self.totals.cached_tokens += gained
        reply.committed = length

    def preempt(self) -> Slot:
        """Send the request that came last back to the head of the line; it will go on where it was."""
        slot = max(self.running, key=lambda slot: self._reply(slot).number)
        reply = self._reply(slot)
        slot.reply = None
        reply.committed, reply.preempted, reply.between_canvases = 0, True, False
        self._waiting.appendleft(reply)
        self._waits_for_leaver = True
        self.totals.preemptions += 1
        return slot

    def next_commits(self) -> list[CommitChunk]:
        """What the next pass commits, at most one chunk a slot; these ids count as committed from here on.

        Finished canvases first: they are short, and somebody is reading. Then prompts, in turns; then, if there is no
        request left, the rest of a reply that has ended.
        """
        if not any(slot.reply and slot.reply.pending for slot in self.slots):  # so it is before most passes
            return self._next_rest()
        chunks = []
        for slot in self.running:
            reply = self._reply(slot)
            if reply.between_canvases and reply.pending:
                chunks.append(self._chunk(slot, reply, min(self._commit_chunk, reply.pending)))
        budget = self._chunk_beside if chunks or self.ready() else self._commit_chunk
        prompts: list[CommitChunk] = []
        for slot in self._in_turns():
            size = _size(self._reply(slot), budget, alone=not prompts)
            if not size:
                break
            budget -= size
            self._last_commit = slot.index
            prompts.append(self._chunk(slot, self._reply(slot), size))
        chunks += prompts
        return chunks or self._next_rest()

    def ready(self) -> list[Slot]:
        """Slots whose prefix is fully committed: each has, or may open, a canvas."""
        return [slot for slot in self.running if not self._reply(slot).pending]

    def _in_turns(self) -> list[Slot]:
        """Slots with part of a prompt to commit, the one behind the last that did first."""
        count = len(self.slots)
        order = (self.slots[(self._last_commit + offset) % count] for offset in range(1, count + 1))
        return [slot for slot in order if (reply := slot.reply) and reply.pending and not reply.between_canvases]

    def _chunk(self, slot: Slot, reply: Reply, size: int) -> CommitChunk:
        begin = reply.committed
        reply.committed += size
        self.totals.committed_tokens += size
        return CommitChunk(slot.index, tuple(reply.ids[begin : begin + size]))

    def _next_rest(self) -> list[CommitChunk]:
        if self._waiting or self.running:
            return []
        for slot in self.slots:
            if slot.rest:
                ids, slot.rest = slot.rest[: self._commit_chunk], slot.rest[self._commit_chunk :]
                self.totals.committed_tokens += len(ids)
                return [CommitChunk(slot.index, ids)]
        return []

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
            slot.rest = (*delivered, stop_id)
        elif reply.room == 0:
            self._finish(slot, "length")
            slot.rest = delivered
        else:
            reply.ids.extend(token_ids)
            reply.between_canvases = True

    def sketch(self, draft: CanvasDraft) -> None:
        """How far a canvas is, for a request that asked."""
        self._events.append(draft)

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
        self._waits_for_leaver = False
        self._events.append(
            Finished(request_id=reply.request.id, reason=reason, usage=reply.usage(), stop_id=stop_id, error=error)
        )

    @staticmethod
    def _reply(slot: Slot) -> Reply:
        assert slot.reply is not None, f"slot {slot.index} is empty"
        return slot.reply
