"""Attention of 512 columns on Hopper, in Gluon: it reads the values, and of the keys only what RoPE turned.

Where values are the keys before their weight and RoPE, and RoPE turns but TURNED columns of each half, a key is
value * weight in all other columns. With queries that were multiplied by that weight (folded, `norms`), scores need the
values and the keys' turned columns only: 640 columns of a position are read instead of 1024, by L2 and by the tensor
cores, and two tiles of 64 positions fit shared memory. They come by the bulk tensor copy engine. The next tile's scores
follow this tile's product with the values at once: its values' place is free for the tile after the next while those
scores and the next softmax run. Scores before the softmax would hide the softmax and bare the copies: both places
would be taken until the product is done. Behind a long prefix it takes 0.4 to 0.5 of the usual kernel's time (LOG.md).

Knows views, no model. Invariant: that of `attention`.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.attention import join, parts_of, require_aligned
from engine.kernels.catalog import KernelCase
from engine.kernels.chips import HOPPER, chip_of
from engine.kernels.grouped import rows_class
from engine.kernels.launching import launch
from engine.kernels.views import AttentionView
from engine.pages import PAGE

COLUMNS, BM, WARPS = 512, 64, 8
LOG2_E = gl.constexpr(1.4426950408889634)
BN = gl.constexpr(PAGE)  # a tile is a page
TURNED = gl.constexpr(64)  # columns of each half that RoPE turns
SLACK = gl.constexpr(8.0)
PARTS = gl.constexpr(6)  # of a score's sum, each an instruction group of its own
WIDE = gl.NVMMASharedLayout(128, 16, 2)
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6


@gluon.jit
def _bring(keys, values, page, head, wanted, value, turned, stage, ready):
    """Begin to bring a page's values and turned columns of keys to a place in shared memory, if they are wanted."""
    D: gl.constexpr = value.shape[2]
    there = ready.index(stage)
    mbarrier.expect(there, (D + 2 * TURNED) * BN * 2, pred=wanted)
    first = page * BN
    tma.async_copy_global_to_shared(keys, [first, head * D], there, turned.index(2 * stage), pred=wanted)
    tma.async_copy_global_to_shared(keys, [first, head * D + D // 2], there, turned.index(2 * stage + 1), pred=wanted)
    tma.async_copy_global_to_shared(values, [first, head * D], there, value.index(stage), pred=wanted)


@gluon.jit
def _part(query, value, at: gl.constexpr, width: gl.constexpr, token):
    return warpgroup_mma(
        query.slice(at, width, dim=1), value.slice(at, width, dim=1).permute((1, 0)), token, is_async=True
    )


@gluon.jit
def _scores(query, value, turned, stage, nought):
    """Begin the scores of a tile: turned columns with keys, all others with values."""
    D: gl.constexpr = value.shape[2]
    HALF: gl.constexpr = D // 2
    left = turned.index(2 * stage).permute((1, 0))
    right = turned.index(2 * stage + 1).permute((1, 0))
    rest = value.index(stage)
    token = warpgroup_mma(query.slice(0, TURNED, dim=1), left, nought, use_acc=False, is_async=True)
    token = warpgroup_mma(query.slice(HALF, TURNED, dim=1), right, token, is_async=True)
    token = _part(query, rest, TURNED, TURNED, token)
    token = _part(query, rest, 2 * TURNED, 2 * TURNED, token)
    token = _part(query, rest, HALF + TURNED, TURNED, token)
    return _part(query, rest, HALF + 2 * TURNED, 2 * TURNED, token)


@gluon.jit
def _moved(best, score):
    """What is odds of one after a tile whose highest score is this; best + SLACK is -inf before the first."""
    score *= LOG2_E
    return gl.where(score > best + SLACK, score, best)


@gluon.jit
def _weigh(scores, base, begin, end, inner_from, inner_to, best, all_best, total, acc, odds_place, highest,
           PAIRS: gl.constexpr, ALL: gl.constexpr):  # fmt: skip
    """Odds of a tile's scores, to shared memory; returns best, all_best, total and acc with that tile considered.

    `best` is a row's score of odds one. It moves only by SLACK or more, so that acc, 128 numbers a thread, is seldom
    shrunk: until then odds are up to 2 ** SLACK. `all_best` is the same in every warp, so that all decide alike.
    `total` is kept a column: warp groups exchange nothing but their highest scores.
    """
    GROUPS: gl.constexpr = gl.num_warps() // 4
    SCORES: gl.constexpr = scores.type.layout
    SUMS: gl.constexpr = acc.type.layout
    BM: gl.constexpr = scores.shape[0]
    if (base < inner_from) | (base + BN > inner_to):
        position = base + gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES))[None, :]
        seen = (position >= begin[:, None]) & (position < end[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    mine = gl.max(scores.reshape([BM, GROUPS, BN // GROUPS]), 2)
    highest.store(mine)
    # also: no warp group reads this tile's keys any more, in whose place the odds go
    meet()
    higher = gl.convert_layout(gl.max(highest.load(PAIRS), 1), gl.SliceLayout(1, SCORES), assert_trivial=True)
    higher = _moved(best, higher)
    all_higher = _moved(all_best, gl.max(highest.load(ALL), 1))
    moves = gl.max((all_higher > all_best).to(gl.int32), 0)
    calm = gl.where(higher == float("-inf"), 0.0, higher)
    odds = gl.exp2(scores * LOG2_E - calm[:, None])
    odds_place.store(odds.to(gl.bfloat16))
    fence_async_shared()
    shrink = gl.exp2(best - calm)
    if moves != 0:
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    meet()
    return higher, all_higher, total * shrink[:, None] + odds, acc


@gluon.jit
def _sight(low, high, first, rows, GROUP: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr):
    """What the rows of a program see, from begin to end, [BM] each; the first tile of it, and how many tiles it is."""
    row = first + gl.arange(0, BM, layout=layout) // GROUP
    live = row < rows
    row = gl.where(live, row, first)
    begin = gl.load(low + row)
    end = gl.where(live, gl.load(high + row), 0)
    start = gl.min(gl.where(end > begin, begin, 2147483647), 0) // BN
    return begin, end, start, gl.maximum((gl.max(end, 0) + BN - 1) // BN - start, 0)


@gluon.jit
def _places(first, split, rows, heads, head, GROUP: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr):
    """Where the results of a program's rows go in [SPLITS, rows, heads], and which of them are live."""
    lanes = gl.arange(0, BM, layout=layout)
    row = first + lanes // GROUP
    return (split * rows.to(gl.int64) + row) * heads + head * GROUP + lanes % GROUP, row < rows


@gluon.jit
def _ask(queries, query, first, rows, heads, head, GROUP: gl.constexpr):
    """Begin to bring the rows' queries to shared memory."""
    BM: gl.constexpr = query.shape[0]
    D: gl.constexpr = query.shape[1]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    asked, _ = _places(first, 0, rows, heads, head, GROUP, BM, gl.SliceLayout(1, COPY))
    asked = gl.minimum(asked, rows.to(gl.int64) * heads - 1)  # beyond the last row: anything, and never stored
    across = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(query, queries + (asked[:, None] * D + across[None, :]))
    async_copy.commit_group()


@gluon.jit
def _fetch(queries, query, first, rows, heads, head, GROUP: gl.constexpr):
    """Bring the rows' queries to shared memory, and wait until they are there."""
    _ask(queries, query, first, rows, heads, head, GROUP)
    async_copy.wait_group(0)
    fence_async_shared()
    meet()


@gluon.jit
def _hand_over(best, total, acc, out, parts, sums, first, split, rows, heads, head,
               GROUP: gl.constexpr, SPLITS: gl.constexpr):  # fmt: skip
    """Store what the rows' odds come to, as `attention.attention_kernel` does."""
    SCORES: gl.constexpr = total.type.layout
    SUMS: gl.constexpr = acc.type.layout
    BM: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    whole = gl.sum(total, 1)
    divisor = gl.where(whole == 0.0, 1.0, whole)
    acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    place, kept = _places(first, split, rows, heads, head, GROUP, BM, gl.SliceLayout(1, SUMS))
    if SPLITS == 1:
        gl.store(out + (place[:, None] * D + columns[None, :]), acc.to(gl.bfloat16), mask=kept[:, None])
    else:
        gl.store(parts + (place[:, None] * D + columns[None, :]), acc, mask=kept[:, None])
        place, kept = _places(first, split, rows, heads, head, GROUP, BM, gl.SliceLayout(1, SCORES))
        gl.store(sums + place, gl.where(whole == 0.0, float("-inf"), best + gl.log2(divisor)), mask=kept)


@gluon.jit
def attention_hopper_kernel(
    queries, keys, values, low, high, segment, table, out, parts, sums, rows, width, heads,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, SPLITS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """As `attention.attention_kernel` with SHARES = 1, of folded queries.

    keys, values: descriptors of [pages * BN, kv_heads * D], in boxes of TURNED and of D columns of a page.
    """
    GROUPS: gl.constexpr = gl.num_warps() // 4  # warp groups, side by side over columns
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BN // GROUPS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, D // GROUPS, 16])
    # a row's numbers of both warp groups, where SCORES has the row
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [0, 0]], [], [BM, GROUPS]
    )
    ALL: gl.constexpr = gl.DistributedLinearLayout(  # every warp all of them
        [[0, 1], [32, 0]], [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]], [[0, 0], [0, 0], [0, 0]], [], [BM, GROUPS]
    )
    head = gl.program_id(1)
    split = gl.program_id(2)
    first = gl.program_id(0) * (BM // GROUP)

    query = gl.allocate_shared_memory(gl.bfloat16, [BM, D], WIDE)
    value = gl.allocate_shared_memory(gl.bfloat16, [2, BN, D], WIDE)
    turned = gl.allocate_shared_memory(gl.bfloat16, [4, BN, TURNED], WIDE)  # of two tiles, a left and a right part each
    highest = gl.allocate_shared_memory(gl.float32, [BM, GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())

    begin, end, start, tiles = _sight(low, high, first, rows, GROUP, BM, gl.SliceLayout(1, SCORES))
    inner_from = gl.max(begin, 0)
    inner_to = gl.min(end, 0)  # between the two all rows see all
    from_tile = start + tiles * split // SPLITS
    count = start + tiles * (split + 1) // SPLITS - from_tile
    pages = table + gl.load(segment + first).to(gl.int64) * width + from_tile

    best = gl.full([BM], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    all_best = gl.full([BM], float("-inf"), gl.float32, layout=gl.SliceLayout(1, ALL))
    total = gl.full([BM, BN], 0.0, gl.float32, layout=SCORES)
    acc = gl.full([BM, D], 0.0, gl.float32, layout=SUMS)
    nought = gl.full([BM, BN], 0.0, gl.float32, layout=SCORES)
    if count > 0:
        for one in gl.static_range(2):
            mbarrier.init(ready.index(one), count=1)
        fence_async_shared()
        meet()
        _bring(keys, values, gl.load(pages), head, count > 0, value, turned, 0, ready)
        _bring(keys, values, gl.load(pages + gl.minimum(1, count - 1)), head, count > 1, value, turned, 1, ready)
        _fetch(queries, query, first, rows, heads, head, GROUP)
        mbarrier.wait(ready.index(0), 0)
        scores = warpgroup_mma_wait(0, deps=[_scores(query, value, turned, 0, nought)])
        for tile in range(count - 1):
            stage = tile % 2
            base = (from_tile + tile) * BN
            odds = turned.index(2 * stage)
            best, all_best, total, acc = _weigh(
                scores, base, begin, end, inner_from, inner_to, best, all_best, total, acc, odds, highest, PAIRS, ALL
            )
            product = warpgroup_mma(odds, value.index(stage), acc, is_async=True)
            page = gl.load(pages + gl.minimum(tile + 2, count - 1))  # not sooner: the fence would wait for it
            mbarrier.wait(ready.index(1 - stage), (tile + 1) // 2 % 2)
            following = _scores(query, value, turned, 1 - stage, nought)
            acc = warpgroup_mma_wait(PARTS, deps=[product])
            meet()  # both warp groups are done with this tile's place
            _bring(keys, values, page, head, tile + 2 < count, value, turned, stage, ready)
            # what is in flight from one turn of a loop to the next makes ptxas wait after every single instruction
            scores = warpgroup_mma_wait(0, deps=[following])
        stage = (count - 1) % 2
        base = (from_tile + count - 1) * BN
        odds = turned.index(2 * stage)
        best, all_best, total, acc = _weigh(
            scores, base, begin, end, inner_from, inner_to, best, all_best, total, acc, odds, highest, PAIRS, ALL
        )
        acc = warpgroup_mma(odds, value.index(stage), acc)
    _hand_over(best, total, acc, out, parts, sums, first, split, rows, heads, head, GROUP, SPLITS)


def serves(heads: Tensor, qk_weight: Tensor, keys: Tensor, turned: int) -> bool:
    """Whether `attention` may take the place of the usual one; arguments as in `reference.attend`.

    A fact of shapes and of the chip. The interpreter, on a CPU, does not run Gluon.
    """
    kv_heads, columns = keys.shape[2:]
    group = qk_weight.shape[0] // kv_heads - 1
    values_are_keys = heads.shape[1] == qk_weight.shape[0]
    return (
        heads.device.type == "cuda"
        and chip_of(heads.device) == HOPPER
        and heads.dtype == torch.bfloat16
        and values_are_keys
        and (columns, turned) == (COLUMNS, TURNED.value)
        and BM % group == 0
    )


def splits_of(rows: int) -> int:
    """A prompt's many rows are programs enough without splits; as measured (LOG.md)."""
    return 1 if rows_class(rows) > 512 else 2


def attention(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """As `attention.attention`, of folded queries, where `serves` says so."""
    rows, heads, columns = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    require_aligned(view)
    splits = splits_of(rows)
    out = torch.empty_like(queries)
    parts, sums = parts_of(out, splits)
    launch(attention_hopper_kernel, (triton.cdiv(rows, BM // group), kv_heads, splits))(
        queries, _described(keys, TURNED.value), _described(values, columns),
        view.low, view.high, view.segment, view.table, out, parts, sums,
        rows, view.table.shape[1], heads,
        GROUP=group, D=columns, BM=BM, SPLITS=splits, WIDE=WIDE, num_warps=WARPS,
    )  # fmt: skip
    join(parts, sums, out, splits)
    return out.flatten(1)


def _described(stored: Tensor, columns: int) -> TensorDescriptor:
    """[pages, BN, kv_heads, D] in boxes of so many columns of a page. A captured launch keeps its address: that of the
    memory for keys and values never changes."""
    return TensorDescriptor.from_tensor(stored.flatten(2).flatten(0, 1), [PAGE, columns], WIDE)


def cases() -> list[KernelCase]:
    """At the model's shapes: 16 heads, 2 key heads of 512."""
    boxes = {"keys": TURNED.value, "values": COLUMNS}
    return [
        KernelCase(
            name=f"attention_hopper[{COLUMNS},{BM}x{PAGE}x{splits}]",
            kernel=attention_hopper_kernel,
            signature=dict.fromkeys(("low", "high", "segment", "table"), "*i32:16")
            | {"queries": "*bf16:16", "out": "*bf16:16", "parts": "*fp32:16", "sums": "*fp32:16"}
            | {name: f"tensordesc<bf16[{PAGE}, {columns}],{WIDE}>" for name, columns in boxes.items()}
            | {"rows": "i32:16", "width": "i32", "heads": "i32:16"},
            constants={"GROUP": 8, "D": COLUMNS, "BM": BM, "SPLITS": splits, "WIDE": WIDE},
            num_warps=WARPS,
            chips=(HOPPER,),
        )
        for splits in (1, 2)
    ]
