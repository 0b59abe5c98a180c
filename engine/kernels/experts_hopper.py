"""Experts with 4-bit weights on Hopper, in Gluon: what Triton's own pipeline does not do there.

A program has 64 rows of two pieces of weights (gate and up, or twice as many outputs) and a tile of rows of x. Weights
come as `fragments` lie, in one piece a stage, and are decoded straight into the registers that the matrix instruction
reads. While one matrix's products run, the other's values are decoded.

Invariant: as `grouped`: tiles of rows are the fastest grid axis.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import HOPPER
from engine.kernels.grouped import Rows
from engine.kernels.launching import launch
from engine.kernels.weights import FragmentWeight

WARPS = 4  # one warp group
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6

# A scale twice in a register, as a bfloat16 times 2^118: five bits of exponent, whose upper three are all ones.
_NVFP4_SCALE = gl.constexpr("""{
.reg .b32 s;
prmt.b32 s, $1, 0, $2; mad.lo.u32 $0, s, 16, 0x70007000;
}""")
# The three bits under the sign are e2m1's, which makes 2^-126 of its value: with the scale, 2^-8 of what is meant.
_NVFP4_VALUES = gl.constexpr("""{
.reg .b32 s, v0, v1, v2, v3, nought;
mov.b32 nought, 0x80008000;
and.b32 s, $8, 0x81C081C0; fma.rn.bf16x2 v0, s, $9, nought;
shf.r.wrap.b32 s, $8, $8, 3; and.b32 s, s, 0x81C081C0; fma.rn.bf16x2 v1, s, $9, nought;
shf.r.wrap.b32 s, $8, $8, 6; and.b32 s, s, 0x81C081C0; fma.rn.bf16x2 v2, s, $9, nought;
and.b32 s, $8, 0x001B001B; mul.lo.u32 s, s, 0x1084; and.b32 s, s, 0x81C081C0; fma.rn.bf16x2 v3, s, $9, nought;
mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1; mov.b32 {$4,$5}, v2; mov.b32 {$6,$7}, v3;
}""")
# A scale times 2^122, twice in a register.
_INT4_SCALE = gl.constexpr("""{
prmt.b32 $0, $1, 0, $2;
}""")
# A nibble is 2^-130 of itself; with the scale, and less eight times the scale, in one step: rounded once.
_INT4_VALUES = gl.constexpr("""{
.reg .b32 s, less, v0, v1, v2, v3, nought;
mov.b32 nought, 0x80008000; mov.b32 s, 0x80408040; fma.rn.bf16x2 less, $9, s, nought;
and.b32 s, $8, 0x00780078; fma.rn.bf16x2 v0, s, $9, less;
shr.b32 s, $8, 4; and.b32 s, s, 0x00780078; fma.rn.bf16x2 v1, s, $9, less;
shr.b32 s, $8, 8; and.b32 s, s, 0x00780078; fma.rn.bf16x2 v2, s, $9, less;
shf.r.wrap.b32 s, $8, $8, 12; and.b32 s, s, 0x00780078; fma.rn.bf16x2 v3, s, $9, less;
mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1; mov.b32 {$4,$5}, v2; mov.b32 {$6,$7}, v3;
}""")


@gluon.constexpr_function
def _by_thread(blocks):
    """[64 rows, blocks, 4 quarters] as a thread has them."""
    in_thread = [[8, 0, 0]] + ([[0, 1, 0]] if blocks == 2 else [])
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(in_thread, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, blocks, 4])


@gluon.jit
def _factor(scale, pair: gl.constexpr, FORMAT: gl.constexpr, layout: gl.constexpr):
    """The factors of a pair's words [64, blocks, 4]: int32, two bfloat16 each. scale int32 [64, blocks]."""
    quarter = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    if FORMAT == "nvfp4":  # one of four bytes: two quarters of a pair share a scale
        taken = 0x4040 + (2 * pair + quarter // 2) * 0x0101
    else:  # one half of the word
        taken = quarter * 0 + (0x1010 + pair * 0x2222)
    asm: gl.constexpr = _NVFP4_SCALE if FORMAT == "nvfp4" else _INT4_SCALE
    given = [gl.expand_dims(scale, 2), gl.expand_dims(gl.expand_dims(taken, 0), 1)]
    return gl.inline_asm_elementwise(asm, "=r,r,r", given, gl.int32, is_pure=True, pack=1)


@gluon.jit
def _pair(words, scale, pair: gl.constexpr, FORMAT: gl.constexpr, layout: gl.constexpr):
    """Words [64, blocks, 4] of one pair -> values bfloat16 [64, blocks, 4, e, f, half]."""
    words = gl.convert_layout(words, layout, assert_trivial=True)
    asm: gl.constexpr = _NVFP4_VALUES if FORMAT == "nvfp4" else _INT4_VALUES
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        asm,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [words, _factor(scale, pair, FORMAT, layout)],
        (gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    return gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))


@gluon.jit
def _values(words, scale, FORMAT: gl.constexpr, BLOCKS: gl.constexpr, acc: gl.constexpr):
    """A stage's words and scales, in shared memory -> values bfloat16 [64, 64 BLOCKS], in the order of fragments."""
    layout: gl.constexpr = _by_thread(BLOCKS)
    found = words.load(gl.BlockedLayout([4], [32], [4], [0]))
    found = gl.permute(
        gl.reshape(found, (BLOCKS, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5)
    )  # warp, half, row, block, quarter
    first, second = gl.split(gl.reshape(found, (64, BLOCKS, 4, 2)))
    scales = scale.permute((1, 0)).load(gl.SliceLayout(2, layout))
    both = gl.join(_pair(first, scales, 0, FORMAT, layout), _pair(second, scales, 1, FORMAT, layout))
    # [row, block, quarter, e, f, half, pair]
    values = gl.reshape(gl.permute(both, (0, 1, 6, 5, 4, 2, 3)), (64, 64 * BLOCKS))
    return gl.convert_layout(values, gl.DotOperandLayout(0, acc, 2), assert_trivial=True)


@gluon.jit
def _places(BM: gl.constexpr, BLOCKS: gl.constexpr):
    """Shared memory of one stage: words and scales of both matrices' blocks, and a tile of x."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    by_block: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return (
        gl.allocate_shared_memory(gl.int32, [512 * BLOCKS], plain),
        gl.allocate_shared_memory(gl.int32, [BLOCKS, 64], by_block),
        gl.allocate_shared_memory(gl.int32, [512 * BLOCKS], plain),
        gl.allocate_shared_memory(gl.int32, [BLOCKS, 64], by_block),
        gl.allocate_shared_memory(gl.bfloat16, [BM, 64 * BLOCKS], gl.NVMMASharedLayout(128, 16, 2)),
    )


@gluon.jit
def _bring(words, scale, source, scale_source, start, BLOCKS: gl.constexpr):
    """Begin to bring BLOCKS blocks of one matrix from block `start` on."""
    at = gl.arange(0, 512 * BLOCKS, layout=gl.BlockedLayout([4], [32], [4], [0]))
    async_copy.async_copy_global_to_shared(words, source + start * 512 + at, eviction_policy="evict_first")
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [BLOCKS, 4 // BLOCKS], [1, 0])
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, flat))
    row = gl.arange(0, 64, layout=gl.SliceLayout(0, flat))
    places = (start + block[:, None]) * 64 + row[None, :]
    async_copy.async_copy_global_to_shared(scale, scale_source + places)


@gluon.jit
def _bring_both(stage, words_one, scale_one, words_two, scale_two, start, BLOCKS: gl.constexpr):
    _bring(stage[0], stage[1], words_one, scale_one, start, BLOCKS)
    _bring(stage[2], stage[3], words_two, scale_two, start, BLOCKS)


@gluon.jit
def _finish(
    one, two, row_scale, order, out, matrix, first, live_rows, width,
    GATED: gl.constexpr, FORMAT: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Scale a tile's sums [64, BM], and store what they make. Its columns are neighbours in memory, but lie in eight
    threads: they change hands in shared memory, so that a thread stores 8 at a time."""
    ACC: gl.constexpr = one.type.layout
    n = gl.program_id(1) * (64 if GATED else 128) + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    other = width if GATED else 64  # rows from one piece to the other
    if FORMAT == "nvfp4":
        scales = row_scale + matrix * (2 * width if GATED else width) + n
        one = one * (gl.load(scales) * 256.0)[:, None]
        two = two * (gl.load(scales + other) * 256.0)[:, None]
    else:
        one, two = one * 256.0, two * 256.0
    meet()  # nobody reads a stage any more, whose memory this may be
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    lanes = gl.arange(0, BM, layout=gl.SliceLayout(0, STORE))
    live = lanes < live_rows
    position = first + gl.where(live, lanes, 0)
    at = gl.program_id(1) * (64 if GATED else 128) + gl.arange(0, 64, layout=gl.SliceLayout(1, STORE))
    if GATED:
        twice_root = 1.5957691216057308  # as tiles.gelu_tanh
        gate = one / (1.0 + gl.exp(-twice_root * (one + 0.044715 * one * one * one)))
        made = _exchange(_in_order(gate * two), STORE)
        gl.store(out + (position.to(gl.int64)[None, :] * width + at[:, None]), made, mask=live[None, :])
    else:
        choice = gl.load(order + position).to(gl.int64)
        target = out + (choice[None, :] * width + at[:, None])
        gl.store(target, _exchange(one, STORE), mask=live[None, :])
        gl.store(target + other, _exchange(two, STORE), mask=live[None, :])


@gluon.jit
def _in_order(made):
    """[64, BM] with rows where `tiles.column_of` puts them."""
    BM: gl.constexpr = made.shape[1]
    made = made.reshape([2, 2, 2, 2, 2, 2, BM])  # a row's bits, the highest first: 5 4 3 2 1 0
    return made.permute((0, 3, 4, 1, 2, 5, 6)).reshape([64, BM])


@gluon.jit
def _exchange(sums, layout: gl.constexpr):
    """float32 [64, BM] -> bfloat16 in another layout."""
    BM: gl.constexpr = sums.shape[1]
    between = gl.allocate_shared_memory(gl.bfloat16, [64, BM], gl.NVMMASharedLayout(128, 16, 2, transposed=True))
    between.store(sums.to(gl.bfloat16))
    meet()
    return between.load(layout)


@gluon.jit
def _multiply(
    x, words, scale, row_scale, order, out, width, blocks, matrix, first, live_rows,
    A: gl.constexpr, GATED: gl.constexpr, FORMAT: gl.constexpr, BM: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A tile of at most BM rows, from position `first` on."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    BK: gl.constexpr = 64 * BLOCKS
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])
    stages = ()  # apart, so that the compiler sees that what is read is not what is being brought
    for _ in gl.static_range(STAGES):
        stages = stages + (_places(BM, BLOCKS),)  # type: ignore[assignment]  # noqa: RUF005
    of_matrix = width // 64
    one = matrix * 2 * of_matrix + gl.program_id(1) if GATED else matrix * of_matrix + gl.program_id(1) * 2
    two = one + (of_matrix if GATED else 1)
    words_one, words_two = words + one * blocks * 512, words + two * blocks * 512
    scale_one, scale_two = scale + one * blocks * 64, scale + two * blocks * 64

    lanes = gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    taken = (lanes < live_rows)[:, None]
    source = first + gl.where(lanes < live_rows, lanes, 0)
    if GATED:
        source = gl.load(order + source).to(gl.int32) // A
    count = blocks // BLOCKS
    for at in gl.static_range(STAGES - 1):  # what needs no row of x, so does not wait to know which these are
        if at < count:
            _bring_both(stages[at], words_one, scale_one, words_two, scale_two, at * BLOCKS, BLOCKS)
    across = gl.arange(0, BK, layout=gl.SliceLayout(0, COPY))
    x_at = x + (source.to(gl.int64)[:, None] * (blocks * 64) + across[None, :])
    for at in gl.static_range(STAGES - 1):
        if at < count:
            async_copy.async_copy_global_to_shared(stages[at][4], x_at + at * BK, mask=taken)
        async_copy.commit_group()

    acc_one = gl.full([64, BM], 0.0, gl.float32, layout=ACC)
    acc_two = gl.full([64, BM], 0.0, gl.float32, layout=ACC)
    for turn in range(0, count, STAGES):
        for at in gl.static_range(STAGES):
            if turn + at < count:
                async_copy.wait_group(STAGES - 2)
                meet()  # all have this stage, and are done with the one before
                fence_async_shared()  # x was written by threads, and is read by the matrix instruction's own way
                to: gl.constexpr = (at + STAGES - 1) % STAGES
                ahead = turn + at + STAGES - 1
                if ahead < count:
                    _bring_both(stages[to], words_one, scale_one, words_two, scale_two, ahead * BLOCKS, BLOCKS)
                    async_copy.async_copy_global_to_shared(stages[to][4], x_at + ahead * BK, mask=taken)
                async_copy.commit_group()
                x_tile = stages[at][4].permute((1, 0))  # type: ignore[var-annotated]
                values_one = _values(stages[at][0], stages[at][1], FORMAT, BLOCKS, ACC)
                token_one = warpgroup_mma(values_one, x_tile, acc_one, is_async=True)
                values_two = _values(stages[at][2], stages[at][3], FORMAT, BLOCKS, ACC)
                token_two = warpgroup_mma(values_two, x_tile, acc_two, is_async=True)
                # not later: sums in flight at a loop's end make ptxas wait after every single instruction
                acc_one, acc_two = warpgroup_mma_wait(0, deps=[token_one, token_two])
    async_copy.wait_group(0)
    _finish(acc_one, acc_two, row_scale, order, out, matrix, first, live_rows, width, GATED, FORMAT, BM)


@gluon.jit
def fragments_kernel(
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


# Stages of a program's pipeline and, where a cap makes room for one more program, a thread's registers; by format,
# whether there is a gate, and BM. The fastest of those that tests.bench.tune_experts times on an H200 (LOG.md).
_EITHER: Mapping[tuple[bool, int], tuple[int, int | None]] = {
    (True, 32): (2, 128),
    (True, 64): (2, 128),
    (True, 128): (2, None),
    (False, 32): (3, None),
    (False, 64): (3, 128),
    (False, 128): (4, None),
}
TILINGS = {(form, *sort): tiling for form in ("nvfp4", "int4") for sort, tiling in _EITHER.items()}
TILINGS["int4", True, 64] = (2, 168)


def launch_fragments(
    x: Tensor, weight: FragmentWeight, rows: Rows, out: Tensor, bm: int, *, gated: bool, active: int
) -> None:
    """x bfloat16 [R, K] in the order of fragments. gated: out [positions, width], in that order too, `active` choices
    being made by a row; else [choices, width]. Rows as a routing schedule gives them."""
    _, outputs, blocks, _ = weight.words.shape
    stages, registers = TILINGS[weight.form, gated, bm]
    launch(fragments_kernel, (rows.tiles, outputs // 2))(
        x, weight.words, weight.scale, weight.scale if weight.row_scale is None else weight.row_scale,
        rows.order, rows.expert, rows.start, rows.rows, out, out.shape[1], blocks,
        A=active, GATED=gated, FORMAT=weight.form, BM=bm, BLOCKS=2 - blocks % 2, STAGES=stages, num_warps=WARPS,
        maxnreg=registers,
    )  # fmt: skip


def cases() -> list[KernelCase]:
    """At the model's shapes: gate and up [1408, 2816], down [2816, 704]."""
    pointers = {"x": "*bf16:16", "words": "*i32:16", "scale": "*i32:16"}
    indices = dict.fromkeys(("order", "expert", "start", "rows"), "*i32")
    sizes = {"out": "*bf16:16", "width": "i32:16", "blocks": "i32"}
    found = []
    for (form, gated, bm), (stages, registers) in TILINGS.items():
        row_scale = {"row_scale": "*fp32:16" if form == "nvfp4" else "*i32:16"}
        constants = {"A": 8, "GATED": gated, "FORMAT": form, "BM": bm, "BLOCKS": 2 if gated else 1, "STAGES": stages}
        found.append(
            KernelCase(
                name=f"experts_hopper[{form},{'gated' if gated else 'plain'},{bm},{stages}s]",
                kernel=fragments_kernel,
                signature=pointers | row_scale | indices | sizes,
                constants=constants,
                num_warps=WARPS,
                num_stages=3,
                most_registers=registers,
                chips=(HOPPER,),
            )
        )
    return found
