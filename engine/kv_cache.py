"""Keys and values of all slots and layers, in pages of two pools: one for full layers, one for sliding ones.

Full layers keep every position of a slot, sliding layers the last window - 1 and what a pass adds. The rows of a pass
write behind the committed positions: a commit's rows stay, a canvas's are overwritten by whatever comes next. Knows
shapes and positions only, nothing of ids or layers' maths.

Invariant: memory is allocated once, here; `length` changes only in `advance` and `reset`, so a pass that fails
half-way leaves the committed prefix as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.pages import PAGE, PagePool, SlotPages, pages_of_a_slot

CHUNK = 512  # positions one pass commits at most; bounds the sliding pool and the attention scores
KINDS = ("sliding", "full")


class KVCache:
    """One slot: which pages hold its positions, and how many of them are committed."""

    def __init__(self, pools: dict[str, PagePool], capacity: int, kept: int) -> None:
        self.capacity = capacity
        self.pages = {kind: SlotPages(pool) for kind, pool in pools.items()}
        self._kept = kept  # positions that a sliding layer can still need
        self._length = 0

    @property
    def length(self) -> int:
        """Positions committed so far."""
        return self._length

    def reserve(self, count: int) -> None:
        """Have pages for `count` positions behind the committed ones; free those the window has left."""
        self.pages["sliding"].release_before(self._length - self._kept)
        for pages in self.pages.values():
            pages.reserve(self._length + count)

    def advance(self, count: int) -> None:
        """Count `count` positions, which every layer has written, as committed."""
        if self._length + count > self.capacity:
            raise ValueError(f"{self._length} + {count} positions exceed the capacity of {self.capacity}")
        self._length += count

    def reset(self) -> None:
        """Forget everything and free the pages."""
        for pages in self.pages.values():
            pages.clear()
        self._length = 0


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
    ) -> None:
        """Allocate for `capacity` positions a slot. Raises ValueError for a capacity, chunk or slot count below 1."""
        if min(slots, capacity, chunk) < 1:
            raise ValueError(f"slots, capacity and chunk must be at least 1, not {slots}, {capacity} and {chunk}")
        self.chunk = chunk
        ahead = chunk + config.canvas_length  # what one pass may write behind the committed positions
        counts = pages_of_a_slot(capacity=capacity, window=config.sliding_window, ahead=ahead)
        pools = {kind: PagePool(slots * counts[kind]) for kind in KINDS}
        self.slots = tuple(KVCache(pools, capacity, config.sliding_window - 1) for _ in range(slots))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in config.layers:
            shape = (pools[layer.kind].count, PAGE, layer.kv_heads, layer.head_dim)
            # zeros, not garbage: a masked position's value is multiplied by zero, which NaN would survive
            self.keys.append(torch.zeros(shape, device=device, dtype=dtype))
            self.values.append(torch.zeros(shape, device=device, dtype=dtype))

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
