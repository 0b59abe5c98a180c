"""The cache against a plain list of everything ever written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import LayerConfig, ModelConfig
from engine.kv_cache import KVCache

CPU = torch.device("cpu")


def config(window: int) -> ModelConfig:
    sliding = LayerConfig(kind="sliding", head_dim=4, kv_heads=2, rope_theta=1e4, rope_partial=1.0)
    full = LayerConfig(kind="full", head_dim=8, kv_heads=1, rope_theta=1e6, rope_partial=0.25)
    return ModelConfig(
        vocab_size=32,
        hidden_size=8,
        canvas_length=4,
        max_positions=4096,
        sliding_window=window,
        num_heads=2,
        rms_norm_eps=1e-6,
        final_softcap=30.0,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_experts=2,
        top_k_experts=1,
        layers=(sliding, full),
    )


def append(cache: KVCache, layers: tuple[LayerConfig, ...], start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Write positions whose keys are their number and whose values are its negative."""
    cache.make_room(count)
    seen = []
    for index, layer in enumerate(layers):
        numbers = torch.arange(start, start + count, dtype=torch.float32)[:, None, None]
        keys = numbers.expand(count, layer.kv_heads, layer.head_dim)
        seen.append(cache.write(index, keys, -keys))
    cache.advance(count)
    return seen


def positions(keys: Tensor) -> list[int]:
    assert (keys == keys[:1, :, :1]).all(), "all heads and dimensions of a position hold its number"
    return [int(number) for number in keys[0, :, 0]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(window=st.integers(2, 9), chunk=st.integers(1, 6), counts=st.lists(st.integers(1, 6), max_size=15))
def test_every_layer_sees_what_it_may_see(window: int, chunk: int, counts: list[int]) -> None:
    sizes = config(window)
    cache = KVCache(sizes, 64, CPU, torch.float32, chunk=chunk)
    for count in (min(count, chunk) for count in counts):
        start = cache.length
        if start + count > cache.capacity:
            break
        sliding, full = append(cache, sizes.layers, start, count)
        assert positions(full[0]) == list(range(start + count))
        assert positions(sliding[0]) == list(range(max(0, start - window + 1), start + count))
        assert torch.equal(sliding[1], -sliding[0]) and torch.equal(full[1], -full[0])
        assert cache.length == start + count
        assert positions(cache.prefix(0)[0]) == list(range(max(0, cache.length - window + 1), cache.length))
        assert positions(cache.prefix(1)[0]) == list(range(cache.length))


def test_sliding_layers_are_bounded_and_memory_is_allocated_once() -> None:
    sizes = config(window=8)
    small, large = (KVCache(sizes, capacity, CPU, torch.bfloat16, chunk=16) for capacity in (1000, 3000))
    full_bytes = 2 * 1 * 8 * 2  # of a position: keys and values, heads, dimensions, bytes
    sliding_bytes = 2 * 2 * 4 * 2 * (8 - 1 + 16)
    assert small.bytes == 1000 * full_bytes + sliding_bytes
    assert large.bytes == 3000 * full_bytes + sliding_bytes
    append(large, sizes.layers, 0, 16)
    before = large.bytes, large.prefix(1)[0].data_ptr()
    for start in range(16, 2992, 16):
        append(large, sizes.layers, start, 16)
    assert (large.bytes, large.prefix(1)[0].data_ptr()) == before


def test_reset_forgets_and_the_cache_can_be_used_again() -> None:
    sizes = config(window=5)
    cache = KVCache(sizes, 32, CPU, torch.float32, chunk=6)
    for start in (0, 6, 12):
        append(cache, sizes.layers, start, 6)
    cache.reset()
    assert cache.length == 0
    assert cache.prefix(0)[0].shape[1] == cache.prefix(1)[0].shape[1] == 0
    append(cache, sizes.layers, 0, 3)
    assert positions(cache.prefix(0)[0]) == positions(cache.prefix(1)[0]) == [0, 1, 2]


def test_a_commit_that_fails_half_way_changes_nothing() -> None:
    sizes = config(window=4)
    cache = KVCache(sizes, 32, CPU, torch.float32, chunk=5)
    for start in (0, 5):
        append(cache, sizes.layers, start, 5)
    cache.make_room(5)
    cache.write(0, torch.full((5, 2, 4), 99.0), torch.full((5, 2, 4), 99.0))  # and no advance
    assert positions(cache.prefix(0)[0]) == [7, 8, 9]
    sliding, full = append(cache, sizes.layers, 10, 2)
    assert positions(sliding[0]) == [7, 8, 9, 10, 11]
    assert positions(full[0]) == list(range(12))


def test_what_does_not_fit_is_refused() -> None:
    sizes = config(window=4)
    cache = KVCache(sizes, 8, CPU, torch.float32, chunk=6)
    append(cache, sizes.layers, 0, 6)
    with pytest.raises(ValueError, match="capacity of 8"):
        cache.make_room(3)
    with pytest.raises(ValueError, match="chunk is 6"):
        cache.make_room(7)
    with pytest.raises(ValueError, match="capacity and chunk"):
        KVCache(sizes, 0, CPU, torch.float32)
