"""Rows of x in 8 bit, each with a scale of its own: what checkpoints mean by dynamic activations, a token at a time.

Moves a result by about 2.5e-2 of its size, which is more than a quantised op may differ from its weights' dense
meaning: only for checkpoints that say that their layers are to be run so. Knows no weights.

Invariant: a row depends on nothing but the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.grouped import E4M3_CHIPS, EightBit
from engine.kernels.launching import launch
from engine.kernels.tiles import to_e4m3, widened

LARGEST = tl.constexpr(448.0)  # of e4m3
SMALLEST = tl.constexpr(1e-12)  # a row of zeros has this for its largest: its scale is divided by
WARPS = 4


@triton.jit
def in_eight_bit(x):
    """float32 row x, zero beyond its width: in e4m3, whose largest is then LARGEST, and what that is to be multiplied
    by."""
    factor = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST) / LARGEST
    return to_e4m3(x / factor), factor


@triton.jit
def round_kernel(x, values, scale, width, LANES: tl.constexpr):
    """values[row] = x[row] / scale[row] in e4m3."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    live = lanes < width
    found, factor = in_eight_bit(widened(tl.load(x + row * width + lanes, mask=live, other=0.0)))
    tl.store(values + row * width + lanes, found, mask=live)
    tl.store(scale + row, factor)


def round_rows(x: Tensor) -> EightBit:
    """x [R, K], contiguous."""
    rows, width = x.shape
    rounded = EightBit(x.new_empty(rows, width, dtype=torch.float8_e4m3fn), x.new_empty(rows, dtype=torch.float32))
    lanes = triton.next_power_of_2(width)
    launch(round_kernel, (rows,))(x, rounded.values, rounded.scale, width, LANES=lanes, num_warps=WARPS)
    return rounded


def cases() -> list[KernelCase]:
    """For the model's widths: 704, 2112, 2816 and 4096, 8192."""
    return [
        KernelCase(
            name=f"round[{lanes}]",
            kernel=round_kernel,
            signature={"x": "*bf16:16", "values": "*fp8e4nv:16", "scale": "*fp32:16", "width": "i32:16"},
            constants={"LANES": lanes},
            num_warps=WARPS,
            num_stages=3,
            chips=E4M3_CHIPS,
        )
        for lanes in (1024, 4096, 8192)
    ]
