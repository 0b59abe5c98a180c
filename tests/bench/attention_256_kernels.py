"""Attention of 256 columns behind a window, for Hopper in Gluon: an experiment's kernels (`attention_256`).

A canvas has 64 times 64 rows (8 key heads of 512) that see 4 to 20 tiles of 64 keys each. Programs of 64 rows read
twice as many tiles from L2 as programs of 128, and L2 gives 5 TB/s: behind a full window 84 MB are 16 us, 42 MB are 8.
But programs of 128 rows are 32, and what divides their keys costs parts in float32 and a second kernel. So:

- `rows_kernel`: warp groups with 64 rows each share tiles, in two places. The next tile's scores run beside this one's
  softmax. Keys are divided among programs, and parts joined by the engine's second kernel; or they are not divided.
- `pair_kernel`: two warp groups with the same 64 rows take every other tile, each at its own pace in three places of
  its own, so that one multiplies while the other makes odds. They join in shared memory: no parts, no second kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels import attention as usual
from engine.kernels.attention_hopper import BN, LOG2_E, WIDE, _ask, _places, meet
from engine.kernels.catalog import KernelCase
from engine.kernels.views import AttentionView
from engine.pages import PAGE

COLUMNS, KV_HEADS, GROUP = 256, 8, 2
REGISTERS = 240  # of a thread of a pair: with as many for both, Triton is soon done with moving them
SLOTS = gl.constexpr(3)  # of a warp group of a pair: its keys and values in turn


@gluon.jit
def _sight(low, high, first, rows, GROUP: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr):
    """What the rows of a program see, from begin to end, [BM] each; the first tile of it, and how many tiles it is; and
    between which positions all rows see all.

    Views promise that low and high never fall within a segment, but for rows that fill it up, its last.
    """
    row = first + gl.arange(0, BM, layout=layout) // GROUP
    live = row < rows
    row = gl.where(live, row, first)
    begin = gl.load(low + row)
    end = gl.where(live, gl.load(high + row), 0)
    last = gl.minimum(first + BM // GROUP, rows) - 1
    lowest = gl.load(low + first)
    inner_from = gl.maximum(lowest, gl.load(low + last))
    inner_to = gl.minimum(gl.load(high + first), gl.load(high + last))
    start = lowest // BN
    tiles = gl.maximum((gl.max(end, 0) + BN - 1) // BN - start, 0)
    return begin, end, start, tiles, inner_from, inner_to


@gluon.jit
def _bring(stored, page, head, wanted, place, there):
    """Begin to bring a page's keys or values to a place in shared memory, if they are wanted."""
    D: gl.constexpr = place.shape[1]
    mbarrier.expect(there, BN * D * 2, pred=wanted)
    tma.async_copy_global_to_shared(stored, [page * BN, head * D], there, place, pred=wanted)


@gluon.jit
def _odds(scores, base, begin, end, inner_from, inner_to, best, total, SUMS: gl.constexpr):
    """Odds of a tile's scores as the first operand of the product with its values; best and total with that tile
    considered; and by what the sums so far shrink, [BM, 1]."""
    SCORES: gl.constexpr = scores.type.layout
    if (base < inner_from) | (base + BN > inner_to):
        position = base + gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES))[None, :]
        seen = (position >= begin[:, None]) & (position < end[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    higher = gl.maximum(best, gl.max(scores, 1) * LOG2_E)
    calm = gl.where(higher == float("-inf"), 0.0, higher)
    odds = gl.exp2(scores * LOG2_E - calm[:, None])
    shrink = gl.exp2(best - calm)
    total = total * shrink + gl.sum(odds, 1)
    operand = gl.convert_layout(odds.to(gl.bfloat16), gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
    return operand, higher, total, gl.convert_layout(shrink, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]


@gluon.jit
def _nothing_yet(BM: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr):
    """A row's highest score so far, the sum of its odds, and its odds' sums of values; and no scores."""
    best = gl.full([BM], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.full([BM], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc = gl.full([BM, SUMS.instr_shape[1]], 0.0, gl.float32, layout=SUMS)
    return best, total, acc, gl.full([BM, BN], 0.0, gl.float32, layout=SCORES)


@gluon.jit
def _hand_over(best, total, acc, out, parts, sums, first, split, rows, heads, head,
               GROUP: gl.constexpr, SPLITS: gl.constexpr):  # fmt: skip
    """Store what the rows' odds come to, as `attention.attention_kernel` does."""
    SUMS: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = total.type.layout
    BM: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    divisor = gl.where(total == 0.0, 1.0, total)
    acc *= gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    place, kept = _places(first, split, rows, heads, head, GROUP, BM, gl.SliceLayout(1, SUMS))
    if SPLITS == 1:
        gl.store(out + (place[:, None] * D + columns[None, :]), acc.to(gl.bfloat16), mask=kept[:, None])
    else:
        gl.store(parts + (place[:, None] * D + columns[None, :]), acc, mask=kept[:, None])
        place, kept = _places(first, split, rows, heads, head, GROUP, BM, ROWS)
        gl.store(sums + place, gl.where(total == 0.0, float("-inf"), best + gl.log2(divisor)), mask=kept)


@gluon.jit
def rows_kernel(
    queries, keys, values, low, high, segment, table, out, parts, sums, rows, width, heads,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, SPLITS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """As `attention.attention_kernel` with SHARES = 1.

    keys, values: descriptors of [pages * BN, kv_heads * D], in boxes of D columns of a page.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    head = gl.program_id(1)
    split = gl.program_id(2)
    first = gl.program_id(0) * (BM // GROUP)
    query = gl.allocate_shared_memory(gl.bfloat16, [BM, D], WIDE)
    key = gl.allocate_shared_memory(gl.bfloat16, [2, BN, D], WIDE)
    value = gl.allocate_shared_memory(gl.bfloat16, [2, BN, D], WIDE)
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())  # two for keys, two for values
    _ask(queries, query, first, rows, heads, head, GROUP)
    for one in gl.static_range(4):
        mbarrier.init(ready.index(one), count=1)
    fence_async_shared()
    meet()
    begin, end, start, tiles, inner_from, inner_to = _sight(
        low, high, first, rows, GROUP, BM, gl.SliceLayout(1, SCORES)
    )
    from_tile = start + tiles * split // SPLITS
    count = start + tiles * (split + 1) // SPLITS - from_tile
    pages = table + gl.load(segment + first).to(gl.int64) * width + from_tile
    best, total, acc, nought = _nothing_yet(BM, SCORES, SUMS)
    if count > 0:
        page = gl.load(pages)
        second = gl.load(pages + gl.minimum(1, count - 1))
        third = gl.load(pages + gl.minimum(2, count - 1))
        _bring(keys, page, head, count > 0, key.index(0), ready.index(0))
        _bring(values, page, head, count > 0, value.index(0), ready.index(2))
        _bring(keys, second, head, count > 1, key.index(1), ready.index(1))
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        mbarrier.wait(ready.index(0), 0)
        token = warpgroup_mma(query, key.index(0).permute((1, 0)), nought, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[token])
        meet()  # all are done with the first tile's keys
        _bring(keys, third, head, count > 2, key.index(0), ready.index(0))
        for tile in range(count - 1):
            stage = tile % 2
            fourth = gl.load(pages + gl.minimum(tile + 3, count - 1))
            mbarrier.wait(ready.index(1 - stage), (tile + 1) // 2 % 2)
            other = key.index(1 - stage).permute((1, 0))
            following = warpgroup_mma(query, other, nought, use_acc=False, is_async=True)
            meet()  # all are done with the last tile's values
            _bring(values, second, head, True, value.index(1 - stage), ready.index(3 - stage))
            base = (from_tile + tile) * BN
            odds, best, total, shrink = _odds(scores, base, begin, end, inner_from, inner_to, best, total, SUMS)
            acc *= shrink
            mbarrier.wait(ready.index(2 + stage), tile // 2 % 2)
            product = warpgroup_mma(odds, value.index(stage), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[following])
            meet()  # all are done with the next tile's keys
            _bring(keys, fourth, head, tile + 3 < count, key.index(1 - stage), ready.index(1 - stage))
            second, third = third, fourth
            # what is in flight from one turn of a loop to the next makes ptxas wait after every single instruction
            acc, odds = warpgroup_mma_wait(0, deps=[product, odds])
        tile = count - 1
        base = (from_tile + tile) * BN
        odds, best, total, shrink = _odds(scores, base, begin, end, inner_from, inner_to, best, total, SUMS)
        acc *= shrink
        mbarrier.wait(ready.index(2 + tile % 2), tile // 2 % 2)
        acc = warpgroup_mma(odds, value.index(tile % 2), acc)
    async_copy.wait_group(0)
    _hand_over(best, total, acc, out, parts, sums, first, split, rows, heads, head, GROUP, SPLITS)


@gluon.jit
def _join(best, total, acc, out, first, rows, heads, head, places, met, figures,
          MINE: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Give the other warp group half of the columns and take its other half; store what both come to."""
    OTHER: gl.constexpr = 1 - MINE
    BM: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    ROWS: gl.constexpr = best.type.layout
    # a place holds half of a warp group's sums
    given = places._reinterpret(gl.float32, [2 * SLOTS, BM, D // 2], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    left, right = acc.reshape([BM, 2, D // 2]).permute((0, 2, 1)).split()
    mine, theirs = left, right
    if MINE == 1:
        mine, theirs = right, left
    meet()  # all are done with the last tile
    given.index(MINE * SLOTS).store(gl.convert_layout(theirs, HALF, assert_trivial=True))
    figures.index(2 * MINE).store(best)
    figures.index(2 * MINE + 1).store(total)
    meet()
    mbarrier.arrive(met.index(MINE))
    mbarrier.wait(met.index(OTHER), 0)
    other_best = figures.index(2 * OTHER).load(ROWS)
    other_total = figures.index(2 * OTHER + 1).load(ROWS)
    higher = gl.maximum(best, other_best)
    calm = gl.where(higher == float("-inf"), 0.0, higher)
    share, other_share = gl.exp2(best - calm), gl.exp2(other_best - calm)
    total = total * share + other_total * other_share
    divisor = gl.where(total == 0.0, 1.0, total)
    share = gl.convert_layout(share / divisor, gl.SliceLayout(1, HALF), assert_trivial=True)
    other_share = gl.convert_layout(other_share / divisor, gl.SliceLayout(1, HALF), assert_trivial=True)
    result = gl.convert_layout(mine, HALF, assert_trivial=True) * share[:, None]
    result += given.index(OTHER * SLOTS).load(HALF) * other_share[:, None]
    place, kept = _places(first, 0, rows, heads, head, GROUP, BM, gl.SliceLayout(1, HALF))
    columns = MINE * (D // 2) + gl.arange(0, D // 2, layout=gl.SliceLayout(0, HALF))
    gl.store(out + (place[:, None] * D + columns[None, :]), result.to(gl.bfloat16), mask=kept[:, None])


@gluon.jit
def _one_of_pair(
    keys, values, low, high, segment, table, out, rows, width, heads, query, places, ready, met, figures,
    MINE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """What a warp group does. Its places take keys and values in turn: item 2 * tile, and 2 * tile + 1."""
    BM: gl.constexpr = query.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, query.shape[1], 16])
    head = gl.program_id(1)
    first = gl.program_id(0) * (BM // GROUP)
    begin, end, start, tiles, inner_from, inner_to = _sight(
        low, high, first, rows, GROUP, BM, gl.SliceLayout(1, SCORES)
    )
    from_tile = start + MINE
    count = (tiles + 1 - MINE) // 2
    pages = table + gl.load(segment + first).to(gl.int64) * width + from_tile
    at = MINE * SLOTS
    best, total, acc, nought = _nothing_yet(BM, SCORES, SUMS)
    following_page = 0
    if count > 0:
        page = gl.load(pages)
        following_page = gl.load(pages + 2 * gl.minimum(1, count - 1))
        _bring(keys, page, head, count > 0, places.index(at), ready.index(at))
        _bring(values, page, head, count > 0, places.index(at + 1), ready.index(at + 1))
        _bring(keys, following_page, head, count > 1, places.index(at + 2), ready.index(at + 2))
    if MINE == 0:
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        mbarrier.arrive(met.index(2))
    if count > 0:
        mbarrier.wait(met.index(2), 0)
        mbarrier.wait(ready.index(at), 0)
        token = warpgroup_mma(query, places.index(at).permute((1, 0)), nought, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[token])
        meet()  # all are done with the first tile's keys
        _bring(values, following_page, head, count > 1, places.index(at), ready.index(at))
        for tile in range(count - 1):
            page = gl.load(pages + 2 * gl.minimum(tile + 2, count - 1))
            base = (from_tile + 2 * tile) * BN
            odds, best, total, shrink = _odds(scores, base, begin, end, inner_from, inner_to, best, total, SUMS)
            acc *= shrink
            value = at + (2 * tile + 1) % SLOTS
            mbarrier.wait(ready.index(value), (2 * tile + 1) // SLOTS % 2)
            product = warpgroup_mma(odds, places.index(value), acc, is_async=True)
            key = at + (2 * tile + 2) % SLOTS
            mbarrier.wait(ready.index(key), (2 * tile + 2) // SLOTS % 2)
            other = places.index(key).permute((1, 0))
            following = warpgroup_mma(query, other, nought, use_acc=False, is_async=True)
            acc, odds = warpgroup_mma_wait(1, deps=[product, odds])
            meet()  # all are done with this tile's values
            _bring(keys, page, head, tile + 2 < count, places.index(value), ready.index(value))
            # what is in flight from one turn of a loop to the next makes ptxas wait after every single instruction
            scores = warpgroup_mma_wait(0, deps=[following])
            meet()  # all are done with the next tile's keys
            _bring(values, page, head, tile + 2 < count, places.index(key), ready.index(key))
        tile = count - 1
        base = (from_tile + 2 * tile) * BN
        odds, best, total, shrink = _odds(scores, base, begin, end, inner_from, inner_to, best, total, SUMS)
        acc *= shrink
        value = at + (2 * tile + 1) % SLOTS
        mbarrier.wait(ready.index(value), (2 * tile + 1) // SLOTS % 2)
        acc = warpgroup_mma(odds, places.index(value), acc)
    _join(best, total, acc, out, first, rows, heads, head, places, met, figures, MINE, GROUP)


@gluon.jit
def pair_kernel(
    queries, keys, values, low, high, segment, table, out, rows, width, heads,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, WIDE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `rows_kernel` of one split, of BM = 64 rows; 4 warps, and as many again that work beside them."""
    query = gl.allocate_shared_memory(gl.bfloat16, [BM, D], WIDE)
    places = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, BN, D], WIDE)
    ready = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    # what a warp group has to give is given, and the third: queries are there
    met = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    figures = gl.allocate_shared_memory(gl.float32, [4, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _ask(queries, query, gl.program_id(0) * (BM // GROUP), rows, heads, gl.program_id(1), GROUP)
    for one in gl.static_range(2 * SLOTS):
        mbarrier.init(ready.index(one), count=1)
    for one in gl.static_range(3):
        mbarrier.init(met.index(one), count=1)
    fence_async_shared()
    meet()
    ONE: gl.constexpr = 0
    OTHER: gl.constexpr = 1
    # fmt: off
    gl.warp_specialize(
        [
            (_one_of_pair, (keys, values, low, high, segment, table, out, rows, width, heads,
                            query, places, ready, met, figures, ONE, GROUP)),
            (_one_of_pair, (keys, values, low, high, segment, table, out, rows, width, heads,
                            query, places, ready, met, figures, OTHER, GROUP)),
        ],
        [4],
        [REGISTERS],
    )
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to do it: `splits` None is `pair_kernel`."""

    name: str
    bm: int
    splits: int | None

    @property
    def warps(self) -> int:
        return 4 if self.splits is None else self.bm // 16

    @property
    def constants(self) -> dict[str, Any]:
        own = {"REGISTERS": REGISTERS} if self.splits is None else {"SPLITS": self.splits}
        return {"GROUP": GROUP, "D": COLUMNS, "BM": self.bm, "WIDE": WIDE} | own

    @property
    def registers(self) -> int | None:
        """At most, of a thread."""
        return REGISTERS if self.splits is None else None


VARIANTS = (
    Variant(name="pair", bm=64, splits=None),
    Variant(name="rows of 128, 1 split", bm=128, splits=1),
    Variant(name="rows of 128, 2 splits", bm=128, splits=2),
    Variant(name="rows of 128, 4 splits", bm=128, splits=4),
    Variant(name="rows of 64, 2 splits", bm=64, splits=2),
)


def attention(variant: Variant, queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """As `engine.kernels.attention.attention`, 2 heads of 256 columns a key head."""
    rows, heads, _ = queries.shape
    out = torch.empty_like(queries)
    described = (
        TensorDescriptor.from_tensor(x.flatten(2).flatten(0, 1), [PAGE, COLUMNS], WIDE) for x in (keys, values)
    )
    given = (queries, *described, view.low, view.high, view.segment, view.table, out)
    grid = (triton.cdiv(rows, variant.bm // GROUP), KV_HEADS, variant.splits or 1)
    how = variant.constants | {"num_warps": variant.warps, "maxnreg": variant.registers}
    if variant.splits is None:
        pair_kernel[grid](*given, rows, view.table.shape[1], heads, **how)
    else:
        parts, sums = usual.parts_of(out, variant.splits)
        rows_kernel[grid](*given, parts, sums, rows, view.table.shape[1], heads, **how)
        usual.join(parts, sums, out, variant.splits)
    return out.flatten(1)


def case_of(variant: Variant) -> KernelCase:
    """To compile it without a GPU."""
    signature = dict.fromkeys(("low", "high", "segment", "table"), "*i32:16")
    signature |= {"queries": "*bf16:16", "out": "*bf16:16", "rows": "i32:16", "width": "i32", "heads": "i32:16"}
    signature |= dict.fromkeys(("keys", "values"), f"tensordesc<bf16[{PAGE}, {COLUMNS}],{WIDE}>")
    if variant.splits is not None:
        signature |= {"parts": "*fp32:16", "sums": "*fp32:16"}
    return KernelCase(
        name=variant.name,
        kernel=pair_kernel if variant.splits is None else rows_kernel,
        signature=signature,
        constants=variant.constants,
        num_warps=variant.warps,
        most_registers=variant.registers,
    )
