"""An experiment: experts' 4-bit weights by eight warps a program, against the engine's four. Needs an H100 or H200.

    python -m tests.bench.experts_eight_warps              # errors and times, on an H100 or H200
    python -m tests.bench.experts_eight_warps --compile    # registers and shared memory, without one

The engine's program has two pieces of 64 rows of weights, both decoded by one warp group. Here each of two warp groups
has a piece: half of the registers a thread, so more warps on a multiprocessor wait for one another, and what a tile
makes is stored by neighbouring threads in neighbouring columns. Compiled, not yet run.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product

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

from engine.kernels import experts_hopper as hopper
from engine.kernels.ahead_of_time import resources
from engine.kernels.choosing import GraphTimer
from engine.kernels.experts import routed
from engine.kernels.grouped import Rows
from engine.kernels.operands import FRAGMENTS, taken
from engine.kernels.routing import schedule
from engine.kernels.weights import FragmentWeight
from tests.bench.tune_experts import ACTIVE, HIDDEN, LAUNCHES, WIDTH, weight

WARPS = 8
# stages and a thread's registers at most
TRIED = {
    (True, 32): ((2, None), (3, None), (2, 64), (3, 80)),
    (True, 64): ((2, None), (2, 80), (3, None), (3, 128)),
    (True, 128): ((2, None), (2, 128), (3, 128)),
    (False, 32): ((3, None), (4, None), (2, None)),
    (False, 64): ((3, None), (4, None), (3, 64)),
    (False, 128): ((3, None), (4, None), (4, 128)),
}


@gluon.constexpr_function
def _by_thread(blocks):
    """[128 rows, blocks, 4 quarters] as a thread has them."""
    in_thread = [[8, 0, 0]] + ([[0, 1, 0]] if blocks == 2 else [])
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(in_thread, lanes, [[16, 0, 0], [32, 0, 0], [64, 0, 0]], [], [128, blocks, 4])


@gluon.constexpr_function
def _by_word(blocks):
    """The words of both pieces' blocks, one piece a warp group, as a thread has them."""
    in_thread = [[1], [2]] + ([[512]] if blocks == 2 else [])
    lanes = [[4], [8], [16], [32], [64]]
    return gl.DistributedLinearLayout(in_thread, lanes, [[128], [256], [512 * blocks]], [], [1024 * blocks])


@gluon.jit
def _values(words, scale, FORMAT: gl.constexpr, BLOCKS: gl.constexpr, acc: gl.constexpr):
    """A stage's words and scales, in shared memory -> values bfloat16 [128, 64 BLOCKS], in the order of fragments."""
    layout: gl.constexpr = _by_thread(BLOCKS)
    found = gl.reshape(words.load(_by_word(BLOCKS)), (2, BLOCKS, 4, 8, 4, 2, 2))
    found = gl.permute(found, (0, 2, 5, 3, 1, 4, 6))  # piece, warp, half, row; block, quarter, pair
    first, second = gl.split(gl.reshape(found, (128, BLOCKS, 4, 2)))
    scales = scale.permute((1, 0)).load(gl.SliceLayout(2, layout))
    both = gl.join(hopper._pair(first, scales, 0, FORMAT, layout), hopper._pair(second, scales, 1, FORMAT, layout))
    # [row, block, quarter, e, f, half, pair]
    values = gl.reshape(gl.permute(both, (0, 1, 6, 5, 4, 2, 3)), (128, 64 * BLOCKS))
    return gl.convert_layout(values, gl.DotOperandLayout(0, acc, 2), assert_trivial=True)


@gluon.jit
def _places(BM: gl.constexpr, BLOCKS: gl.constexpr):
    """Shared memory of one stage: words and scales of both pieces' blocks, and a tile of x."""
    return (
        gl.allocate_shared_memory(gl.int32, [1024 * BLOCKS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.int32, [BLOCKS, 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])),
        gl.allocate_shared_memory(gl.bfloat16, [BM, 64 * BLOCKS], gl.NVMMASharedLayout(128, 16, 2)),
    )


@gluon.jit
def _bring(stage, words, scale, between, start, BLOCKS: gl.constexpr):
    """Begin to bring BLOCKS blocks of both pieces, `between` blocks apart, from block `start` of each on."""
    at = gl.arange(0, 1024 * BLOCKS, layout=_by_word(BLOCKS))
    places = at // (512 * BLOCKS) * (between * 512) + start * 512 + at % (512 * BLOCKS)
    async_copy.async_copy_global_to_shared(stage[0], words + places, eviction_policy="evict_first")
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [BLOCKS, 8 // BLOCKS], [1, 0])
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, flat))
    row = gl.arange(0, 128, layout=gl.SliceLayout(0, flat))
    places = (row // 64 * (between * 64) + row % 64)[None, :] + ((start + block) * 64)[:, None]
    async_copy.async_copy_global_to_shared(stage[1], scale + places)


@gluon.jit
def _finish(
    acc, row_scale, order, out, matrix, first, live_rows, width,
    GATED: gl.constexpr, FORMAT: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Scale a tile's sums [128, BM], and store what they make, neighbouring columns by neighbouring threads."""
    SUMS: gl.constexpr = acc.type.layout
    if FORMAT == "nvfp4":
        row = gl.arange(0, 128, layout=gl.SliceLayout(1, SUMS))
        if GATED:
            row_scale += matrix * 2 * width + gl.program_id(1) * 64
            row = row // 64 * width + row % 64
        else:
            row_scale += matrix * width + gl.program_id(1) * 128
        acc = acc * (gl.load(row_scale + row) * 256.0)[:, None]
    else:
        acc = acc * 256.0
    hopper.meet()  # nobody reads a stage any more, whose memory this may be
    exchange = gl.allocate_shared_memory(gl.float32, [128, BM], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    exchange.store(acc)
    ROWS: gl.constexpr = 64 if GATED else 128
    STORE: gl.constexpr = gl.BlockedLayout([ROWS // 32, 1], [32, 1], [1, 8], [0, 1])
    lanes = gl.arange(0, BM, layout=gl.SliceLayout(0, STORE))
    live = (lanes < live_rows)[None, :]
    position = first + gl.where(lanes < live_rows, lanes, 0)
    n = gl.program_id(1) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
    if GATED:
        gate, up = exchange.slice(0, 64, 0).load(STORE), exchange.slice(64, 64, 0).load(STORE)
        twice_root = 1.5957691216057308  # as tiles.gelu_tanh
        gate = gate / (1.0 + gl.exp(-twice_root * (gate + 0.044715 * gate * gate * gate)))
        column = n // 32 * 32 + n // 4 % 2 * 16 + n // 2 % 2 * 8 + n // 8 % 4 * 2 + n % 2  # as tiles.column_of
        target = out + (position.to(gl.int64)[None, :] * width + column[:, None])
        gl.store(target, (gate * up).to(gl.bfloat16), mask=live)
    else:
        choice = gl.load(order + position).to(gl.int64)
        target = out + (choice[None, :] * width + n[:, None])
        gl.store(target, exchange.load(STORE).to(gl.bfloat16), mask=live)


@gluon.jit
def _multiply(
    x, words, scale, row_scale, order, out, width, blocks, matrix, first, live_rows,
    A: gl.constexpr, GATED: gl.constexpr, FORMAT: gl.constexpr, BM: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A tile of at most BM rows, from position `first` on."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])
    BK: gl.constexpr = 64 * BLOCKS
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [8, 1], [1, 0])
    stages = ()  # apart, so that the compiler sees that what is read is not what is being brought
    for _ in gl.static_range(STAGES):
        stages = stages + (_places(BM, BLOCKS),)  # type: ignore[assignment]  # noqa: RUF005
    of_matrix = width // 64
    one = matrix * 2 * of_matrix + gl.program_id(1) if GATED else matrix * of_matrix + gl.program_id(1) * 2
    between = (of_matrix if GATED else 1) * blocks  # from one piece to the other
    words += one * blocks * 512
    scale += one * blocks * 64

    lanes = gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    taken = (lanes < live_rows)[:, None]
    source = first + gl.where(lanes < live_rows, lanes, 0)
    if GATED:
        source = gl.load(order + source).to(gl.int32) // A
    count = blocks // BLOCKS
    for at in gl.static_range(STAGES - 1):  # what needs no row of x, so does not wait to know which these are
        if at < count:
            _bring(stages[at], words, scale, between, at * BLOCKS, BLOCKS)
    across = gl.arange(0, BK, layout=gl.SliceLayout(0, COPY))
    x_at = x + (source.to(gl.int64)[:, None] * (blocks * 64) + across[None, :])
    for at in gl.static_range(STAGES - 1):
        if at < count:
            async_copy.async_copy_global_to_shared(stages[at][2], x_at + at * BK, mask=taken)
        async_copy.commit_group()

    acc = gl.full([128, BM], 0.0, gl.float32, layout=SUMS)
    for turn in range(0, count, STAGES):
        for at in gl.static_range(STAGES):
            if turn + at < count:
                async_copy.wait_group(STAGES - 2)
                hopper.meet()  # all have this stage, and are done with the one before
                fence_async_shared()  # x was written by threads, and is read by the matrix instruction's own way
                to: gl.constexpr = (at + STAGES - 1) % STAGES
                ahead = turn + at + STAGES - 1
                if ahead < count:
                    _bring(stages[to], words, scale, between, ahead * BLOCKS, BLOCKS)
                    async_copy.async_copy_global_to_shared(stages[to][2], x_at + ahead * BK, mask=taken)
                async_copy.commit_group()
                values = _values(stages[at][0], stages[at][1], FORMAT, BLOCKS, SUMS)
                token = warpgroup_mma(values, stages[at][2].permute((1, 0)), acc, is_async=True)
                # not later: sums in flight at a loop's end make ptxas wait after every single instruction
                acc = warpgroup_mma_wait(0, deps=[token])
    async_copy.wait_group(0)
    _finish(acc, row_scale, order, out, matrix, first, live_rows, width, GATED, FORMAT, BM)


@gluon.jit
def eight_warps_kernel(
    x, words, scale, row_scale, order, expert, start, rows, out, width, blocks,
    A: gl.constexpr, GATED: gl.constexpr, FORMAT: gl.constexpr, BM: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """GATED: out[position] = gelu_tanh(gate(x[row])) * up(x[row]), in the order of fragments. Else
    out[choice] = weight @ x[position].

    words int32 [E, N, blocks, 512], where N is 2 * width / 64 (gate first) if GATED, else width / 64; x bfloat16
    [*, 64 * blocks], in the order of fragments.
    """
    tile = gl.program_id(0)
    live_rows = gl.load(rows + tile)
    first = gl.load(start + tile)
    matrix = gl.load(expert + tile).to(gl.int64)
    if live_rows == 0:
        return
    # half of the tile at most: then half of the products would be of rows that are not there
    if live_rows <= BM // 2:
        _multiply(
            x, words, scale, row_scale, order, out, width, blocks, matrix, first, live_rows,
            A, GATED, FORMAT, BM // 2, BLOCKS, STAGES,
        )  # fmt: skip
    else:
        _multiply(
            x, words, scale, row_scale, order, out, width, blocks, matrix, first, live_rows,
            A, GATED, FORMAT, BM, BLOCKS, STAGES,
        )  # fmt: skip


def launch(
    x: Tensor, stored: FragmentWeight, rows: Rows, out: Tensor, bm: int, *, gated: bool, how: tuple[int, int | None]
) -> Tensor:
    """As `experts_hopper.launch_fragments`."""
    _, outputs, blocks, _ = stored.words.shape
    eight_warps_kernel[(rows.tiles, outputs // 2)](
        x, stored.words, stored.scale, stored.scale if stored.row_scale is None else stored.row_scale,
        rows.order, rows.expert, rows.start, rows.rows, out, out.shape[1], blocks,
        A=ACTIVE, GATED=gated, FORMAT=stored.form, BM=bm, BLOCKS=2 - blocks % 2, STAGES=how[0], num_warps=WARPS,
        maxnreg=how[1],
    )  # fmt: skip
    return out


def usual(x: Tensor, stored: FragmentWeight, rows: Rows, out: Tensor, bm: int, *, gated: bool) -> Tensor:
    hopper.launch_fragments(x, stored, rows, out, bm, gated=gated, active=ACTIVE)
    return out


def compiled() -> None:
    """Print what each variant needs."""
    pointers = {"x": "*bf16", "words": "*i32", "scale": "*i32", "row_scale": "*fp32", "out": "*bf16"}
    indices = dict.fromkeys(("order", "expert", "start", "rows"), "*i32")
    order = eight_warps_kernel.arg_names
    for (gated, bm), tried in TRIED.items():
        for stages, registers in tried:
            constants = {"A": ACTIVE, "GATED": gated, "FORMAT": "nvfp4", "BM": bm, "BLOCKS": 2 if gated else 1}
            constants |= {"STAGES": stages}
            kinds = pointers | indices | {"width": "i32", "blocks": "i32"} | dict.fromkeys(constants, "constexpr")
            source = GluonASTSource(
                fn=eight_warps_kernel,
                signature={name: kinds[name] for name in order},
                constexprs=constants,
                attrs={(order.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "width")},
            )
            options = {"num_warps": WARPS, "maxnreg": registers}
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            used, spilled = resources(made.asm["cubin"])
            title = f"{'gated' if gated else 'plain'}, {bm} rows, {stages} stages, cap {registers}"
            needs = f"{used} registers, {spilled} bytes spilled, {made.metadata.shared} bytes of shared memory"
            print(f"{title}: {needs}", flush=True)


def measured(form: str, gated: bool, bm: int, rows: int) -> dict[str, object]:
    """Times of the engine's kernel and of each variant, in microseconds, and their distance from it."""
    stored = weight(f"{form}-fragments", 128, 2 * WIDTH if gated else HIDDEN, HIDDEN if gated else WIDTH)
    assert isinstance(stored, FragmentWeight)
    chosen = torch.stack([torch.randperm(128)[:ACTIVE] for _ in range(rows)]).cuda()
    tiles = routed(schedule(chosen, 128, bm))
    x = torch.randn(rows if gated else rows * ACTIVE, HIDDEN if gated else WIDTH, dtype=torch.bfloat16, device="cuda")
    given = taken(x, FRAGMENTS)
    assert isinstance(given, Tensor)
    time, shape = GraphTimer(), (rows * ACTIVE, WIDTH if gated else HIDDEN)
    out, other = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    took, expected = time([partial(usual, given, stored, tiles, out, bm, gated=gated)] * LAUNCHES)
    found: dict[str, object] = {"engine": round(took, 1)}
    for how in TRIED[gated, bm]:
        took, result = time([partial(launch, given, stored, tiles, other.zero_(), bm, gated=gated, how=how)] * LAUNCHES)
        error = (result.float() - expected.float()).norm() / expected.float().norm()
        found[f"{how[0]} stages, cap {how[1]}"] = (round(took, 1), f"{float(error):.1e}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compile", action="store_true", help="for sm_90, and run nothing")
    if parser.parse_args().compile:
        compiled()
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("experts_eight_warps: needs a GPU of capability 9.0", file=sys.stderr)
        return 2
    cases = []
    for (bm, rows), form, gated in product(((32, 256), (64, 512), (128, 2048)), ("nvfp4", "int4"), (True, False)):
        times = measured(form, gated, bm, rows)
        cases.append({"form": form, "gated": gated, "tile": bm, "rows": rows, "microseconds": times})
        print(form, "gate and up" if gated else "down", f"{rows} rows", times, flush=True)
    print(json.dumps({"bench": "experts_eight_warps", "cases": cases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
