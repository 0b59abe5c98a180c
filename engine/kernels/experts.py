"""The mixture of experts: two grouped matmuls and a sum, over the tiles that `routing.schedule` makes.

For plain, fp8, nvfp4 and int4 weights. Knows no layers.

Invariant: no atomics: a row's experts are summed in the order they were chosen, so results repeat exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.grouped import (
    FORMATS,
    ROW_TILES,
    Rows,
    launch_gated,
    launch_matmul,
    matmul_cases,
    row_tile,
    stored,
)
from engine.kernels.routing import Schedule, schedule
from engine.kernels.tiles import rounded, widened
from engine.kernels.weights import Weight

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


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """As `reference.experts`. x [R, M] of the weights' dtype if they are plain, else bfloat16; all contiguous.

    Between the two matmuls and before the sum, values are rounded to x's dtype.
    """
    first, second = stored(gate_up), stored(down)
    rows, active = chosen.shape
    bm = row_tile(rows * active, first.experts)
    tiles = routed(schedule(chosen, first.experts, bm))
    hidden = x.new_empty(rows * active, second.width)
    parts = x.new_empty(rows * active, second.out)
    launch_gated(x, first, tiles, hidden, bm, active=active, following=second.form)
    launch_matmul(hidden, second, tiles, parts, bm)
    out = torch.empty_like(x)
    grid = (rows, triton.cdiv(second.out, SUM_COLUMNS))
    sum_kernel[grid](parts, weights, out, second.out, A=active, LANES=SUM_COLUMNS, num_warps=4)
    return out


def cases() -> list[KernelCase]:
    """At the model's shapes: gate and up [1408, 2816], down [2816, 704]."""
    found = [
        case
        for form in FORMATS
        for gated, width in ((True, 2816), (False, 704))
        for case in matmul_cases(form, width, ROW_TILES, gated=gated, routed=True)
    ]
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
