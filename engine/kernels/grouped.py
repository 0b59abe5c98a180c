"""The two matmul kernels, over tiles of rows that each use one matrix of a stack: with GeGLU, and plain.

`experts` launches them over a routing schedule; `linears` over consecutive rows and a single matrix, whose columns it
may split among programs. Says also which tile sizes to use. Knows weights only as pointers and a format.

Invariant: tiles of rows are the fastest grid axis, so the tiles that share a piece of weights run side by side and
DRAM reads it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import SHARED_LIMIT, chip_of
from engine.kernels.launching import launch
from engine.kernels.tiles import accumulate, gelu_tanh, in_order, ordered, rounded, row_factor, row_of, x_tile
from engine.kernels.weights import Fp8Weight, Int4Weight, Nvfp4Weight, Weight, shape

FORMATS = ("plain", "fp8", "e4m3", "nvfp4", "int4")  # of weights; e4m3 is fp8 whose rows of x are 8 bit too
# What one program should need: two fit a multiprocessor of 227 KiB, so that one computes while the other waits.
SHARED_AIM = 98304
ROW_TILES = (32, 64, 128)  # 16 would suit only fewer rows than a canvas has, and gain little there
BITS = {"plain": 16, "fp8": 8, "e4m3": 8, "nvfp4": 4, "int4": 4}
E4M3_CHIPS = (89, 90, 100, 120, 121)  # whose matrix units multiply 8-bit floats
FOUR_BIT = ("nvfp4", "int4")
CLASSES = (256, 512, 1024)  # rows
BLOCK = 64  # columns of a quantised weight that are decoded together; a 4-bit format's scales of them fill a word


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of one program's tile: BM rows of x, BN of the weights, BK columns at a time."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    registers: int | None = None  # a thread's, at most; None: as many as it wants

    @property
    def constants(self) -> dict[str, int]:
        return {"BM": self.BM, "BN": self.BN, "BK": self.BK}

    def divides(self, form: str, width: int) -> bool:
        """Whether the kernel may leave out the test for the last columns."""
        return width % self.BK == 0


# BN, BK, warps, stages and, where a cap makes room for one more program, registers: the fastest of those that
# tests.bench.tune_experts times, at the model's sizes on an H200 (LOG.md, 2026-11-29). By format, GeGLU or not, and BM.
HOPPER: Mapping[tuple[str, bool, int], tuple[int, int, int, int, int | None]] = {
    ("plain", True, 64): (64, 64, 4, 3, None),
    ("plain", True, 128): (128, 64, 8, 4, None),
    ("e4m3", True, 32): (64, 128, 4, 3, None),
    ("e4m3", True, 64): (64, 128, 4, 3, None),
    ("e4m3", True, 128): (64, 128, 4, 3, None),
    ("e4m3", False, 32): (64, 128, 4, 4, None),
    ("e4m3", False, 64): (64, 64, 4, 6, None),
    ("e4m3", False, 128): (128, 64, 4, 5, None),
    ("nvfp4", True, 32): (64, 128, 4, 3, 128),
    ("nvfp4", True, 64): (64, 128, 4, 3, 168),
    ("nvfp4", True, 128): (64, 64, 4, 2, None),
    ("int4", True, 32): (64, 128, 4, 3, 128),
    ("int4", True, 64): (64, 128, 4, 3, 168),
    ("int4", True, 128): (64, 64, 4, 2, None),
}


def tiling(form: str, bm: int, width: int, *, gated: bool, chip: int) -> Tiling:
    """The tile for a format, BM rows and a weight of `width` columns, on a chip such as 90.

    On Hopper as measured, where BK divides the width or nothing is decoded. Else by rule. BN is 64: the smallest that
    Hopper's matrix instruction takes, exact for 704 = 11 * 64 and 2816 = 44 * 64, and small enough that 128 experts
    give 1408 programs and more. Without GeGLU there is one matrix to read instead of two, and BN is 128 so that a
    program has as many bytes in flight. BK is 64 (for plain weights 128 bytes a row: a whole cache line); 128 for
    quantised ones where that divides, which halves what a loop costs beside decoding, but not from 64 rows on, where
    decoding 128 columns at a time runs out of registers and there is arithmetic enough to wait behind. As many stages
    as the aim leaves room for, of 2 to 4: beyond that there are more bytes in flight than the latency of DRAM needs.
    Four warps: that is one matrix instruction's, and `tiles.row_of` counts on it; where nothing is decoded, nothing
    counts on it, and there are eight for the sums of 128 rows.
    """
    measured = HOPPER.get((form, gated, bm)) if chip == 90 else None
    if measured and (width % measured[1] == 0 or form == "e4m3"):  # of decoded columns none may be missing
        bn, bk, warps, stages, registers = measured
        return Tiling(BM=bm, BN=bn, BK=bk, warps=warps, stages=stages, registers=registers)
    bn = 64 if gated else 128
    bk = 128 if form != "plain" and (bm <= 32 or form == "e4m3") and width % 128 == 0 else 64
    matrices = 2 if gated else 1
    stage = (
        matrices * bn * bk * BITS[form] // 8
        + bm * bk * (1 if form == "e4m3" else 2)
        + (matrices * bn * bk // 8 if form in FOUR_BIT else 0)
    )
    warps = 8 if bm == 128 and form in ("plain", "e4m3") else 4
    return Tiling(BM=bm, BN=bn, BK=bk, warps=warps, stages=max(2, min(4, SHARED_AIM // stage)))


def rows_class(rows: int) -> int:
    """Numbers of rows that are multiplied in the same way: those of a canvas, of a canvas and a commit, of more."""
    return next((most for most in CLASSES if rows <= most), CLASSES[-1])


def row_tile(rows: int, experts: int) -> int:
    """BM for `rows` rows spread over `experts` matrices: the smallest that holds the average with half as much again,
    because a second tile of an expert decodes its weights a second time."""
    wanted = rows * 3 // (2 * experts)
    return next((tile for tile in ROW_TILES if tile >= wanted), ROW_TILES[-1])


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight as the kernels take it. Pointers a format does not have are its values again."""

    form: str
    values: Tensor
    scale: Tensor
    row_scale: Tensor
    out: int  # rows of one matrix
    width: int  # columns of one matrix
    experts: int


def stored(weight: Weight, *, eight_bit: bool = False) -> Stored:
    """weight [out, in] or [E, out, in], contiguous; what is decoded is handed over as int32. `eight_bit`: of an fp8
    weight, to be multiplied with rows of 8 bit. ValueError if `in` of a quantised weight does not divide by BLOCK."""
    *stack, out, width = shape(weight)
    if not isinstance(weight, Tensor) and width % BLOCK:
        raise ValueError(f"a quantised weight of {width} columns does not divide by {BLOCK}")
    match weight:
        case Tensor():
            form, values, scale, row_scale = "plain", weight, weight, weight
        case Fp8Weight(values, row_scale):
            form, values = ("e4m3", values) if eight_bit else ("fp8", values.view(torch.int32))
            scale = values
        case Nvfp4Weight(values, scale, row_scale):
            form = "nvfp4"
        case Int4Weight(values, scale):
            form, row_scale = "int4", values.view(torch.int32)
    if form in FOUR_BIT:
        values, scale = values.view(torch.int32), scale.view(torch.int32)
    experts = stack[0] if stack else 1
    return Stored(form=form, values=values, scale=scale, row_scale=row_scale, out=out, width=width, experts=experts)


@triton.jit
def _tile_rows(order, expert, start, rows, count, BM: tl.constexpr, ROUTED: tl.constexpr):
    """This tile's matrix, sorted positions, choices and which of them are live; a dead one is the tile's first."""
    tile = tl.program_id(0)
    lanes = tl.arange(0, BM)
    if ROUTED:
        first = tl.load(start + tile)
        live = lanes < tl.load(rows + tile)
        position = first + tl.where(live, lanes, 0)
        matrix = tl.load(expert + tile).to(tl.int64)
        choice = tl.load(order + position)
    else:
        live = tile * BM + lanes < count
        position = tl.where(live, tile * BM + lanes, 0)
        matrix = tile.to(tl.int64) * 0
        choice = position
    return matrix, position.to(tl.int64), choice.to(tl.int64), live


@triton.jit
def gated_kernel(
    x, x_scale, weight, scale, row_scale, order, expert, start, rows, hidden, count, width, K, A: tl.constexpr, FORMAT:
    tl.constexpr, FOLLOWING: tl.constexpr, FOLLOWING_BK: tl.constexpr, ROUTED: tl.constexpr, EVEN_K: tl.constexpr, BM:
    tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden[position] = gelu_tanh(gate(x[row])) * up(x[row]); weight [E, 2 * width, K], gate rows first. x_scale
    float32, one a row, is read if the format is e4m3."""
    if ROUTED:
        if tl.load(rows + tl.program_id(0)) == 0:
            return
    matrix, position, choice, live = _tile_rows(order, expert, start, rows, count, BM, ROUTED)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    gate_rows = matrix * 2 * width + tl.minimum(n, width - 1)
    up_rows = gate_rows + width
    gate = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for k in range(0, K, BK):
        tile = x_tile(x, choice // A, k, K, BK, EVEN_K)
        gate = accumulate(gate, tile, weight, scale, gate_rows, k, K, FORMAT, BK, EVEN_K)
        up = accumulate(up, tile, weight, scale, up_rows, k, K, FORMAT, BK, EVEN_K)
    gate_rows = tl.program_id(1) * BN + row_of(tl.arange(0, BN), FORMAT)
    gate_rows = matrix * 2 * width + tl.minimum(gate_rows, width - 1)
    gate *= row_factor(row_scale, gate_rows, FORMAT)
    up *= row_factor(row_scale, gate_rows + width, FORMAT)
    if FORMAT == "e4m3":
        factor = tl.load(x_scale + choice // A)[None, :]
        gate, up = gate * factor, up * factor
    made = rounded(gelu_tanh(gate) * up, hidden.dtype.element_ty)
    out = hidden + position[None, :] * width + n[:, None]
    tl.store(out, in_order(made, FORMAT, FOLLOWING, FOLLOWING_BK), mask=live[None, :] & (n < width)[:, None])


@triton.jit
def matmul_kernel(
    x, x_scale, weight, scale, row_scale, order, expert, start, rows, out, count, width, K, span,
    FORMAT: tl.constexpr, ROUTED: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[choice] = weight @ x[position]; weight [E, width, K]. SPLIT: out is float32 [parts, count, width], and each
    part the product over `span` columns."""
    if ROUTED:
        if tl.load(rows + tl.program_id(0)) == 0:
            return
    matrix, position, choice, live = _tile_rows(order, expert, start, rows, count, BM, ROUTED)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    weight_rows = matrix * width + tl.minimum(n, width - 1)
    acc = tl.zeros((BN, BM), tl.float32)
    first, last = 0, K
    if SPLIT:
        first = tl.program_id(2) * span
        last = tl.minimum(first + span, K)
    for k in range(first, last, BK):
        tile = x_tile(x, position, k, K, BK, EVEN_K)
        acc = accumulate(acc, tile, weight, scale, weight_rows, k, K, FORMAT, BK, EVEN_K)
    n = tl.program_id(1) * BN + row_of(tl.arange(0, BN), FORMAT)
    acc *= row_factor(row_scale, matrix * width + tl.minimum(n, width - 1), FORMAT)
    if FORMAT == "e4m3":
        acc *= tl.load(x_scale + position)[None, :]
    if SPLIT:
        out += tl.program_id(2).to(tl.int64) * count * width
    pointers = out + choice[None, :] * width + n[:, None]
    tl.store(pointers, rounded(acc, out.dtype.element_ty), mask=live[None, :] & (n < width)[:, None])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where a launch's tiles of rows come from: a routing schedule's tensors, or `count` consecutive rows."""

    order: Tensor
    expert: Tensor
    start: Tensor
    rows: Tensor
    count: int
    tiles: int
    routed: bool


def consecutive(x: Tensor, bm: int) -> Rows:
    """All rows of x [R, K]. The pointers are not read."""
    count = x.shape[0]
    return Rows(order=x, expert=x, start=x, rows=x, count=count, tiles=triton.cdiv(count, bm), routed=False)


@dataclass(frozen=True)
class EightBit:
    """Rows of x in 8 bit: x = values * scale[:, None]."""

    values: Tensor  # float8_e4m3fn [R, K]
    scale: Tensor  # float32 [R]


Given = Tensor | EightBit  # rows of x: in 8 bit for a weight of form e4m3, else not


def _pointers(x: Given) -> tuple[Tensor, Tensor]:
    return (x, x) if isinstance(x, Tensor) else (x.values, x.scale)


def order_form(form: str) -> str:
    """In whose order columns of x come for weights of a form. All of 4 bit lie alike: the same kernels serve them."""
    return "plain" if form == "e4m3" else "nvfp4" if form in FOUR_BIT else form


def launch_gated(
    x: Given, weight: Stored, rows: Rows, hidden: Tensor, bm: int, *, active: int, following: str, block: int
) -> None:
    """x [R, K] `ordered` for the weight, hidden [positions, width], ordered in blocks for one of format `following`;
    `active` choices are made by a row."""
    own = order_form(weight.form)
    if following != own:  # too rare a mixture of formats for kernels of its own
        launch_gated(x, weight, rows, hidden, bm, active=active, following=own, block=block)
        columns = torch.arange(hidden.shape[1], device=hidden.device)[None, :]
        mine, wanted = ordered(columns, own, block)[0], ordered(columns, following, block)[0]
        hidden.copy_(hidden[:, mine.argsort()[wanted]])
        return
    tile = tiling(weight.form, bm, weight.width, gated=True, chip=chip_of(weight.values.device))
    width = weight.out // 2
    launch(gated_kernel, (rows.tiles, triton.cdiv(width, tile.BN)))(
        *_pointers(x), weight.values, weight.scale, weight.row_scale, rows.order, rows.expert, rows.start, rows.rows,
        hidden, rows.count, width, weight.width, A=active, FORMAT=weight.form, FOLLOWING=following, FOLLOWING_BK=block,
        ROUTED=rows.routed, EVEN_K=tile.divides(weight.form, weight.width), **tile.constants, num_warps=tile.warps,
        num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def launch_matmul(x: Given, weight: Stored, rows: Rows, out: Tensor, bm: int) -> None:
    """x [positions, K] `ordered` for the weight. out [choices, width]; or float32 [parts, choices, width], whose sum is
    the product, of about as many columns each."""
    tile = tiling(weight.form, bm, weight.width, gated=False, chip=chip_of(weight.values.device))
    parts = out.shape[0] if out.dim() == 3 else 1
    span = triton.cdiv(triton.cdiv(weight.width, tile.BK), parts) * tile.BK
    launch(matmul_kernel, (rows.tiles, triton.cdiv(weight.out, tile.BN), parts))(
        *_pointers(x), weight.values, weight.scale, weight.row_scale, rows.order, rows.expert, rows.start, rows.rows,
        out, rows.count, weight.out, weight.width, span, FORMAT=weight.form, ROUTED=rows.routed, SPLIT=out.dim() == 3,
        EVEN_K=tile.divides(weight.form, weight.width), **tile.constants, num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers,
    )  # fmt: skip


POINTERS: Mapping[str, Mapping[str, str]] = {
    "plain": {"weight": "*bf16:16", "scale": "*bf16:16", "row_scale": "*bf16:16"},
    "fp8": {"weight": "*i32:16", "scale": "*i32:16", "row_scale": "*fp32:16"},
    "e4m3": {"weight": "*fp8e4nv:16", "scale": "*fp8e4nv:16", "row_scale": "*fp32:16"},
    "nvfp4": {"weight": "*i32:16", "scale": "*i32:16", "row_scale": "*fp32:16"},
    "int4": {"weight": "*i32:16", "scale": "*i32:16", "row_scale": "*i32:16"},
}


def matmul_cases(
    form: str,
    width: int,
    row_tiles: Sequence[int],
    *,
    gated: bool,
    routed: bool,
    split: bool = False,
) -> list[KernelCase]:
    """Every row tile of one kernel for one format; `width` is K. A gated one's result is ordered for its own format."""
    found = []
    index = "*i32" if routed else "*fp8e4nv:16" if form == "e4m3" else "*bf16:16"
    x = {"x": "*fp8e4nv:16", "x_scale": "*fp32:16"} if form == "e4m3" else {"x": "*bf16:16", "x_scale": "*bf16:16"}
    target = {"hidden": "*bf16:16"} if gated else {"out": "*fp32:16" if split else "*bf16:16"}
    sizes = {"count": "i32", "width": "i32:16", "K": "i32:16"} | ({} if gated else {"span": "i32:16"})
    chips: dict[Tiling, list[int]] = {}
    for bm, chip in product(row_tiles, E4M3_CHIPS if form == "e4m3" else SHARED_LIMIT):
        chips.setdefault(tiling(form, bm, width, gated=gated, chip=chip), []).append(chip)
    following = order_form(form)
    for tile in chips:
        constants: dict[str, Any] = {"FORMAT": form, "ROUTED": routed, "EVEN_K": tile.divides(form, width)}
        constants |= tile.constants
        if gated:
            constants |= {"A": 8 if routed else 1, "FOLLOWING": following, "FOLLOWING_BK": BLOCK}
        else:
            constants |= {"SPLIT": split}
        kind = "gated" if gated else "split" if split else "matmul"
        then = f",for {following} {BLOCK}" if gated else ""
        sizes_of = f"{tile.BM}x{tile.BN}x{tile.BK},{tile.warps}w{tile.stages}s"
        found.append(
            KernelCase(
                name=f"{'experts' if routed else 'linear'}_{kind}[{form},{sizes_of}{then}]",
                kernel=gated_kernel if gated else matmul_kernel,
                signature={**x, **POINTERS[form], **dict.fromkeys(("order", "expert", "start", "rows"), index)}
                | target
                | sizes,
                constants=constants,
                num_warps=tile.warps,
                num_stages=tile.stages,
                most_registers=tile.registers,
                chips=tuple(chips[tile]),
            )
        )
    return found
