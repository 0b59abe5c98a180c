"""Experts with 4-bit weights on Hopper, in Gluon: what Triton's own pipeline does not do there.

A program has 64 rows of two pieces of weights (gate and up, or twice as many outputs) and a tile of rows of x. Weights
come as `fragments` lie, in one piece a stage, and are decoded straight into the registers that the matrix instruction
reads. While one matrix's products run, the other's values are decoded.

Invariant: as `grouped`: tiles of rows are the fastest grid axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
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
def _bring(words, scale, source, scale_source, start, BLOCKS: gl.constexpr):
    """Begin to bring BLOCKS blocks from block `start` on."""
    at = gl.arange(0, 512 * BLOCKS, layout=gl.BlockedLayout([4], [32], [4], [0]))
    async_copy.async_copy_global_to_shared(words, source + start * 512 + at, eviction_policy="evict_first")
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [BLOCKS, 4 // BLOCKS], [1, 0])
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, flat))
    row = gl.arange(0, 64, layout=gl.SliceLayout(0, flat))
    places = (start + block[:, None]) * 64 + row[None, :]
    async_copy.async_copy_global_to_shared(scale, scale_source + places)


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
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    BK: gl.constexpr = 64 * BLOCKS
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    stages = ()  # apart, so that the compiler sees that what is read is not what is being brought
    for _ in gl.static_range(STAGES):
        stages = (
            *stages,
            (
                gl.allocate_shared_memory(gl.int32, [512 * BLOCKS], PLAIN),
                gl.allocate_shared_memory(gl.int32, [512 * BLOCKS], PLAIN),
                gl.allocate_shared_memory(gl.int32, [BLOCKS, 64], PLAIN2),
                gl.allocate_shared_memory(gl.int32, [BLOCKS, 64], PLAIN2),
                gl.allocate_shared_memory(gl.bfloat16, [BM, BK], WIDE),
            ),
        )
    of_matrix = width // 64
    if GATED:
        one = matrix * 2 * of_matrix + gl.program_id(1)
        two = one + of_matrix
    else:
        one = matrix * of_matrix + gl.program_id(1) * 2
        two = one + 1
    words_at_one, words_at_two = words + one * blocks * 512, words + two * blocks * 512
    scale_at_one, scale_at_two = scale + one * blocks * 64, scale + two * blocks * 64

    lanes = gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    taken = lanes < live_rows
    source = first + gl.where(taken, lanes, 0)
    if GATED:
        source = gl.load(order + source).to(gl.int32)
    count = blocks // BLOCKS
    for stage in gl.static_range(STAGES - 1):  # what needs no row of x, so does not wait for which these are
        if stage < count:
            _bring(stages[stage][0], stages[stage][2], words_at_one, scale_at_one, stage * BLOCKS, BLOCKS)
            _bring(stages[stage][1], stages[stage][3], words_at_two, scale_at_two, stage * BLOCKS, BLOCKS)
    if GATED:
        source = source // A
    across = gl.arange(0, BK, layout=gl.SliceLayout(0, COPY))
    x_at = x + (source.to(gl.int64)[:, None] * (blocks * 64) + across[None, :])
    for stage in gl.static_range(STAGES - 1):
        if stage < count:
            async_copy.async_copy_global_to_shared(stages[stage][4], x_at + stage * BK, mask=taken[:, None])
        async_copy.commit_group()
    acc_one = gl.full([64, BM], 0.0, gl.float32, layout=ACC)
    acc_two = gl.full([64, BM], 0.0, gl.float32, layout=ACC)
    for turn in range(0, count, STAGES):
        for at in gl.static_range(
            STAGES
        ):  # so that a stage's place is known, and no barrier is needed to tell them apart
            if turn + at < count:
                async_copy.wait_group(STAGES - 2)
                meet()  # all have this stage, and are done with the one before
                ahead = turn + at + STAGES - 1
                to: gl.constexpr = (at + STAGES - 1) % STAGES
                if ahead < count:
                    _bring(stages[to][0], stages[to][2], words_at_one, scale_at_one, ahead * BLOCKS, BLOCKS)
                    _bring(stages[to][1], stages[to][3], words_at_two, scale_at_two, ahead * BLOCKS, BLOCKS)
                    async_copy.async_copy_global_to_shared(stages[to][4], x_at + ahead * BK, mask=taken[:, None])
                async_copy.commit_group()
                x_tile = stages[at][4].permute((1, 0))
                values_one = _values(stages[at][0], stages[at][2], FORMAT, BLOCKS, ACC)
                token_one = warpgroup_mma(values_one, x_tile, acc_one, is_async=True)
                values_two = _values(stages[at][1], stages[at][3], FORMAT, BLOCKS, ACC)
                token_two = warpgroup_mma(values_two, x_tile, acc_two, is_async=True)
                # not later: see attention
                acc_one, acc_two = warpgroup_mma_wait(0, deps=[token_one, token_two])
    async_copy.wait_group(0)

    n = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    if GATED:
        n_one = gl.program_id(1) * 64 + n
        n_two = n_one + width
        matrix_rows = matrix * 2 * width
    else:
        n_one = gl.program_id(1) * 128 + n
        n_two = n_one + 64
        matrix_rows = matrix * width
    if FORMAT == "nvfp4":
        acc_one = acc_one * (gl.load(row_scale + matrix_rows + n_one) * 256.0)[:, None]
        acc_two = acc_two * (gl.load(row_scale + matrix_rows + n_two) * 256.0)[:, None]
    else:
        acc_one, acc_two = acc_one * 256.0, acc_two * 256.0
    taken = gl.arange(0, BM, layout=gl.SliceLayout(0, ACC))
    live = taken < live_rows
    position = first + gl.where(live, taken, 0)
    if GATED:
        twice_root = 1.5957691216057308
        gate = acc_one / (1.0 + gl.exp(-twice_root * (acc_one + 0.044715 * acc_one * acc_one * acc_one)))
        column = n_one // 32 * 32 + n_one // 4 % 2 * 16 + n_one // 2 % 2 * 8 + n_one // 8 % 4 * 2 + n_one % 2
        target = out + (position.to(gl.int64)[None, :] * width + column[:, None])
        gl.store(target, (gate * acc_two).to(gl.bfloat16), mask=live[None, :])
    else:
        choice = gl.load(order + position).to(gl.int64)
        target = out + (choice[None, :] * width + n_one[:, None])
        gl.store(target, acc_one.to(gl.bfloat16), mask=live[None, :])
        gl.store(target + 64, acc_two.to(gl.bfloat16), mask=live[None, :])


# Stages of a program's pipeline and, where a cap makes room for one more program, a thread's registers; by whether
# there is a gate, and BM. The fastest of those that tests.bench.tune_experts times on an H200 (LOG.md, 2026-11-29).
TILINGS: Mapping[tuple[bool, int], tuple[int, int | None]] = {
    (True, 32): (2, 128),
    (True, 64): (2, None),
    (True, 128): (2, None),
    (False, 32): (4, None),
    (False, 64): (4, None),
    (False, 128): (4, None),
}


def launch_fragments(
    x: Tensor, weight: FragmentWeight, rows: Rows, out: Tensor, bm: int, *, gated: bool, active: int
) -> None:
    """x bfloat16 [R, K] in the order of fragments. gated: out [positions, width], in that order too, `active` choices being made by a row;
    else [choices, width]. Takes rows as a routing schedule gives them."""
    _, outputs, blocks, _ = weight.words.shape
    stages, registers = TILINGS[gated, bm]
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
    for form, (gated, bm) in product(("nvfp4", "int4"), TILINGS):
        stages, registers = TILINGS[gated, bm]
        row_scale = {"row_scale": "*fp32:16" if form == "nvfp4" else "*i32:16"}
        constants = {"A": 8, "GATED": gated, "FORMAT": form, "BM": bm, "BLOCKS": 2 if gated else 1, "STAGES": stages}
        found.append(
            KernelCase(
                name=f"experts_fragments[{form},{'gated' if gated else 'plain'},{bm},{stages}s]",
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
