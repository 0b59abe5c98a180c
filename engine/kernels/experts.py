"""The mixture of experts: two grouped matmuls and a sum, over the tiles that `routing.schedule` makes.

For plain, fp8, nvfp4 and int4 weights. How many rows a tile has, and whether fp8 weights are decoded or rows rounded
to 8 bit as well (see `linears`), `choosing` decides at start-up. Knows no layers.

Invariant: no atomics: a row's experts are summed in the order they were chosen, so results repeat exactly. Rows of one
class always go the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import chip_of
from engine.kernels.grouped import (
    E4M3_CHIPS,
    FORMATS,
    ROW_TILES,
    Given,
    Rows,
    Stored,
    launch_gated,
    launch_matmul,
    matmul_cases,
    row_tile,
    rows_class,
    stored,
    tiling,
)
from engine.kernels.launching import launch
from engine.kernels.rounding import round_rows
from engine.kernels.routing import Schedule, schedule
from engine.kernels.tiles import ordered, rounded, widened
from engine.kernels.weights import Fp8Weight, Weight, shape

SUM_COLUMNS = 1024  # 2816 is 2.75 of these: enough programs at 256 rows, 8 loads of 16 bytes in flight a lane


@triton.jit
def sum_kernel(parts, weights, out, width, A: tl.constexpr, LANES: tl.constexpr):
    """out[row] = sum over a of weights[row, a] * parts[row * A + a], in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * LANES + tl.arange(0, LANES)
    live = columns < width
    total = tl.zeros((LANES,), tl.float32)
    for place in tl.static_range(A):
        part = tl.load(parts + (row * A + place) * width + columns, mask=live, other=0.0)
        total += widened(part) * tl.load(weights + row * A + place)
    tl.store(out + row * width + columns, rounded(total, out.dtype.element_ty), mask=live)


def routed(plan: Schedule) -> Rows:
    """A routing schedule as the matmul kernels take it."""
    return Rows(
        order=plan.order,
        expert=plan.expert,
        start=plan.start,
        rows=plan.rows,
        count=plan.order.shape[0],
        tiles=plan.expert.shape[0],
        routed=True,
    )


@dataclass(frozen=True)
class ExpertWay:
    """One way to multiply by the experts' matrices."""

    tile: int  # rows
    eight_bit: bool = False  # x is rounded to 8 bit where weights are fp8

    def __str__(self) -> str:
        return f"tiles of {self.tile}{', e4m3' * self.eight_bit}"


@dataclass(frozen=True)
class Mixture:
    """What a way is chosen for: all layers of one kind, and rows of one class."""

    gate_up: str
    down: str
    sizes: tuple[int, ...]  # of gate and up
    rows: int

    def __str__(self) -> str:
        form = self.gate_up if self.gate_up == self.down else f"{self.gate_up} and {self.down}"
        return f"experts {form} of {self.rows} rows"


ExpertsChosen = Mapping[Mixture, ExpertWay]


def mixture_of(gate_up: Weight, down: Weight, rows: int) -> Mixture:
    """What decides how so many rows go through these experts."""
    return Mixture(stored(gate_up).form, stored(down).form, shape(gate_up), rows_class(rows))


def expert_ways(gate_up: Weight, down: Weight, choices: int, chip: int, *, eight_bit: bool) -> list[ExpertWay]:
    """What may be chosen for so many choices; the first is what is used unasked. A smaller tile decodes weights more
    often, a larger one multiplies more rows that are not there."""
    tile = row_tile(choices, shape(gate_up)[0])
    tiles = (tile, *(half for half in ROW_TILES if 2 * half == tile))
    eight = eight_bit and chip in E4M3_CHIPS and (isinstance(gate_up, Fp8Weight) or isinstance(down, Fp8Weight))
    if eight:  # decoding does the same and more
        return [ExpertWay(each, True) for each in tiles]
    return [ExpertWay(each) for each in tiles]


def experts(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Weight, down: Weight, ways: ExpertsChosen | None = None
) -> Tensor:
    """As `reference.experts`. x [R, M] of the weights' dtype if they are plain, else bfloat16; all contiguous.

    Between the two matmuls and before the sum, values are rounded to x's dtype.
    """
    usual = ExpertWay(row_tile(chosen.numel(), shape(gate_up)[0]))
    way = usual if not ways else ways.get(mixture_of(gate_up, down, x.shape[0]), usual)
    return experts_by(way, x, weights, chosen, gate_up, down)


def experts_by(way: ExpertWay, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """`experts`, in a given way."""
    first, second = (stored(each, eight_bit=way.eight_bit) for each in (gate_up, down))
    rows, active = chosen.shape
    bm = way.tile
    tiles = routed(schedule(chosen, first.experts, bm))
    hidden = x.new_empty(rows * active, second.width)
    parts = x.new_empty(rows * active, second.out)
    chip = chip_of(x.device)
    block = tiling(second.form, bm, second.width, gated=False, chip=chip).BK
    given = _given(x, first, tiling(first.form, bm, first.width, gated=True, chip=chip).BK)
    launch_gated(given, first, tiles, hidden, bm, active=active, following=_order(second), block=block)
    launch_matmul(round_rows(hidden) if second.form == "e4m3" else hidden, second, tiles, parts, bm)
    out = torch.empty_like(x)
    grid = (rows, triton.cdiv(second.out, SUM_COLUMNS))
    launch(sum_kernel, grid)(parts, weights, out, second.out, A=active, LANES=SUM_COLUMNS, num_warps=4)
    return out


def _order(weight: Stored) -> str:
    return "plain" if weight.form == "e4m3" else weight.form


def _given(x: Tensor, weight: Stored, block: int) -> Given:
    return round_rows(x) if weight.form == "e4m3" else ordered(x, weight.form, block)


def cases() -> list[KernelCase]:
    """At the model's shapes: gate and up [1408, 2816], down [2816, 704]."""
    found = []
    for form in FORMATS:
        orders = [("plain" if form == "e4m3" else form, 64)]
        found += matmul_cases(form, 2816, ROW_TILES, gated=True, routed=True, followings=orders)
        found += matmul_cases(form, 704, ROW_TILES, gated=False, routed=True)
    signature = {"parts": "*bf16:16", "weights": "*fp32:16", "out": "*bf16:16", "width": "i32:16"}
    summing = KernelCase(
        name="experts_sum",
        kernel=sum_kernel,
        signature=signature,
        constants={"A": 8, "LANES": SUM_COLUMNS},
        num_warps=4,
        num_stages=3,
    )
    return [*found, summing]
