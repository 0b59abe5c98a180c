"""Which pages of a pool hold which positions of a slot: pure bookkeeping, no tensors.

A page holds PAGE consecutive positions of one slot. Page p of a slot is the one for positions p * PAGE and on.

Invariant: every page is either free or held by exactly one slot; a slot's pages cover all positions from the first
one kept up to the last one reserved.
"""

from __future__ import annotations

PAGE = 64  # positions; small enough that half-filled last pages waste little, large enough for one tile of a kernel


class PagePool:
    """`count` pages, numbered from 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free page. Raises RuntimeError if there is none: whoever sizes the pool must prevent that."""
        if not self._free:
            raise RuntimeError(f"all {self.count} pages are taken")
        return self._free.pop()

    def give_back(self, page: int) -> None:
        """Free a page that was taken."""
        self._free.append(page)


class SlotPages:
    """The pages of one slot in one pool."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: list[int] = []  # from page number `_first` of the slot on
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
    def pages(self) -> tuple[int, ...]:
        """The pool's numbers of the pages from `first` to `end`."""
        return tuple(self._pages)

    def reserve(self, end: int) -> bool:
        """Hold pages for all positions below `end`. True if that took any."""
        before = len(self._pages)
        while self.end * PAGE < end:
            self._pages.append(self._pool.take())
        return len(self._pages) > before

    def release_before(self, position: int) -> bool:
        """Free the pages whose positions are all below `position`. True if there were any."""
        count = min(position // PAGE - self._first, len(self._pages))
        if count <= 0:
            return False
        for page in self._pages[:count]:
            self._pool.give_back(page)
        del self._pages[:count]
        self._first += count
        return True

    def clear(self) -> None:
        """Free every page and start again at position 0."""
        for page in self._pages:
            self._pool.give_back(page)
        self._pages.clear()
        self._first = 0
