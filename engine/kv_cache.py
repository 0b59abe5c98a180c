"""Keys and values of all slots and layers, in pages of two pools: one for full layers, one for sliding ones.

Full layers keep every position of a slot, sliding layers the last window - 1 and what a pass adds. The rows of a pass
write behind the committed positions: a commit's rows stay, a canvas's are overwritten by whatever comes next. What a
slot has committed stays in its pages when it leaves them, for as long as nobody needs their room, and other slots go on
from there. Knows shapes, positions and committed ids, nothing of layers' maths or requests.

Invariants: memory is allocated once, here; `length` changes only in `advance`, `resume` and `reset`, so a pass that
fails half-way leaves the committed prefix as it was; pages behind the whole ones that are committed are the slot's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.pages import PAGE, PagePool, SlotPages, pages_of_a_slot
from engine.prefix_cache import Found, Node, PrefixCache

CHUNK = 512  # positions of one slot that a pass commits at most; bounds the sliding pool and the attention scores
KINDS = ("sliding", "full")


class PageMemory(Protocol):
    """What a slot asks of the memory its pages lie in."""

    def copy_page(self, kind: str, source: int, target: int) -> None: ...

    def wipe_page(self, kind: str, page: int) -> None: ...


class KVCache:
    """One slot: which pages hold its positions, and how many of them are committed.

    Whoever tells what is committed (`record`) gets it back from any slot (`resume`).
    """

    def __init__(self, prefixes: PrefixCache, memory: PageMemory, capacity: int) -> None:
        self.capacity = capacity
        self.pages = {kind: SlotPages(pool) for kind, pool in prefixes.pools.items()}
        self.prefixes = prefixes
        self._memory = memory
        self._length = 0
        self._ids: list[int] = []  # the committed ones
        self._path: list[Node] = []  # their whole pages in the index
        self._points: set[int] = set()  # lengths at which others will go on

    @property
    def length(self) -> int:
        """Positions committed so far."""
        return self._length

    @property
    def ids(self) -> Sequence[int]:
        """The committed ids that were recorded."""
        return self._ids

    def missing(self, count: int) -> int:
        """Pages of the full layers that `reserve` would take."""
        return self.pages["full"].missing(self._length + count)

    def reserve(self, count: int) -> None:
        """Have pages for `count` positions behind the committed ones; drop those the window has left."""
        self._slide()
        for pages in self.pages.values():
            pages.reserve(self._length + count)

    def advance(self, count: int) -> None:
        """Count `count` positions, which every layer has written, as committed."""
        if self._length + count > self.capacity:
            raise ValueError(f"{self._length} + {count} positions exceed the capacity of {self.capacity}")
        self._length += count

    def record(self, ids: Sequence[int]) -> None:
        """Say which ids `advance` has just counted: from now on other slots can go on from them."""
        self._ids += ids
        assert len(self._ids) == self._length, "some committed ids were not recorded"
        while (len(self._path) + 1) * PAGE <= self._length:
            self._index_page()
        self._slide()

    def mark(self) -> None:
        """Others will go on from here: keep what that needs before other things."""
        self._points.add(self._length)
        self.prefixes.want(self._path, self._length)

    def resume(self, ids: Sequence[int]) -> int:
        """Go on from the longest prefix of `ids` that any slot has committed; returns the new `length`.

        What this slot has committed must be a prefix of `ids`. An empty slot can go on from any position (if that lies
        within a page and there is one of either kind to copy it to), one that has begun from whole pages only.
        """
        if self._length % PAGE:
            return self._length
        found = self.prefixes.find(ids, self._path, whole=self._length > 0)
        if found.tail is not None and not self._can_copy(found, found.tail):
            found = self.prefixes.find(ids, self._path, whole=True)
        if found.wished > max(found.length, self._length):
            self._points.add(found.wished)
        if found.length > self._length:
            self._take_over(found)
            self._ids = list(ids[: found.length])
        return self._length

    def reset(self) -> None:
        """Leave all pages; what was committed stays there for whoever comes, as long as it may."""
        if self._length and len(self._ids) == self._length:
            number = len(self._path)
            end = tuple(self._ids[number * PAGE :])
            if end:
                full, sliding = self.pages["full"].at(number), self.pages["sliding"].at(number)
                assert full is not None, "the last page is held"
                self.prefixes.insert_end(self._path[-1] if self._path else None, end, full, sliding)
            self.prefixes.want(self._path, self._length)
        self._clear()

    def forget(self) -> None:
        """Leave all pages, and let nobody go on from those that only this slot has: their contents are suspect."""
        suspect = {kind: list(pages.pages) for kind, pages in self.pages.items()}
        while self._path and self.pages["full"].pool.holders(self._path[-1].full) == 1:
            node = self._path.pop()
            sliding = node.sliding
            if not self.prefixes.forget(node):
                break
            suspect["sliding"] += [] if sliding is None else [sliding]
        for kind, pages in self.pages.items():
            shared = pages.pool.kept
            for page in {page for page in suspect[kind] if page not in shared and pages.pool.holders(page) <= 1}:
                self._memory.wipe_page(kind, page)
        self._clear()

    def _clear(self) -> None:
        for pages in self.pages.values():
            pages.clear()
        self._length = 0
        self._ids, self._path = [], []
        self._points.clear()

    def _slide(self) -> None:
        self.pages["sliding"].release_before(self.prefixes.window(self._length).start * PAGE)

    def _index_page(self) -> None:
        """The next whole page goes into the index; if it is there already, that one is used from now on."""
        number = len(self._path)
        full, sliding = self.pages["full"].at(number), self.pages["sliding"].at(number)
        assert full is not None, "a committed page is held"
        node = self.prefixes.insert(
            self._path[-1] if self._path else None,
            tuple(self._ids[number * PAGE : (number + 1) * PAGE]),
            full,
            sliding,
            wanted=any(number in self.prefixes.window(point) for point in self._points),
        )
        self._path.append(node)
        if node.full != full:
            self.pages["full"].replace(number, node.full)
        if sliding is not None and node.sliding is not None and node.sliding != sliding:
            self.pages["sliding"].replace(number, node.sliding)

    def _can_copy(self, found: Found, tail: Node) -> bool:
        """Whether a page of either kind is left once the slot holds what was found."""
        first = self.prefixes.window(found.length).start
        for kind, nodes in (("full", found.nodes), ("sliding", found.nodes[first:])):
            pool = self.pages[kind].pool
            idle = sum(not pool.holders(page) for node in (*nodes, tail) if (page := getattr(node, kind)) is not None)
            if pool.available <= idle:
                return False
        return True

    def _take_over(self, found: Found) -> None:
        """Hold the pages of what was found, and a copy of the one in which it ends."""
        whole, tail = len(found.nodes), found.tail
        first = self.prefixes.window(found.length).start
        sliding = [node.sliding for node in found.nodes[first:]]
        self.pages["full"].hold(0, [node.full for node in found.nodes])
        self.pages["sliding"].hold(first, [page for page in sliding if page is not None])
        assert self.pages["sliding"].end == whole, "the window is there"
        self._path, self._length = list(found.nodes), found.length
        if tail is None:
            return
        for kind, pages in self.pages.items():
            source = getattr(tail, kind)
            pages.pool.share(source)  # not to be given away for the copy
            pages.reserve(found.length)
            self._memory.copy_page(kind, source, pages.pages[-1])
            pages.pool.drop(source)


class KVPool:
    """The memory of all slots. `slots[i]` is slot i; `keys[l]`, `values[l]` [pages, PAGE, K, D] are layer l's."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        chunk: int = CHUNK,
        pages: Mapping[str, int] | None = None,
    ) -> None:
        """Allocate `pages` by kind; None = what `slots` of `capacity` positions can hold at a time. Raises ValueError
        for a capacity, chunk or slot count below 1."""
        if min(slots, capacity, chunk) < 1:
            raise ValueError(f"slots, capacity and chunk must be at least 1, not {slots}, {capacity} and {chunk}")
        self.chunk = chunk
        ahead = chunk + config.canvas_length  # what one pass may write behind the committed positions
        own = pages_of_a_slot(capacity=capacity, window=config.sliding_window, ahead=ahead)
        self.pools = {kind: PagePool(pages[kind] if pages else slots * own[kind]) for kind in KINDS}
        self.prefixes = PrefixCache(self.pools, config.sliding_window)
        self.slots = tuple(KVCache(self.prefixes, self, capacity) for _ in range(slots))
        self._kinds = [layer.kind for layer in config.layers]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in config.layers:
            shape = (self.pools[layer.kind].count, PAGE, layer.kv_heads, layer.head_dim)
            # zeros, not garbage: a masked position's value is multiplied by zero, which NaN would survive; written, so
            # that a CPU has given the memory before the first request
            self.keys.append(torch.empty(shape, device=device, dtype=dtype).zero_())
            self.values.append(torch.empty(shape, device=device, dtype=dtype).zero_())

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def copy_page(self, kind: str, source: int, target: int) -> None:
        """Copy what a page contains, in all layers of a kind."""
        for stored in self._of(kind):
            stored[target].copy_(stored[source])

    def wipe_page(self, kind: str, page: int) -> None:
        """Make a page zero, in all layers of a kind."""
        for stored in self._of(kind):
            stored[page].zero_()

    def _of(self, kind: str) -> list[Tensor]:
        pairs = zip(self._kinds, self.keys, self.values, strict=True)
        return [tensor for each, keys, values in pairs if each == kind for tensor in (keys, values)]
