"""Committed keys and values of one slot, for every layer.

Full layers keep all positions. Sliding layers keep the last window - 1 and room for one chunk: what a later commit
chunk or canvas can still see. When that room is used up the kept positions move to the front, so a move of
window - 1 positions is paid once per chunk at most. Knows shapes and positions only, nothing of ids or layers' maths.

Invariant: memory is allocated once, here; `length` changes only in `advance` and `reset`, so a commit that fails
half-way leaves the committed prefix as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig

CHUNK = 512  # positions one commit pass takes at most; bounds the sliding layers' memory and the attention scores


class KVCache:
    """Keys and values of up to `capacity` committed positions.

    `write` every layer after `make_room`, then `advance`. `chunk` positions can be written at a time.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, device: torch.device, dtype: torch.dtype, *, chunk: int = CHUNK
    ) -> None:
        """Allocate. Raises ValueError for a capacity or chunk below 1."""
        if capacity < 1 or chunk < 1:
            raise ValueError(f"capacity and chunk must be at least 1, not {capacity} and {chunk}")
        self.capacity = capacity
        self.chunk = min(chunk, capacity)
        self._kept = config.sliding_window - 1  # positions a sliding layer can still need
        self._sliding_size = min(capacity, self._kept + self.chunk)
        self._is_sliding = tuple(layer.kind == "sliding" for layer in config.layers)
        self._keys: list[Tensor] = []  # a layer: [K, capacity or sliding size, D]
        self._values: list[Tensor] = []
        for layer in config.layers:
            size = self._sliding_size if layer.kind == "sliding" else capacity
            shape = (layer.kv_heads, size, layer.head_dim)
            self._keys.append(torch.zeros(shape, device=device, dtype=dtype))
            self._values.append(torch.zeros(shape, device=device, dtype=dtype))
        self._length = 0
        self._stored = 0  # positions in the sliding buffers: the last `_stored` of `_length`

    @property
    def length(self) -> int:
        """Positions committed so far."""
        return self._length

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def reset(self) -> None:
        """Forget everything. The memory stays allocated."""
        self._length = self._stored = 0

    @torch.inference_mode()
    def make_room(self, count: int) -> None:
        """Prepare for `count` positions. Raises ValueError if they exceed the chunk or the capacity."""
        if not 1 <= count <= self.chunk:
            raise ValueError(f"cannot write {count} positions at a time; the chunk is {self.chunk}")
        if self._length + count > self.capacity:
            raise ValueError(f"{self._length} + {count} positions exceed the cache's capacity of {self.capacity}")
        if self._stored + count <= self._sliding_size:
            return
        kept = min(self._stored, self._kept)
        for layer, sliding in enumerate(self._is_sliding):
            if sliding:
                for buffer in (self._keys[layer], self._values[layer]):
                    # the clone is needed: source and destination may overlap
                    buffer[:, :kept] = buffer[:, self._stored - kept : self._stored].clone()
        self._stored = kept

    @torch.inference_mode()
    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put `keys`, `values` [T, K, D] after the committed positions; not yet counted by `length`.

        Returns views [K, P + T, D]: the P committed positions this layer can still see, then the T new ones.
        """
        count = keys.shape[0]
        end = self._stored if self._is_sliding[layer] else self._length
        self._keys[layer][:, end : end + count] = keys.transpose(0, 1)
        self._values[layer][:, end : end + count] = values.transpose(0, 1)
        return self._view(layer, end + count, count)

    def advance(self, count: int) -> None:
        """Count the `count` positions that every layer has written."""
        self._length += count
        self._stored += count

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views [K, P, D] of the committed keys and values that a canvas can see: all P = length positions in a
        full layer, the last window - 1 in a sliding one."""
        return self._view(layer, self._stored if self._is_sliding[layer] else self._length, 0)

    def _view(self, layer: int, end: int, new: int) -> tuple[Tensor, Tensor]:
        start = max(0, end - new - self._kept) if self._is_sliding[layer] else 0
        return self._keys[layer][:, start:end], self._values[layer][:, start:end]
