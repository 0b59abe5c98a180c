"""Dense projections and the dense MLP for every weight format.

Plain weights go to torch's matmul, which is the vendor's library and hard to beat at 256 rows. There are several ways
to multiply by a quantised one, and which is fastest depends on the chip, the matrix and the number of rows:

    tiles      the experts' kernel with one matrix, decoded in registers. A [2816, 4096] matrix has 22 tiles of outputs
               and 256 rows four: too few programs for a large chip, each with a long loop. So the columns may be split
               into `parts`, which another kernel adds up
    unpacked   the matrix made 16 bit, then the vendor's library
    e4m3       rows rounded to 8 bit and fp8 weights multiplied as they are, in tiles, split or not
    library    the same by torch._scaled_mm

The last two round x, which moves a result by about 2.5e-2: more than the 1e-2 a quantised op may differ from its
weights' dense meaning. They are for checkpoints that declare 8-bit activations. `choosing` measures and chooses at
start-up; what it did not choose goes by tiles. Knows no layers.

Invariant: rows of one class (`rows_class`) always go the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import chip_of
from engine.kernels.grouped import (
    BLOCK,
    E4M3_CHIPS,
    FORMATS,
    Given,
    Stored,
    consecutive,
    launch_gated,
    launch_matmul,
    matmul_cases,
    rows_class,
    stored,
    tiling,
)
from engine.kernels.launching import launch
from engine.kernels.operands import EIGHT_BIT, PLAIN, Operand, Order, order_for, plain_rows, taken, values_of
from engine.kernels.readers import Mlp
from engine.kernels.rounding import round_rows
from engine.kernels.tiles import column_of, gelu_tanh, rounded, widened
from engine.kernels.unpacking import unpack
from engine.kernels.weights import Weight, shape

JOIN_COLUMNS = 1024
JOIN_WARPS = 4
ROW_TILES = (64, 128)
PARTS = (2, 3, 4, 6)


@dataclass(frozen=True)
class Way:
    """One way to multiply by a quantised matrix."""

    name: Literal["tiles", "unpacked", "e4m3", "library"] = "tiles"
    parts: int = 1

    @property
    def eight_bit(self) -> bool:
        """Whether x is rounded to 8 bit."""
        return self.name in ("e4m3", "library")

    def __str__(self) -> str:
        return self.name if self.parts == 1 else f"{self.name} in {self.parts} parts"


TILES = Way()


@dataclass(frozen=True)
class Product:
    """What a way is chosen for: all matrices of one kind, and rows of one class."""

    form: str
    out: int
    width: int
    gated: bool
    rows: int

    def __str__(self) -> str:
        return f"{'gate and up' if self.gated else 'linear'} {self.form} {self.out}x{self.width} of {self.rows} rows"


Chosen = Mapping[Product, Way]


def ways(form: str, rows: int, chip: int, *, eight_bit: bool) -> list[Way]:
    """What may be chosen for a quantised weight; the usual one is the first. `eight_bit`: x may be rounded. Where it
    can be, no way that decodes is offered: it would do the same and more, and take its time to compile."""
    parts = (1, *PARTS) if rows <= 512 else (1,)  # beyond, there are programs enough
    if form == "fp8" and eight_bit and chip in E4M3_CHIPS:
        return [*(Way("e4m3", count) for count in parts), Way("library")]
    return [*(Way("tiles", count) for count in parts), Way("unpacked")]


def product_of(weight: Weight, rows: int, *, gated: bool) -> Product:
    """What decides how so many rows are multiplied by `weight`."""
    out, width = shape(weight)
    return Product(stored(weight).form, out, width, gated, rows_class(rows))


def linear(x: Operand, weight: Weight, chosen: Chosen | None = None) -> Tensor:
    """As `reference.linear`. x [R, in] contiguous, bfloat16 if the weight is quantised."""
    if isinstance(weight, Tensor):
        return F.linear(plain_rows(x), weight)
    way = way_of(weight, values_of(x).shape[0], chosen)
    return multiply(prepare(x, weight, way), weight, way)


def gated_mlp(x: Operand, mlp: Mlp, chosen: Chosen | None = None) -> Tensor:
    """As `reference.gated_mlp`. x [R, M] contiguous, bfloat16 if a weight is quantised."""
    gate_up, down = mlp.gate_up, mlp.down
    rows = values_of(x).shape[0]
    first, second = way_of(gate_up, rows, chosen, gated=True), way_of(down, rows, chosen)
    order = order_of(down, rows, second)
    if isinstance(gate_up, Tensor):
        hidden = _join(F.linear(plain_rows(x), gate_up), plain_rows(x), order=order.of_columns)
    else:
        hidden = multiply_gated(prepare(x, gate_up, first, gated=True), gate_up, first, order.of_columns)
    if isinstance(down, Tensor):
        return F.linear(hidden, down)
    return multiply(round_rows(hidden) if order == EIGHT_BIT else hidden, down, second)


def way_of(weight: Weight, rows: int, chosen: Chosen | None, *, gated: bool = False) -> Way:
    """The way chosen for so many rows; one that says nothing if the weight is plain."""
    if isinstance(weight, Tensor) or chosen is None:
        return TILES
    return chosen.get(product_of(weight, rows, gated=gated), TILES)


def order_of(weight: Weight, rows: int, way: Way, *, gated: bool = False) -> Order:
    """How x must come."""
    if isinstance(weight, Tensor):
        return PLAIN
    if way.eight_bit:
        return EIGHT_BIT
    matrix = stored(weight)
    if way.name == "unpacked":
        return order_for(matrix.form, BLOCK)
    chip, gated = chip_of(matrix.values.device), gated and way.parts == 1
    return order_for(matrix.form, tiling(matrix.form, _row_tile(rows), matrix.width, gated=gated, chip=chip).BK)


def prepare(x: Operand, weight: Weight, way: Way, *, gated: bool = False) -> Given:
    """x [R, K] as `multiply`, or `multiply_gated`, takes it."""
    return taken(x, order_of(weight, values_of(x).shape[0], way, gated=gated))


def multiply(x: Given, weight: Weight, way: Way) -> Tensor:
    """x `prepare`d; returns [R, out]."""
    if way.name in ("unpacked", "library"):
        return _by_library(x, weight, way)
    matrix, like, bm = _in_tiles(x, weight, way)
    if way.parts > 1:
        return _join(_parts(x, matrix, like, way), like, order=None)
    out = like.new_empty(like.shape[0], matrix.out, dtype=torch.bfloat16 if way.eight_bit else like.dtype)
    launch_matmul(x, matrix, consecutive(like, bm), out, bm)
    return out


def multiply_gated(x: Given, weight: Weight, way: Way, order: Order) -> Tensor:
    """x `prepare`d; the result of the gate [R, out / 2] has its columns in `order`."""
    if way.name in ("unpacked", "library"):
        both = _by_library(x, weight, way)
        return _join(both, both, order=order)
    matrix, like, bm = _in_tiles(x, weight, way)
    if way.parts > 1:
        return _join(_parts(x, matrix, like, way), like, order=order)
    hidden = like.new_empty(like.shape[0], matrix.out // 2, dtype=torch.bfloat16 if way.eight_bit else like.dtype)
    following, block = order
    launch_gated(x, matrix, consecutive(like, bm), hidden, bm, active=1, following=following, block=block)
    return hidden


def _in_tiles(x: Given, weight: Weight, way: Way) -> tuple[Stored, Tensor, int]:
    """The matrix, x's values and the rows of a tile."""
    values = values_of(x)
    return stored(weight, eight_bit=way.eight_bit), values, _row_tile(values.shape[0])


def _parts(x: Given, matrix: Stored, like: Tensor, way: Way) -> Tensor:
    """float32 [parts, R, out]."""
    out = like.new_empty(way.parts, like.shape[0], matrix.out, dtype=torch.float32)
    bm = _row_tile(like.shape[0])
    launch_matmul(x, matrix, consecutive(like, bm), out, bm)
    return out


def _by_library(x: Given, weight: Weight, way: Way) -> Tensor:
    if isinstance(x, Tensor):
        return F.linear(x, unpack(stored(weight)))
    matrix = stored(weight, eight_bit=True)
    return torch._scaled_mm(
        x.values,
        matrix.values.t(),
        scale_a=x.scale[:, None],
        scale_b=matrix.row_scale[None, :],
        out_dtype=torch.bfloat16,
    )


def _row_tile(rows: int) -> int:
    """64 up to 512 rows, although the weights are then decoded by several programs: a [2816, 2112] matrix has only 22
    tiles of 128 outputs, and with 128 rows a tile most of a large chip would have no work."""
    return 64 if rows <= 512 else 128


@triton.jit
def join_kernel(
    parts, out, rows, width, count,
    GATED: tl.constexpr, FOLLOWING: tl.constexpr, FOLLOWING_BK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out [rows, width] = the sum of parts [count, rows, width], in their order; GATED: gelu_tanh of the first half
    times the second of the sum of parts [count, rows, 2 * width], columns as FOLLOWING is decoded."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * LANES + tl.arange(0, LANES)
    live = columns < width
    stride: tl.constexpr = 2 if GATED else 1
    total = tl.zeros((LANES,), tl.float32)
    other = tl.zeros((LANES,), tl.float32)
    for part in range(count):
        pointers = parts + (part * rows + row) * (width * stride) + columns
        total += widened(tl.load(pointers, mask=live, other=0.0))
        if GATED:
            other += widened(tl.load(pointers + width, mask=live, other=0.0))
    if GATED:
        total = gelu_tanh(total) * other
        columns = column_of(columns, FOLLOWING, FOLLOWING_BK)
    tl.store(out + row * width + columns, rounded(total, out.dtype.element_ty), mask=live)


def _join(parts: Tensor, like: Tensor, *, order: Order | None) -> Tensor:
    """parts [R, N] or [parts, R, N]; with an `order`, of gate and up. The result has `like`'s dtype; bfloat16 if that
    is 8 bit."""
    gated = order is not None
    following, block = order or PLAIN
    count = parts.shape[0] if parts.dim() == 3 else 1
    rows, width = parts.shape[-2], parts.shape[-1] // (2 if gated else 1)
    out = parts.new_empty(rows, width, dtype=torch.bfloat16 if like.dtype.itemsize == 1 else like.dtype)
    launch(join_kernel, (rows, triton.cdiv(width, JOIN_COLUMNS)))(
        parts, out, rows, width, count, GATED=gated, FOLLOWING=following, FOLLOWING_BK=block, LANES=JOIN_COLUMNS,
        num_warps=JOIN_WARPS,
    )  # fmt: skip
    return out


def cases() -> list[KernelCase]:
    """Quantised formats only. Of the model's widths, 2112 does not divide by 128, which rows in 8 bit want where it
    does; all others are the same kernels."""
    found = []
    for form in FORMATS[1:]:
        found += matmul_cases(form, 2816, ROW_TILES, gated=True, routed=False)
        for width in (2816, 2112):
            found += matmul_cases(form, width, ROW_TILES, gated=False, routed=False)
            found += matmul_cases(form, width, ROW_TILES[:1], gated=False, routed=False, split=True)
    found = list({case.name: case for case in found}.values())
    for kind, following in product(("bf16", "fp32"), ("plain", "fp8", "nvfp4")):
        found.append(_join_case(kind, following, gated=True))
    return [*found, _join_case("fp32", "plain", gated=False)]


def _join_case(kind: str, following: str, *, gated: bool) -> KernelCase:
    return KernelCase(
        name=f"join[{kind},{f'gated for {following}' if gated else 'sum'}]",
        kernel=join_kernel,
        signature={"parts": f"*{kind}:16", "out": "*bf16:16", "rows": "i32", "width": "i32:16", "count": "i32"},
        constants={"GATED": gated, "FOLLOWING": following, "FOLLOWING_BK": BLOCK, "LANES": JOIN_COLUMNS},
        num_warps=JOIN_WARPS,
        num_stages=3,
    )
