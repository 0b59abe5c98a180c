"""Which pages of a pool hold which positions of a slot: pure bookkeeping, no tensors.

A page holds PAGE consecutive positions of one slot. Page p of a slot is the one for positions p * PAGE and on. Slots
may hold the same page, as long as none of them writes into it. Knows nothing of ids: what a page contains, and that it
is worth keeping, is known to whoever calls `keep`.

Invariant: every page is free, held by at least one slot, or idle (held by none and kept for what it contains); a
slot's pages cover all positions from the first one kept up to the last one reserved.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

PAGE = 64  # positions; small enough that half-filled last pages waste little, large enough for one tile of a kernel


def pages_of_a_slot(*, capacity: int, window: int, ahead: int) -> dict[str, int]:
    """Pages that one slot can hold at a time, by kind of layer: `capacity` positions committed, those of the last
    `window` - 1 in sliding layers, and what one pass writes `ahead` of them."""
    return {"full": -(-(capacity + ahead) // PAGE), "sliding": -(-(window - 1 + ahead) // PAGE) + 1}


class PagePool:
    """`count` pages, numbered from 0. Idle ones are given away when no page is free: spare ones before precious ones,
    and among them the one idle for longest first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.evictions = 0
        self.on_evict: Callable[[int], None] = lambda page: None  # told about every page that stops being kept so
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._kept: dict[int, bool] = {}  # pages with contents worth keeping, and whether those are precious
        self._idle: dict[bool, OrderedDict[int, None]] = {False: OrderedDict(), True: OrderedDict()}

    @property
    def free(self) -> int:
        """Pages that contain nothing of use."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Pages that are only kept for what they contain."""
        return sum(map(len, self._idle.values()))

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return self.free + self.idle

    @property
    def kept(self) -> set[int]:
        """Pages that contain something worth keeping, held ones included."""
        return set(self._kept)

    def holders(self, page: int) -> int:
        """How many slots hold a page."""
        return self._holders[page]

    def take(self) -> int:
        """A page for one slot to write. Raises RuntimeError if all are held: whoever sizes the pool must prevent it."""
        if not self._free:
            self._evict()
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more slot holds a page that is held or kept."""
        if not self._holders[page]:
            del self._idle[self._kept[page]][page]
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """One slot less holds a page."""
        self._holders[page] -= 1
        if not self._holders[page]:
            if page in self._kept:
                self._idle[self._kept[page]][page] = None
            else:
                self._free.append(page)

    def keep(self, page: int, *, precious: bool = False) -> None:
        """What a page contains is worth keeping. Saying so again may only raise its worth."""
        before = self._kept.get(page)
        self._kept[page] = precious or bool(before)
        if not self._holders[page] and before is not None and before != self._kept[page]:
            del self._idle[before][page]
            self._idle[True][page] = None

    def discard(self, page: int) -> None:
        """What a page contains is of no use any more."""
        precious = self._kept.pop(page)
        if not self._holders[page]:
            del self._idle[precious][page]
            self._free.append(page)

    def check_integrity(self, held: Sequence[int]) -> None:
        """Raise AssertionError unless the books agree with `held`: the pages of all slots, one entry for each."""
        for page in range(self.count):
            assert self._holders[page] == held.count(page), f"page {page} has lost or won a holder"
        idle = [*self._idle[False], *self._idle[True]]
        assert sorted(set(held) | set(self._free) | set(idle)) == list(range(self.count)), "a page is lost"
        assert len(set(held)) + len(self._free) + len(idle) == self.count, "a page is in two places"
        assert set(idle) == {page for page in self._kept if not self._holders[page]}, "an idle page nobody keeps"

    def _evict(self) -> None:
        for idle in self._idle.values():
            if idle:
                page = next(iter(idle))
                self.evictions += 1
                self.on_evict(page)
                self.discard(page)
                return
        raise RuntimeError(f"all {self.count} pages are taken")


class SlotPages:
    """The pages of one slot in one pool."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._pages = array("i")  # from page number `_first` of the slot on
        self._first = 0

    @property
    def first(self) -> int:
        """The slot's first page number that is still held."""
        return self._first

    @property
    def end(self) -> int:
        """One behind the slot's last page number that is held."""
        return self._first + len(self._pages)

    @property
    def pages(self) -> Sequence[int]:
        """The pool's numbers of the pages from `first` to `end`, in a form that numpy need not convert."""
        return self._pages[:]

    def at(self, number: int) -> int | None:
        """The pool's number of the slot's page `number`; None if it is not held."""
        return self._pages[number - self._first] if self._first <= number < self.end else None

    def missing(self, end: int) -> int:
        """Pages that `reserve` would take."""
        return max(0, -(-end // PAGE) - self.end)

    def reserve(self, end: int) -> bool:
        """Hold pages for all positions below `end`. True if that took any."""
        missing = self.missing(end)
        for _ in range(missing):
            self._pages.append(self.pool.take())
        return missing > 0

    def hold(self, first: int, pages: Sequence[int]) -> None:
        """Share `pages`, the slot's from number `first` on, and drop all that were held."""
        for page in pages:
            self.pool.share(page)
        self.clear()
        self._pages, self._first = array("i", pages), first

    def replace(self, number: int, page: int) -> None:
        """Share `page` instead of the one held as number `number`."""
        self.pool.share(page)
        self.pool.drop(self._pages[number - self._first])
        self._pages[number - self._first] = page

    def release_before(self, position: int) -> bool:
        """Drop the pages whose positions are all below `position`. True if there were any."""
        count = min(position // PAGE - self._first, len(self._pages))
        if count <= 0:
            return False
        for page in self._pages[:count]:
            self.pool.drop(page)
        del self._pages[:count]
        self._first += count
        return True

    def clear(self) -> None:
        """Drop every page and start again at position 0. The last one first: it will be the first to be given away."""
        for page in reversed(self._pages):
            self.pool.drop(page)
        del self._pages[:]
        self._first = 0
