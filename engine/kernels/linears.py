"""Dense projections and the dense MLP for every weight format.

Plain weights go to torch's matmul, which is the vendor's library and hard to beat at 256 rows; quantised ones to
the same kernels as the experts, with one matrix. fp8 activations (torch._scaled_mm) are not used: rounding x to e4m3
moves each result by about 2.5e-2, more than the 1e-2 a quantised op may differ from its weights' dense meaning.
Knows no layers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.catalog import KernelCase
from engine.kernels.grouped import (
    FORMATS,
    Stored,
    consecutive,
    launch_gated,
    launch_matmul,
    matmul_cases,
    stored,
    tiling,
)
from engine.kernels.tiles import gelu_tanh, ordered, rounded, widened
from engine.kernels.weights import Weight

GEGLU_COLUMNS = 1024
ROW_TILES = (64, 128)


@triton.jit
def geglu_kernel(gate_up, out, width, LANES: tl.constexpr):
    """out[row] = gelu_tanh(gate_up[row, :width]) * gate_up[row, width:]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * LANES + tl.arange(0, LANES)
    live = columns < width
    gate = widened(tl.load(gate_up + row * 2 * width + columns, mask=live, other=0.0))
    up = widened(tl.load(gate_up + (row * 2 + 1) * width + columns, mask=live, other=0.0))
    tl.store(out + row * width + columns, rounded(gelu_tanh(gate) * up, out.dtype.element_ty), mask=live)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """As `reference.linear`. x [R, in] contiguous, bfloat16 if the weight is quantised."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    matrix = stored(weight)
    bm = _row_tile(x.shape[0])
    return _matmul(ordered(x, matrix.form, tiling(matrix.form, bm, matrix.width, gated=False).BK), matrix)


def gated_mlp(x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """As `reference.gated_mlp`. x [R, M] contiguous, bfloat16 if a weight is quantised."""
    if isinstance(gate_up, Tensor):
        hidden = _geglu(F.linear(x, gate_up))
        return linear(hidden, down)
    first = stored(gate_up)
    following = "plain" if isinstance(down, Tensor) else stored(down).form
    bm = _row_tile(x.shape[0])
    hidden = x.new_empty(x.shape[0], first.out // 2)
    launch_gated(x, first, consecutive(x, bm), hidden, bm, active=1, following=following)
    return F.linear(hidden, down) if isinstance(down, Tensor) else _matmul(hidden, stored(down))


def _matmul(x: Tensor, weight: Stored) -> Tensor:
    """x is `ordered` for the weight."""
    bm = _row_tile(x.shape[0])
    out = x.new_empty(x.shape[0], weight.out)
    launch_matmul(x, weight, consecutive(x, bm), out, bm)
    return out


def _row_tile(rows: int) -> int:
    """64 up to 512 rows, although the weights are then decoded by several programs: a [2816, 2112] matrix has only 22
    tiles of 128 outputs, and with 128 rows a tile most of a large chip would have no work."""
    return 64 if rows <= 512 else 128


def _geglu(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    geglu_kernel[(rows, triton.cdiv(width, GEGLU_COLUMNS))](gate_up, out, width, LANES=GEGLU_COLUMNS, num_warps=4)
    return out


def cases() -> list[KernelCase]:
    """Quantised formats only; every width is the same kernel."""
    found = [
        case
        for form in FORMATS
        if form != "plain"
        for gated in (True, False)
        for case in matmul_cases(form, 2816, ROW_TILES, gated=gated, routed=False)
    ]
    signature = {"gate_up": "*bf16:16", "out": "*bf16:16", "width": "i32:16"}
    geglu = KernelCase(
        name="geglu",
        kernel=geglu_kernel,
        signature=signature,
        constants={"LANES": GEGLU_COLUMNS},
        num_warps=4,
        num_stages=3,
    )
    return [*found, geglu]
