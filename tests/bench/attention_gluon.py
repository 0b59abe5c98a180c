"""An experiment: attention of 512 columns for Hopper in Gluon, against the engine's. Needs a GPU of capability 9.0.

    python -m tests.bench.attention_gluon              # errors and times, on an H100 or H200
    python -m tests.bench.attention_gluon --compile    # registers and shared memory, without one

Triton runs a tile's scores, its softmax and its product with the values one after the other. Here the next tile's
scores run while odds are made: keys and values come in tiles of 32 to two places each, and two warp groups share the
rows and halve the columns, so nothing is computed twice. To become part of the engine it must be faster by a third;
then it goes into `engine/kernels`.
"""

from __future__ import annotations

import argparse
import json
import sys
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels import attention as usual
from engine.kernels.ahead_of_time import resources
from engine.kernels.choosing import GraphTimer
from engine.kernels.views import AttentionView, Segment
from engine.pages import PAGE as PAGE_LENGTH

LOG2_E = gl.constexpr(1.4426950408889634)
PAGE = gl.constexpr(PAGE_LENGTH)
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6
LAUNCHES = 10  # in one captured graph
HEADS, KV_HEADS, COLUMNS, BM, BN, WARPS = 16, 2, 512, 64, 32, 8


@gluon.jit
def _copy(smem, source, page, base, kv_heads: gl.constexpr, head, layout: gl.constexpr):
    """Begin to bring the rows of a tile, which lies in one page, to shared memory."""
    BN: gl.constexpr = smem.shape[0]
    D: gl.constexpr = smem.shape[1]
    rows = page * PAGE + base % PAGE + gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(smem, source + ((rows * kv_heads + head)[:, None] * D + columns[None, :]))


@gluon.jit
def _places(first, split, rows, heads, head, GROUP: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr):
    """Where the results of a block's rows go in [SPLITS, rows, heads], and which of them are live."""
    lanes = gl.arange(0, BM, layout=layout)
    row = first + lanes // GROUP
    return (split * rows.to(gl.int64) + row) * heads + head * GROUP + lanes % GROUP, row < rows


@gluon.jit
def attention_kernel(
    queries, keys, values, low, high, segment, table, out, parts, sums, rows, width, heads,
    kv_heads: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SPLITS: gl.constexpr,
):  # fmt: skip
    """As `engine.kernels.attention.attention_kernel` with SHARES = 1; PAGE a multiple of BN."""
    GROUPS: gl.constexpr = gl.num_warps() // 4  # warp groups, side by side over columns
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BN // GROUPS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, 256, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    block = gl.program_id(0)
    head = gl.program_id(1)
    split = gl.program_id(2)
    first = block * (BM // GROUP)

    query = gl.allocate_shared_memory(gl.bfloat16, [BM, D], WIDE)
    key = gl.allocate_shared_memory(gl.bfloat16, [2, BN, D], WIDE)
    value = gl.allocate_shared_memory(gl.bfloat16, [2, BN, D], WIDE)
    shared_odds = gl.allocate_shared_memory(gl.bfloat16, [BM, BN], gl.NVMMASharedLayout(2 * BN, 16, 2))

    lanes = gl.arange(0, BM, layout=ROWS)
    row = first + lanes // GROUP
    live = row < rows
    row = gl.where(live, row, first)
    begin = gl.load(low + row)
    end = gl.where(live, gl.load(high + row), 0)
    start = gl.min(gl.where(end > begin, begin, 2147483647), 0) // BN * BN
    stop = gl.max(end, 0)
    tiles = gl.maximum((stop - start + BN - 1) // BN, 0)
    from_tile = tiles * split // SPLITS
    last = tiles * (split + 1) // SPLITS - 1
    pages = table + gl.load(segment + first).to(gl.int64) * width

    best = gl.full([BM], float("-inf"), gl.float32, layout=ROWS)
    total = gl.full([BM], 0.0, gl.float32, layout=ROWS)
    acc = gl.full([BM, D], 0.0, gl.float32, layout=SUMS)
    nought = gl.full([BM, BN], 0.0, gl.float32, layout=SCORES)
    if last >= from_tile:
        asked, _ = _places(first, 0, rows, heads, head, GROUP, BM, gl.SliceLayout(1, COPY))
        asked = gl.minimum(asked, rows.to(gl.int64) * heads - 1)  # beyond the last row: anything, and never stored
        across = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
        async_copy.async_copy_global_to_shared(query, queries + (asked[:, None] * D + across[None, :]))
        base = start + from_tile * BN
        page = gl.load(pages + base // PAGE).to(gl.int64)
        next_base = start + gl.minimum(from_tile + 1, last) * BN
        next_page = gl.load(pages + next_base // PAGE).to(gl.int64)
        _copy(key.index(0), keys, page, base, kv_heads, head, COPY)
        async_copy.commit_group()
        _copy(key.index(1), keys, next_page, next_base, kv_heads, head, COPY)
        _copy(value.index(0), values, page, base, kv_heads, head, COPY)
        async_copy.commit_group()
        far_base = start + gl.minimum(from_tile + 2, last) * BN
        far_page = gl.load(pages + far_base // PAGE).to(gl.int64)
        async_copy.wait_group(1)
        fence_async_shared()
        meet()
        token = warpgroup_mma(query, key.index(0).permute((1, 0)), nought, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[token])
        for tile in range(from_tile, last + 1):
            at = (tile - from_tile) % 2
            async_copy.wait_group(0)  # this tile's values and the next one's keys are there
            fence_async_shared()
            meet()  # and all warps are done with what the last tile used
            following = warpgroup_mma(query, key.index(1 - at).permute((1, 0)), nought, use_acc=False, is_async=True)
            _copy(key.index(at), keys, far_page, far_base, kv_heads, head, COPY)
            _copy(value.index(1 - at), values, next_page, next_base, kv_heads, head, COPY)
            async_copy.commit_group()
            next_page, next_base = far_page, far_base
            far_base = start + gl.minimum(tile + 3, last) * BN
            far_page = gl.load(pages + far_base // PAGE).to(gl.int64)
            position = start + tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES))[None, :]
            seen = (position >= begin[:, None]) & (position < end[:, None])
            scores = gl.where(seen, scores * LOG2_E, float("-inf"))
            higher = gl.maximum(best, gl.max(scores, 1))
            calm = gl.where(higher == float("-inf"), 0.0, higher)
            odds = gl.exp2(scores - calm[:, None])
            shrink = gl.exp2(best - calm)
            total = total * shrink + gl.sum(odds, 1)
            best = higher
            shared_odds.store(odds.to(gl.bfloat16))
            fence_async_shared()
            meet()
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
            product = warpgroup_mma(shared_odds, value.index(at), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[following])
            # not later, though the next tile's odds could be made meanwhile: an accumulator that is in flight from one
            # turn of a loop to the next makes ptxas wait after every single instruction
            acc = warpgroup_mma_wait(0, deps=[product])
        async_copy.wait_group(0)
    divisor = gl.where(total == 0.0, 1.0, total)
    acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, SUMS))[:, None]
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    place, kept = _places(first, split, rows, heads, head, GROUP, BM, gl.SliceLayout(1, SUMS))
    if SPLITS == 1:
        gl.store(out + (place[:, None] * D + columns[None, :]), acc.to(gl.bfloat16), mask=kept[:, None])
    else:
        gl.store(parts + (place[:, None] * D + columns[None, :]), acc, mask=kept[:, None])
        place, kept = _places(first, split, rows, heads, head, GROUP, BM, ROWS)
        gl.store(sums + place, gl.where(total == 0.0, float("-inf"), best + gl.log2(divisor)), mask=kept)


def attention(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView, splits: int) -> Tensor:
    """As `engine.kernels.attention.attention`, for 8 query heads of 512 columns a key head."""
    rows, heads, columns = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    out = torch.empty_like(queries)
    parts = queries.new_empty((splits, *queries.shape), dtype=torch.float32)
    sums = queries.new_empty((splits, rows, heads), dtype=torch.float32)
    attention_kernel[(triton.cdiv(rows, BM // group), kv_heads, splits)](
        queries, keys, values, view.low, view.high, view.segment, view.table, out, parts, sums,
        rows, view.table.shape[1], heads,
        kv_heads=kv_heads, GROUP=group, D=columns, BM=BM, BN=BN, SPLITS=splits, num_warps=WARPS,
    )  # fmt: skip
    if splits > 1:
        count, bm = rows * heads, usual.JOIN_ELEMENTS // columns
        usual.join_kernel[(triton.cdiv(count, bm),)](parts, sums, out, count, D=columns, SPLITS=splits, BM=bm)
    return out.view(rows, heads * columns)


def inputs(rows: int, prefix: int, *, canvas: bool) -> tuple[Tensor, Tensor, Tensor, AttentionView]:
    """Random rows behind so many positions, whose pages lie anywhere."""
    total = prefix + rows
    pages = -(-total // PAGE_LENGTH)
    draw = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=draw).bfloat16()

    high = torch.full((rows,), total, device="cuda") if canvas else prefix + 1 + torch.arange(rows, device="cuda")
    nothing = torch.zeros(rows, dtype=torch.int32, device="cuda")
    view = AttentionView(
        segments=(Segment(0, rows, canvas, prefix),),
        low=nothing,
        high=high.int(),
        segment=nothing,
        table=torch.randperm(pages, device="cuda").int()[None],
        where=nothing,
    )
    stored = (pages, PAGE_LENGTH, KV_HEADS, COLUMNS)
    return noise(rows, HEADS, COLUMNS) * COLUMNS**-0.5, noise(*stored), noise(*stored), view


def compiled() -> None:
    """Print what the kernel needs."""
    pointers = dict.fromkeys(("queries", "keys", "values", "out"), "*bf16")
    pointers |= dict.fromkeys(("low", "high", "segment", "table"), "*i32") | dict.fromkeys(("parts", "sums"), "*fp32")
    constants = {"kv_heads": KV_HEADS, "GROUP": HEADS // KV_HEADS, "D": COLUMNS, "BM": BM, "BN": BN, "SPLITS": 2}
    signature = pointers | dict.fromkeys(("rows", "width", "heads"), "i32") | dict.fromkeys(constants, "constexpr")
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
    for title, rows, prefix, canvas in (
        ("canvas behind 0", 256, 0, True),
        ("canvas behind 512", 256, 512, True),
        ("canvas behind 8192", 256, 8192, True),
        ("canvas behind 32768", 256, 32768, True),
        ("prompt of 2048 behind 4096", 2048, 4096, False),
        ("prompt of 100 behind 1023", 100, 1023, False),
    ):
        given = inputs(rows, prefix, canvas=canvas)
        times: dict[str, float] = {}
        errors: dict[int, float] = {}
        times["engine"], expected = time([partial(usual.attention, *given)] * LAUNCHES)
        for splits in (1, 2, 4):
            times[f"gluon, {splits} splits"], result = time([partial(attention, *given, splits)] * LAUNCHES)
            errors[splits] = float((result.float() - expected.float()).norm() / expected.float().norm())
        found.append({"case": title, "microseconds": times, "errors": errors})
        print(title, {name: round(taken, 1) for name, taken in times.items()}, errors, flush=True)
    print(json.dumps({"bench": "attention_gluon", "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
