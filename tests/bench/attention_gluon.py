"""An experiment: attention of 512 columns for Hopper in Gluon, against the engine's. Needs a GPU of capability 9.0.

    python -m tests.bench.attention_gluon              # errors and times, on an H100 or H200
    python -m tests.bench.attention_gluon --compile    # registers and shared memory, without one

Where values are the keys before their weight and RoPE, and RoPE turns but TURNED columns of each half, a key is
value * weight in all other columns. With queries that are multiplied by that weight beforehand (`folded`), scores need
the values and the keys' turned columns only: 640 columns of a position are read instead of 1024, by L2 and by the
tensor cores, and two tiles of 64 positions fit shared memory. They come by the bulk tensor copy engine. The next
tile's scores follow this tile's product with the values at once: its values' place is free for the tile after the next
while those scores and the next softmax run. Scores before the softmax would hide the softmax and bare the copies: both
places would be taken until the product is done. To become part of the engine it must take half of the engine's time.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
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
from engine.kernels.ahead_of_time import resources
from engine.kernels.choosing import GraphTimer
from engine.kernels.views import AttentionView, Segment
from engine.pages import PAGE as PAGE_LENGTH

LOG2_E = gl.constexpr(1.4426950408889634)
BN = gl.constexpr(PAGE_LENGTH)  # a tile is a page
TURNED = gl.constexpr(64)  # columns of each half that RoPE turns
SLACK = gl.constexpr(8.0)
PARTS = gl.constexpr(6)  # of a score's sum, each an instruction group of its own
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6
LAUNCHES = 10  # in one captured graph
HEADS, KV_HEADS, COLUMNS, BM, WARPS = 16, 2, 512, 64, 8
WIDE = gl.NVMMASharedLayout(128, 16, 2)


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
def _places(first, split, rows, heads, head, GROUP: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr):
    """Where the results of a block's rows go in [SPLITS, rows, heads], and which of them are live."""
    lanes = gl.arange(0, BM, layout=layout)
    row = first + lanes // GROUP
    return (split * rows.to(gl.int64) + row) * heads + head * GROUP + lanes % GROUP, row < rows


@gluon.jit
def attention_kernel(
    queries, keys, values, low, high, segment, table, out, parts, sums, rows, width, heads,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, SPLITS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """As `engine.kernels.attention.attention_kernel` with SHARES = 1, of folded queries.

    keys, values: descriptors of [pages * BN, kv_heads * D], in boxes of TURNED and of D columns of a page.
    """
    GROUPS: gl.constexpr = gl.num_warps() // 4  # warp groups, side by side over columns
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BN // GROUPS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, D // GROUPS, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    # a row's numbers of both warp groups, where SCORES has the row
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [0, 0]], [], [BM, GROUPS]
    )
    ALL: gl.constexpr = gl.DistributedLinearLayout(  # every warp all of them
        [[0, 1], [32, 0]], [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]], [[0, 0], [0, 0], [0, 0]], [], [BM, GROUPS]
    )
    block = gl.program_id(0)
    head = gl.program_id(1)
    split = gl.program_id(2)
    first = block * (BM // GROUP)

    query = gl.allocate_shared_memory(gl.bfloat16, [BM, D], WIDE)
    value = gl.allocate_shared_memory(gl.bfloat16, [2, BN, D], WIDE)
    turned = gl.allocate_shared_memory(gl.bfloat16, [4, BN, TURNED], WIDE)  # of two tiles, a left and a right part each
    highest = gl.allocate_shared_memory(gl.float32, [BM, GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())

    lanes = gl.arange(0, BM, layout=ROWS)
    row = first + lanes // GROUP
    live = row < rows
    row = gl.where(live, row, first)
    begin = gl.load(low + row)
    end = gl.where(live, gl.load(high + row), 0)
    start = gl.min(gl.where(end > begin, begin, 2147483647), 0) // BN
    inner_from = gl.max(begin, 0)
    inner_to = gl.min(end, 0)  # between the two all rows see all
    tiles = gl.maximum((gl.max(end, 0) + BN - 1) // BN - start, 0)
    from_tile = start + tiles * split // SPLITS
    count = start + tiles * (split + 1) // SPLITS - from_tile
    pages = table + gl.load(segment + first).to(gl.int64) * width + from_tile

    best = gl.full([BM], float("-inf"), gl.float32, layout=ROWS)
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
        asked, _ = _places(first, 0, rows, heads, head, GROUP, BM, gl.SliceLayout(1, COPY))
        asked = gl.minimum(asked, rows.to(gl.int64) * heads - 1)  # beyond the last row: anything, and never stored
        across = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
        async_copy.async_copy_global_to_shared(query, queries + (asked[:, None] * D + across[None, :]))
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
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
    whole = gl.sum(total, 1)
    divisor = gl.where(whole == 0.0, 1.0, whole)
    acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    place, kept = _places(first, split, rows, heads, head, GROUP, BM, gl.SliceLayout(1, SUMS))
    if SPLITS == 1:
        gl.store(out + (place[:, None] * D + columns[None, :]), acc.to(gl.bfloat16), mask=kept[:, None])
    else:
        gl.store(parts + (place[:, None] * D + columns[None, :]), acc, mask=kept[:, None])
        place, kept = _places(first, split, rows, heads, head, GROUP, BM, ROWS)
        gl.store(sums + place, gl.where(whole == 0.0, float("-inf"), best + gl.log2(divisor)), mask=kept)


def described(stored: Tensor, columns: int) -> TensorDescriptor:
    """[pages, BN, kv_heads, D] in boxes of so many columns of a page."""
    return TensorDescriptor.from_tensor(stored.flatten(2).flatten(0, 1), [PAGE_LENGTH, columns], WIDE)


def attention(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView, splits: int) -> Tensor:
    """As `engine.kernels.attention.attention`, of folded queries, 8 heads of 512 columns a key head."""
    rows, heads, columns = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    out = torch.empty_like(queries)
    parts = queries.new_empty((splits, *queries.shape), dtype=torch.float32)
    sums = queries.new_empty((splits, rows, heads), dtype=torch.float32)
    attention_kernel[(triton.cdiv(rows, BM // group), kv_heads, splits)](
        queries, described(keys, TURNED.value), described(values, columns),
        view.low, view.high, view.segment, view.table, out, parts, sums,
        rows, view.table.shape[1], heads,
        GROUP=group, D=columns, BM=BM, SPLITS=splits, WIDE=WIDE, num_warps=WARPS,
    )  # fmt: skip
    if splits > 1:
        count, bm = rows * heads, usual.JOIN_ELEMENTS // columns
        usual.join_kernel[(triton.cdiv(count, bm),)](parts, sums, out, count, D=columns, SPLITS=splits, BM=bm)
    return out.view(rows, heads * columns)


def turned_columns() -> Tensor:
    """Which of a head's columns RoPE turns. [D] bool"""
    return torch.arange(COLUMNS, device="cuda") % (COLUMNS // 2) < TURNED.value


@dataclass(frozen=True, kw_only=True)
class Case:
    title: str
    rows: int
    prefix: int
    canvas: bool
    window: int = 0  # how far a row sees back; 0 is to the first position
    steep: float = 1.0  # how far a row's scores are apart; at 1 hardly any tile but the first moves the best


CASES = (
    Case(title="canvas behind 0", rows=256, prefix=0, canvas=True),
    Case(title="canvas behind 512", rows=256, prefix=512, canvas=True),
    Case(title="canvas behind 512, steep", rows=256, prefix=512, canvas=True, steep=12.0),
    Case(title="canvas behind 8192", rows=256, prefix=8192, canvas=True),
    Case(title="canvas behind 32768", rows=256, prefix=32768, canvas=True),
    Case(title="prompt of 2048 behind 4096", rows=2048, prefix=4096, canvas=False),
    Case(title="prompt of 100 behind 1023", rows=100, prefix=1023, canvas=False),
    Case(title="prompt of 100 behind 1023, window of 300", rows=100, prefix=1023, canvas=False, window=300, steep=4.0),
)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, AttentionView]:
    """Random rows behind a prefix whose pages lie anywhere: queries, the same folded, keys, values, view."""
    rows, prefix, canvas, window = case.rows, case.prefix, case.canvas, case.window
    total = prefix + rows
    pages = -(-total // PAGE_LENGTH)
    draw = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=draw).bfloat16()

    each = prefix + torch.arange(rows, device="cuda")
    high = torch.full_like(each, total) if canvas else each + 1
    low = (each + 1 - window).clamp(min=0) if window else torch.zeros_like(each)
    nothing = torch.zeros(rows, dtype=torch.int32, device="cuda")
    view = AttentionView(
        segments=(Segment(0, rows, canvas, prefix),),
        low=low.int(),
        high=high.int(),
        segment=nothing,
        table=torch.randperm(pages, device="cuda").int()[None],
        where=nothing,
    )
    values = noise(pages, PAGE_LENGTH, KV_HEADS, COLUMNS)
    weight = 0.5 + torch.rand(COLUMNS, device="cuda", generator=draw)
    turned = turned_columns()
    keys = torch.where(turned, noise(*values.shape), (values * weight).bfloat16())
    queries = noise(rows, HEADS, COLUMNS) * (case.steep * COLUMNS**-0.5)
    folded = torch.where(turned, queries, (queries * weight).bfloat16())
    return queries, folded, keys, values, view


def exact(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """In float32, with all scores at once."""
    rows, heads, columns = queries.shape
    group = heads // keys.shape[2]
    pages = view.table[0].long()
    key, value = (x[pages].flatten(0, 1).float().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("rhd,phd->hrp", queries.float(), key)
    position = torch.arange(key.shape[0], device=key.device)
    seen = (position >= view.low[:, None]) & (position < view.high[:, None])
    odds = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hrp,phd->rhd", odds, value).reshape(rows, heads * columns)


def apart(result: Tensor, expected: Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def measured(case: Case, time: GraphTimer) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds, and how far results are apart: from the engine's, and in small cases from exact ones, of plain
    queries and of folded ones, which shows the kernel without what folding rounds."""
    queries, folded, keys, values, view = inputs(case)
    time_of, apart_of = {}, {}
    time_of["engine"], expected = time([partial(usual.attention, queries, keys, values, view)] * LAUNCHES)
    small = case.rows * case.prefix < 1 << 18
    if small:
        truth = exact(queries, keys, values, view)
        folded_truth = exact(folded, torch.where(turned_columns(), keys, values), values, view)
        apart_of["engine, of exact"] = apart(expected, truth)
    for splits in (1, 2, 4):
        name = f"gluon, {splits} splits"
        time_of[name], result = time([partial(attention, folded, keys, values, view, splits)] * LAUNCHES)
        apart_of[name] = apart(result, expected)
        if small:
            apart_of[f"{name}, of exact"] = apart(result, truth)
            apart_of[f"{name}, of exact folded"] = apart(result, folded_truth)
    return time_of, apart_of


def compiled() -> None:
    """Print what the kernel needs."""
    pointers = dict.fromkeys(("queries", "out"), "*bf16")
    pointers |= dict.fromkeys(("low", "high", "segment", "table"), "*i32") | dict.fromkeys(("parts", "sums"), "*fp32")
    boxes = {"keys": TURNED.value, "values": COLUMNS}
    constants = {"GROUP": HEADS // KV_HEADS, "D": COLUMNS, "BM": BM, "SPLITS": 2, "WIDE": WIDE}
    signature = pointers | {name: f"tensordesc<bf16[{PAGE_LENGTH}, {width}],{WIDE}>" for name, width in boxes.items()}
    signature |= dict.fromkeys(("rows", "width", "heads"), "i32") | dict.fromkeys(constants, "constexpr")
    order = attention_kernel.arg_names
    source = GluonASTSource(
        fn=attention_kernel,
        signature={name: signature[name] for name in order},
        constexprs=constants,
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "rows", "heads")},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    registers, spilled = resources(made.asm["cubin"])
    print(f"{registers} registers, {spilled} bytes spilled, {made.metadata.shared} bytes of shared memory")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compile", action="store_true", help="for sm_90, and run nothing")
    if parser.parse_args().compile:
        compiled()
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("attention_gluon: needs a GPU of capability 9.0", file=sys.stderr)
        return 2
    time, found = GraphTimer(), []
    for case in CASES:
        times, errors = measured(case, time)
        found.append({"case": case.title, "microseconds": times, "errors": errors})
        print(case.title, {name: round(taken, 1) for name, taken in times.items()})
        print("    ", {name: float(f"{error:.1e}") for name, error in errors.items()}, flush=True)
    print(json.dumps({"bench": "attention_gluon", "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
