"""Pages, slots and plans against a plain model: what was written where, and what a row may see."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import LayerConfig, ModelConfig
from engine.kernels.views import NOWHERE
from engine.kv_cache import KVCache, KVPool
from engine.pages import PAGE, PagePool, SlotPages
from engine.plan import CANVAS, COMMIT, PassPlan, Planner

CPU = torch.device("cpu")
CANVAS_LENGTH = 5


def config(window: int) -> ModelConfig:
    sliding = LayerConfig(kind="sliding", head_dim=4, kv_heads=2, rope_theta=1e4, rope_partial=1.0)
    full = LayerConfig(kind="full", head_dim=8, kv_heads=1, rope_theta=1e6, rope_partial=0.25)
    return ModelConfig(
        vocab_size=32,
        hidden_size=8,
        canvas_length=CANVAS_LENGTH,
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


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["reserve", "release", "clear"]), st.integers(0, 600)), max_size=40
    )
)
def test_pages_are_never_lost_or_shared(operations: list[tuple[int, str, int]]) -> None:
    pool = PagePool(30)
    slots = [SlotPages(pool) for _ in range(3)]
    for number, operation, position in operations:
        pages = slots[number]
        if operation == "clear":
            pages.clear()
        elif operation == "release":
            first = pages.first
            changed = pages.release_before(position)
            assert pages.first * PAGE <= max(position, first * PAGE), "a page with a later position was freed"
            assert changed == (pages.first > first)
        else:
            end = max(position, pages.first * PAGE)
            need = max(0, -(-end // PAGE) - pages.end)
            if need > pool.free:
                with pytest.raises(RuntimeError, match="all 30 pages are taken"):
                    pages.reserve(end)
            else:
                assert pages.reserve(end) == (need > 0)
                assert pages.end * PAGE >= end
        held = [page for slot in slots for page in slot.pages]
        assert len(held) == len(set(held))
        assert len(held) + pool.free == 30


def plan_pass(
    commits: Sequence[tuple[KVCache, int]], canvases: Sequence[KVCache], window: int, align: int = 1
) -> PassPlan:
    """`align` above 1 also fills the commits up to buckets."""
    buckets = () if align == 1 else (align, 3 * align, 20 * align)
    planner = Planner(config(window), CPU, row_align=align, buckets=buckets)
    return planner.plan([([7] * count, cache) for cache, count in commits], list(enumerate(canvases)))


def fill(pool: KVPool, plan: PassPlan, mark: int) -> None:
    """Every row writes its position plus `mark` into every layer, as a model would."""
    kinds = ("sliding", "full")
    for layer, kind in enumerate(kinds):
        where = plan.views[kind].where
        rows = (plan.positions + mark).to(pool.keys[layer].dtype)[where != NOWHERE]
        flat = pool.keys[layer].view(-1, *pool.keys[layer].shape[2:])
        flat[where[where != NOWHERE]] = rows[:, None, None].expand(-1, *flat.shape[1:])


def seen(pool: KVPool, plan: PassPlan, kind: str, row: int) -> list[int]:
    """What lies at the positions that a row sees."""
    view = plan.views[kind]
    segment = int(view.segment[row])
    assert view.segments[segment].first <= row < view.segments[segment].first + view.segments[segment].count
    keys = pool.keys[("sliding", "full").index(kind)]
    out = []
    for position in range(int(view.low[row]), int(view.high[row])):
        page = int(view.table[segment, position // PAGE])
        assert page >= 0, "a row sees a position whose page is not held"
        out.append(int(keys[page, position % PAGE, 0, 0]))
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    window=st.integers(2, 90),
    align=st.sampled_from([1, 16]),
    passes=st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=2, max_size=2), st.booleans()), max_size=12),
)
def test_every_row_sees_what_it_may_see(window: int, align: int, passes: list[tuple[list[int], bool]]) -> None:
    """Two slots grow by turns, canvases in between; a canvas's rows are marked, and only it may see the marks."""
    sizes = config(window)
    pool = KVPool(sizes, 2, 500, CPU, torch.float64, chunk=40)
    for counts, with_canvas in passes:
        commits = [(cache, count) for cache, count in zip(pool.slots, counts, strict=True) if count]
        canvases = list(pool.slots) if with_canvas else []
        if not commits and not canvases:
            continue
        plan = plan_pass(commits, canvases, window, align)
        rows = plan.layout.commit_rows
        assert rows >= sum(count for _, count in commits)
        assert plan.modes[:rows].tolist() == [COMMIT] * rows
        assert plan.modes[rows:].tolist() == [CANVAS] * (len(plan.modes) - rows)
        assert plan.slots.tolist() == list(range(len(canvases)))
        fill(pool, plan, 0)
        real = {row for s in plan.views["full"].segments for row in range(s.first, s.first + s.count)}
        for segment in plan.views["full"].segments[: len(commits)]:
            for row in range(segment.first, segment.first + segment.count):
                position = int(plan.positions[row])
                assert plan.ids[row] == 7
                assert seen(pool, plan, "full", row) == list(range(position + 1))
                assert seen(pool, plan, "sliding", row) == list(range(max(0, position - window + 1), position + 1))
        for segment in plan.views["full"].segments[len(commits) :]:
            start = int(plan.positions[segment.first])
            canvas = list(range(start, start + CANVAS_LENGTH))
            assert segment.count == CANVAS_LENGTH
            for row in range(segment.first, segment.first + segment.count):
                assert seen(pool, plan, "full", row) == [*range(start), *canvas]
                assert seen(pool, plan, "sliding", row) == [*range(max(0, start - window + 1), start), *canvas]
        for row in set(range(len(plan.modes))) - real:  # fills up only: sees nothing, is stored nowhere
            for view in plan.views.values():
                assert (int(view.low[row]), int(view.high[row]), int(view.where[row])) == (0, 0, NOWHERE)
        plan.advance()
        if with_canvas:  # what a canvas leaves behind the committed positions must not be seen later
            fill(pool, plan_pass([], canvases, window, align), 10_000)


def test_sliding_layers_are_bounded_and_memory_is_allocated_once() -> None:
    small, large = (KVPool(config(70), 1, capacity, CPU, torch.bfloat16, chunk=16) for capacity in (1000, 3000))
    assert small.keys[0].shape == large.keys[0].shape == (3, PAGE, 2, 4)
    assert small.keys[1].shape == (16, PAGE, 1, 8)
    assert large.keys[1].shape == (48, PAGE, 1, 8)
    before = large.bytes, [keys.data_ptr() for keys in large.keys]
    (cache,) = large.slots
    for _ in range(3000 // 16):
        plan_pass([(cache, 16)], [cache], 70)
        cache.advance(16)
    assert (large.bytes, [keys.data_ptr() for keys in large.keys]) == before


def test_reset_frees_every_page() -> None:
    pool = KVPool(config(9), 2, 200, CPU, torch.float32, chunk=20)
    for _ in range(5):
        for cache in pool.slots:
            for _ in range(10):
                plan_pass([(cache, 20)], [], 9)
                cache.advance(20)
            cache.reset()
            assert cache.length == 0


def test_what_does_not_fit_is_refused() -> None:
    cache: KVCache = KVPool(config(4), 1, 8, CPU, torch.float32).slots[0]
    cache.advance(8)
    with pytest.raises(ValueError, match="capacity of 8"):
        cache.advance(1)
    assert cache.length == 8
    with pytest.raises(ValueError, match="slots, capacity and chunk"):
        KVPool(config(4), 1, 0, CPU, torch.float32)
