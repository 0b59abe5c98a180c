"""Which request sits in which slot, on which pages: joins the scheduler, which knows no pages, to the slots' KV caches.

A request is seated when there is room for its prompt and a canvas. If replies then outgrow the memory, the request that
came last loses its slot and goes on later, where it was. Knows no model and no passes.

Invariant: before a pass, `make_room` has made sure that the pages it needs are there; the request that came first never
loses its slot, so there is always one that gets on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.canvas import Canvas
from engine.constrain import Guide
from engine.interface import EngineStats, PoolStats
from engine.kv_cache import KVCache
from engine.pages import PAGE
from engine.scheduler import CommitChunk, Reply, Scheduler, Slot


@dataclass
class Seat:
    """What one slot has on the device: its committed prefix and the canvas being denoised, if one is open."""

    cache: KVCache
    canvas: Canvas | None = None
    guide: Guide | None = None  # of a constrained reply, from its first canvas on


class Seating:
    """The seats of all slots; `seats[i]` is slot i's."""

    def __init__(
        self, scheduler: Scheduler, caches: Sequence[KVCache], *, commit_chunk: int, canvas_length: int
    ) -> None:
        self.seats = tuple(Seat(cache) for cache in caches)
        self._scheduler = scheduler
        self._commit_chunk = commit_chunk
        self._canvas_length = canvas_length
        self._prefixes = caches[0].prefixes
        self._pages = self._prefixes.pools["full"]

    def admit(self) -> None:
        """Seat those in line for whom there is room. They go on from what is committed of their prompts."""
        while (reply := self._scheduler.next_in_line()) is not None and self._fits(reply):
            self._give_up_rests_of(reply)
            slot = self._scheduler.seat()
            self.vacate(slot)
            self._resume(slot, reply)
        for slot in self._scheduler.running:  # what others have committed meanwhile
            if slot.reply is not None and slot.reply.pending and not slot.reply.between_canvases:
                self._resume(slot, slot.reply)

    def make_room(self) -> None:
        """Have pages for the next pass, whatever it commits: rests of replies go first, then the last to have come."""
        while self._needed() > self._pages.available:
            if not self._give_up_rest():
                assert len(self._scheduler.running) > 1, "a pool holds one context"
                self.vacate(self._scheduler.preempt())

    def committed(self, chunks: Sequence[CommitChunk]) -> None:
        """A pass has committed these chunks."""
        for chunk in chunks:
            slot, cache = self._scheduler.slots[chunk.slot], self.seats[chunk.slot].cache
            cache.record(chunk.token_ids)
            if slot.reply is None:
                if not slot.rest:
                    self.vacate(slot)
            elif cache.length == len(slot.reply.request.prompt_ids):
                cache.mark()

    def vacate(self, slot: Slot, *, suspect: bool = False) -> None:
        """Empty a slot's seat. Its pages stay of use to others, unless their contents are `suspect`."""
        seat = self.seats[slot.index]
        seat.canvas = None
        if seat.guide is not None:
            seat.guide.leave()
            seat.guide = None
        if suspect:
            seat.cache.forget()
        else:
            seat.cache.reset()

    def stats(self) -> EngineStats:
        """Who sits and who waits, and what the pages are used for."""
        scheduler, totals = self._scheduler, self._scheduler.totals
        return EngineStats(
            slots=len(self.seats),
            running=tuple(slot.reply.request.id for slot in scheduler.running if slot.reply is not None),
            waiting=scheduler.waiting,
            pools={
                kind: PoolStats(
                    pages=pool.count, held=pool.count - pool.available, kept=pool.idle, evictions=pool.evictions
                )
                for kind, pool in self._prefixes.pools.items()
            },
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens,
            committed_tokens=totals.committed_tokens,
            preemptions=totals.preemptions,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, index and slots agree."""
        self._prefixes.check_integrity([seat.cache.pages for seat in self.seats])
        for slot, seat in zip(self._scheduler.slots, self.seats, strict=True):
            assert slot.reply is not None or slot.rest or not seat.cache.length, "an empty slot holds pages"
            assert slot.reply is None or slot.reply.committed == seat.cache.length, "a slot lost count"
            assert slot.reply is None or list(seat.cache.ids) == slot.reply.ids[: seat.cache.length], "other ids"

    def _resume(self, slot: Slot, reply: Reply) -> None:
        cache = self.seats[slot.index].cache
        length = cache.resume(reply.ids)
        if length > reply.committed:
            self._scheduler.resumed(slot, length)
            if length == len(reply.request.prompt_ids):
                cache.mark()

    def _fits(self, reply: Reply) -> bool:
        """Whether there are pages for what is to be committed and a canvas, those others hold already not counted, and
        for the same of those who have a seat."""
        needed = -(-(len(reply.ids) + self._canvas_length) // PAGE)
        for slot in self._scheduler.running:
            assert slot.reply is not None, "it runs"
            needed += self.seats[slot.index].cache.missing(slot.reply.pending + self._canvas_length)
        while needed > self._pages.available:
            shared = self._prefixes.holders(self._prefixes.find(reply.ids))
            if needed - shared <= self._pages.available:
                return True
            if not self._give_up_rest():
                return False
        return True

    def _needed(self) -> int:
        """Pages that the next pass may take."""
        total = 0
        for slot in self._scheduler.running:
            assert slot.reply is not None, "it runs"
            coming = min(slot.reply.pending, self._commit_chunk)
            total += self.seats[slot.index].cache.missing(coming + self._canvas_length)
        for slot in self._scheduler.slots:
            total += self.seats[slot.index].cache.missing(len(slot.rest)) if slot.rest else 0
        return total

    def _give_up_rests_of(self, reply: Reply) -> None:
        """Leave rests of what `reply` goes on from: it commits them itself, and finds all that is there already."""
        for slot in self._scheduler.slots:
            ids = self.seats[slot.index].cache.ids
            if slot.rest and list(ids) == reply.ids[: len(ids)]:
                slot.rest = ()
                self.vacate(slot)

    def _give_up_rest(self) -> bool:
        """Leave one reply's rest uncommitted for good; False if there is none."""
        for slot in self._scheduler.slots:
            if slot.rest:
                slot.rest = ()
                self.vacate(slot)
                return True
        return False
