"""The mixture of experts: two grouped matmuls, over the tiles that `routing.schedule` makes.

For plain, fp8, nvfp4 and int4 weights; 4-bit ones that lie as fragments go by a kernel of their own. How many rows a
tile has, and whether fp8 weights are decoded or rows rounded to 8 bit as well (see `linears`), `choosing` decides at
start-up. Knows no layers.

Invariant: no atomics: each of a row's experts has a place of its own in the result, in the order they were chosen, and
`norms.join_layer` sums them in that order, so results repeat exactly. Rows of one class always go the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import chip_of
from engine.kernels.experts_hopper import launch_fragments
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
from engine.kernels.operands import EIGHT_BIT, FRAGMENTS, Operand, Order, order_for, taken, values_of
from engine.kernels.readers import Experts
from engine.kernels.rounding import round_rows
from engine.kernels.routing import Schedule, schedule
from engine.kernels.weights import Fp8Weight, FragmentWeight, Weight, shape


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


def mixture_of(which: Experts, rows: int) -> Mixture:
    """What decides how so many rows go through these experts."""
    return Mixture(_form(which.gate_up), _form(which.down), shape(which.gate_up), rows_class(rows))


def _form(weight: Weight) -> str:
    return f"{weight.form} in fragments" if isinstance(weight, FragmentWeight) else stored(weight).form


def expert_ways(which: Experts, rows: int, chip: int, *, eight_bit: bool) -> list[ExpertWay]:
    """What may be chosen for so many rows; the first is what is used unasked. A smaller tile decodes weights more
    often, a larger one multiplies more rows that are not there."""
    tile = _usual(which, rows).tile
    tiles = (tile, *(half for half in ROW_TILES if 2 * half == tile))
    rounds = any(isinstance(weight, Fp8Weight) for weight in (which.gate_up, which.down))
    if eight_bit and chip in E4M3_CHIPS and rounds:  # decoding does the same and more
        return [ExpertWay(each, True) for each in tiles]
    return [ExpertWay(each) for each in tiles]


def _usual(which: Experts, rows: int) -> ExpertWay:
    return ExpertWay(row_tile(rows * which.active, shape(which.gate_up)[0]))


def expert_way_of(which: Experts, rows: int, ways: ExpertsChosen | None) -> ExpertWay:
    """The way chosen for so many rows."""
    usual = _usual(which, rows)
    return ways.get(mixture_of(which, rows), usual) if ways else usual


def experts(x: Operand, chosen: Tensor, which: Experts, ways: ExpertsChosen | None = None) -> Tensor:
    """As `reference.experts`. x [R, M] of the weights' dtype if they are plain, else bfloat16; all contiguous.

    Between the two matmuls and behind them, values are rounded to x's dtype.
    """
    return experts_by(expert_way_of(which, chosen.shape[0], ways), x, chosen, which)


def experts_by(way: ExpertWay, x: Operand, chosen: Tensor, which: Experts) -> Tensor:
    """`experts`, in a given way."""
    rows, active = chosen.shape
    assert active == which.active, "so many were said to be chosen"
    values = values_of(x)
    dtype = torch.bfloat16 if values.dtype.itemsize == 1 else values.dtype
    count, width, inner = shape(which.down)
    tiles = routed(schedule(chosen, count, way.tile))
    hidden = values.new_empty(rows * active, inner, dtype=dtype)
    parts = values.new_empty(rows * active, width, dtype=dtype)
    _multiply(way, taken(x, experts_order(which, way)), which, tiles, hidden, parts)
    return parts.view(rows, active, width)


def _multiply(way: ExpertWay, given: Given, which: Experts, tiles: Rows, hidden: Tensor, parts: Tensor) -> None:
    """parts = down(hidden = gelu(gate(x)) * up(x)), of all choices."""
    bm, active = way.tile, which.active
    if isinstance(which.gate_up, FragmentWeight) and isinstance(which.down, FragmentWeight):
        assert isinstance(given, Tensor)
        launch_fragments(given, which.gate_up, tiles, hidden, bm, gated=True, active=active)
        launch_fragments(hidden, which.down, tiles, parts, bm, gated=False, active=active)
        return
    first, second = (stored(each, eight_bit=way.eight_bit) for each in (which.gate_up, which.down))
    between = _order_of(second, bm, gated=False)
    following, block = between.of_columns
    launch_gated(given, first, tiles, hidden, bm, active=active, following=following, block=block)
    launch_matmul(round_rows(hidden) if between == EIGHT_BIT else hidden, second, tiles, parts, bm)


def experts_order(which: Experts, way: ExpertWay) -> Order:
    """How x must come."""
    if isinstance(which.gate_up, FragmentWeight):
        return FRAGMENTS
    return _order_of(stored(which.gate_up, eight_bit=way.eight_bit), way.tile, gated=True)


def _order_of(weight: Stored, bm: int, *, gated: bool) -> Order:
    chip = chip_of(weight.values.device)
    return order_for(weight.form, tiling(weight.form, bm, weight.width, gated=gated, chip=chip).BK)


def cases() -> list[KernelCase]:
    """At the model's shapes: gate and up [1408, 2816], down [2816, 704]."""
    found = []
    for form in FORMATS:
        found += matmul_cases(form, 2816, ROW_TILES, gated=True, routed=True)
        found += matmul_cases(form, 704, ROW_TILES, gated=False, routed=True)
    return found
