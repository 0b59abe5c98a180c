"""Attention of 256 columns on Hopper, in Gluon: two warp groups with the same rows, every other tile each.

A canvas has 64 programs of 64 rows, behind a window of 1024 positions with 4 to 20 tiles each: too few programs for the
chip, and dividing their tiles among more costs parts in float32 and a second kernel. Here the tiles are divided between
a program's two warp groups, each at its own pace in three places of shared memory of its own, so that one multiplies
while the other makes odds; at the end they join in shared memory. A canvas behind 512 takes 0.8 of the usual kernel's
time, a committed canvas and the next one together less than half of it (LOG.md).

Invariant: that of `attention`.
"""

from __future__ import annotations

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

from engine.kernels.attention import require_aligned
from engine.kernels.attention_hopper import (
    BM,
    BN,
    FLAT,
    LOG2_E,
    REGISTERS,
    ROWS,
    SCORES,
    SUMS,
    WIDE,
    ask,
    by_sums,
    calm,
    described,
    hidden,
    meet,
    places,
    sight,
    signature,
    takes,
)
from engine.kernels.catalog import KernelCase
from engine.kernels.chips import HOPPER
from engine.kernels.launching import launch
from engine.kernels.views import AttentionView

COLUMNS, WARPS = 256, 4
PLACES = gl.constexpr(3)  # of a warp group: its keys and values in turn
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@gluon.jit
def _bring(stored, page, head, wanted, place, there):
    """Begin to bring a page's keys or values to a place in shared memory, if they are wanted."""
    D: gl.constexpr = place.shape[1]
    mbarrier.expect(there, BN * D * 2, pred=wanted)
    tma.async_copy_global_to_shared(stored, [page * BN, head * D], there, place, pred=wanted)


@gluon.jit
def _odds(scores, base, seen, best, total):
    """Odds of a tile's scores as the first operand of the product with its values; best and total with that tile
    considered; and by what the sums so far shrink, [BM, 1]."""
    begin, end, inner_from, inner_to = seen
    scores = hidden(scores, base, begin, end, inner_from, inner_to)
    higher = gl.maximum(best, gl.max(scores, 1) * LOG2_E)
    odds = gl.exp2(scores * LOG2_E - calm(higher)[:, None])
    shrink = gl.exp2(best - calm(higher))
    total = total * shrink + gl.sum(odds, 1)
    operand = gl.convert_layout(odds.to(gl.bfloat16), gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
    return operand, higher, total, by_sums(shrink)


@gluon.jit
def _join(best, total, acc, out, first, rows, heads, head, held, met, figures,
          MINE: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Give the other warp group half of the columns and take its other half; store what both come to."""
    OTHER: gl.constexpr = 1 - MINE
    BM: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    # a place holds half of a warp group's sums
    given = held._reinterpret(gl.float32, [2 * PLACES, BM, D // 2], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    left, right = acc.reshape([BM, 2, D // 2]).permute((0, 2, 1)).split()
    mine, theirs = left, right
    if MINE == 1:
        mine, theirs = right, left
    meet()  # all are done with the last tile
    given.index(MINE * PLACES).store(gl.convert_layout(theirs, HALF, assert_trivial=True))
    figures.index(2 * MINE).store(best)
    figures.index(2 * MINE + 1).store(total)
    meet()
    mbarrier.arrive(met.index(MINE))
    mbarrier.wait(met.index(OTHER), 0)
    other_best = figures.index(2 * OTHER).load(ROWS)
    other_total = figures.index(2 * OTHER + 1).load(ROWS)
    highest = calm(gl.maximum(best, other_best))
    share, other_share = gl.exp2(best - highest), gl.exp2(other_best - highest)
    total = total * share + other_total * other_share
    divisor = gl.where(total == 0.0, 1.0, total)
    result = gl.convert_layout(mine, HALF, assert_trivial=True) * by_sums(share / divisor, HALF)
    result += given.index(OTHER * PLACES).load(HALF) * by_sums(other_share / divisor, HALF)
    place, kept = places(first, 0, rows, heads, head, GROUP, BM, gl.SliceLayout(1, HALF))
    columns = MINE * (D // 2) + gl.arange(0, D // 2, layout=gl.SliceLayout(0, HALF))
    gl.store(out + (place[:, None] * D + columns[None, :]), result.to(gl.bfloat16), mask=kept[:, None])


@gluon.jit
def _one_of_pair(
    keys, values, low, high, segment, table, out, rows, width, heads, query, held, ready, met, figures,
    MINE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A warp group's partition. Its places take keys and values in turn: item 2 * tile, and 2 * tile + 1."""
    BM: gl.constexpr = query.shape[0]
    head = gl.program_id(1)
    first = gl.program_id(0) * (BM // GROUP)
    begin, end, start, tiles, inner_from, inner_to = sight(low, high, first, rows, GROUP, BM)
    seen = (begin, end, inner_from, inner_to)
    from_tile = start + MINE
    count = (tiles + 1 - MINE) // 2
    pages = table + gl.load(segment + first).to(gl.int64) * width + from_tile
    at = MINE * PLACES
    best = gl.full([BM], float("-inf"), gl.float32, layout=ROWS)
    total = gl.full([BM], 0.0, gl.float32, layout=ROWS)
    acc = gl.full([BM, query.shape[1]], 0.0, gl.float32, layout=SUMS)
    nought = gl.full([BM, BN], 0.0, gl.float32, layout=SCORES)
    following_page = 0
    if count > 0:
        page = gl.load(pages)
        following_page = gl.load(pages + 2 * gl.minimum(1, count - 1))
        _bring(keys, page, head, count > 0, held.index(at), ready.index(at))
        _bring(values, page, head, count > 0, held.index(at + 1), ready.index(at + 1))
        _bring(keys, following_page, head, count > 1, held.index(at + 2), ready.index(at + 2))
    if MINE == 0:
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        mbarrier.arrive(met.index(2))
    if count > 0:
        mbarrier.wait(met.index(2), 0)
        mbarrier.wait(ready.index(at), 0)
        token = warpgroup_mma(query, held.index(at).permute((1, 0)), nought, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[token])
        meet()  # all are done with the first tile's keys
        _bring(values, following_page, head, count > 1, held.index(at), ready.index(at))
        for tile in range(count - 1):
            page = gl.load(pages + 2 * gl.minimum(tile + 2, count - 1))
            odds, best, total, shrink = _odds(scores, (from_tile + 2 * tile) * BN, seen, best, total)
            acc *= shrink
            value = at + (2 * tile + 1) % PLACES
            mbarrier.wait(ready.index(value), (2 * tile + 1) // PLACES % 2)
            product = warpgroup_mma(odds, held.index(value), acc, is_async=True)
            key = at + (2 * tile + 2) % PLACES
            mbarrier.wait(ready.index(key), (2 * tile + 2) // PLACES % 2)
            other = held.index(key).permute((1, 0))
            following = warpgroup_mma(query, other, nought, use_acc=False, is_async=True)
            acc, odds = warpgroup_mma_wait(1, deps=[product, odds])
            meet()  # all are done with this tile's values
            _bring(keys, page, head, tile + 2 < count, held.index(value), ready.index(value))
            # what is in flight from one turn of a loop to the next makes ptxas wait after every single instruction
            scores = warpgroup_mma_wait(0, deps=[following])
            meet()  # all are done with the next tile's keys
            _bring(values, page, head, tile + 2 < count, held.index(key), ready.index(key))
        tile = count - 1
        odds, best, total, shrink = _odds(scores, (from_tile + 2 * tile) * BN, seen, best, total)
        acc *= shrink
        value = at + (2 * tile + 1) % PLACES
        mbarrier.wait(ready.index(value), (2 * tile + 1) // PLACES % 2)
        acc = warpgroup_mma(odds, held.index(value), acc)
    _join(best, total, acc, out, first, rows, heads, head, held, met, figures, MINE, GROUP)


@gluon.jit
def attention_256_kernel(
    queries, keys, values, low, high, segment, table, out, rows, width, heads,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, WIDE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [R, H, D], else as `attention.attention_kernel`; 4 warps, and as many again that work beside them.

    keys, values: descriptors of [pages * BN, kv_heads * D], in boxes of D columns of a page.
    """
    query = gl.allocate_shared_memory(gl.bfloat16, [BM, D], WIDE)
    held = gl.allocate_shared_memory(gl.bfloat16, [2 * PLACES, BN, D], WIDE)
    ready = gl.allocate_shared_memory(gl.int64, [2 * PLACES, 1], mbarrier.MBarrierLayout())
    # what a warp group has to give is given, and the third: queries are there
    met = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    figures = gl.allocate_shared_memory(gl.float32, [4, BM], FLAT)
    ask(queries, query, gl.program_id(0) * (BM // GROUP), rows, heads, gl.program_id(1), GROUP)
    for one in gl.static_range(2 * PLACES):
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
                            query, held, ready, met, figures, ONE, GROUP)),
            (_one_of_pair, (keys, values, low, high, segment, table, out, rows, width, heads,
                            query, held, ready, met, figures, OTHER, GROUP)),
        ],
        [4],
        [REGISTERS],
    )
    # fmt: on


def serves(heads: Tensor, qk_weight: Tensor, keys: Tensor) -> bool:
    """Whether `attention` may take the place of the usual one; arguments as in `reference.attend`."""
    return takes(heads, qk_weight, keys, COLUMNS)


def attention(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """As `attention.attention`, where `serves` says so."""
    rows, heads, columns = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    require_aligned(view)
    out = torch.empty_like(queries)
    # all warps of a program get as many registers as its partitions ask for, so that none has to be moved
    launch(attention_256_kernel, (triton.cdiv(rows, BM // group), kv_heads))(
        queries, described(keys, columns), described(values, columns), view.low, view.high, view.segment, view.table,
        out, rows, view.table.shape[1], heads,
        GROUP=group, D=columns, BM=BM, WIDE=WIDE, REGISTERS=REGISTERS, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return out.flatten(1)


def cases() -> list[KernelCase]:
    """At the model's shapes: 16 heads, 8 key heads."""
    return [
        KernelCase(
            name=f"attention_hopper[{COLUMNS}]",
            kernel=attention_256_kernel,
            signature=signature(COLUMNS, COLUMNS),
            constants={"GROUP": 2, "D": COLUMNS, "BM": BM, "WIDE": WIDE, "REGISTERS": REGISTERS},
            num_warps=WARPS,
            most_registers=REGISTERS,
            chips=(HOPPER,),
        )
    ]
