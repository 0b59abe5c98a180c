"""A quantised matrix in 16 bit, for one product by the vendor's library: worth it where rows are many.

Its columns are `ordered` in blocks of BLOCK, as x must be too. Knows no products.
Invariant: values are those of `weights.dense`, rounded to the same dtype once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.grouped import BLOCK, POINTERS, Stored
from engine.kernels.launching import launch
from engine.kernels.tiles import decoded, rounded, row_factor, row_of, widened

ROWS = 64
STEPS = 4  # blocks of columns a program decodes, so that it has some to load while it works
WARPS = 4  # `tiles.row_of` counts on it
STAGES = 3
UNPACKED = ("fp8", "nvfp4", "int4")


@triton.jit
def unpack_kernel(
    weight, scale, row_scale, out, count, K,
    FORMAT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """out [count, K] = what the weights stand for."""
    start = tl.program_id(0) * BN
    n = tl.minimum(start + tl.arange(0, BN), count - 1).to(tl.int64)
    placed = (start + row_of(tl.arange(0, BN), FORMAT)).to(tl.int64)
    factor = row_factor(row_scale, tl.minimum(placed, count - 1), FORMAT)
    first = tl.program_id(1) * BK * STEPS
    for k in range(first, tl.minimum(first + BK * STEPS, K), BK):
        values = decoded(weight, scale, n, k, K, FORMAT, out.dtype.element_ty, BK, True)
        pointers = out + placed[:, None] * K + k + tl.arange(0, BK)[None, :]
        values = rounded(widened(values) * factor, out.dtype.element_ty)
        tl.store(pointers, tl.broadcast_to(values, (BN, BK)), mask=(placed < count)[:, None])


def unpack(weight: Stored) -> Tensor:
    """One matrix, bfloat16 [out, width]."""
    out = torch.empty(weight.out, weight.width, dtype=torch.bfloat16, device=weight.values.device)
    grid = (triton.cdiv(weight.out, ROWS), triton.cdiv(weight.width, BLOCK * STEPS))
    launch(unpack_kernel, grid)(
        weight.values, weight.scale, weight.row_scale, out, weight.out, weight.width,
        FORMAT=weight.form, BN=ROWS, BK=BLOCK, STEPS=STEPS, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def cases() -> list[KernelCase]:
    """Every width is the same kernel."""
    return [
        KernelCase(
            name=f"unpack[{form}]",
            kernel=unpack_kernel,
            signature={**POINTERS[form], "out": "*bf16:16", "count": "i32:16", "K": "i32:16"},
            constants={"FORMAT": form, "BN": ROWS, "BK": BLOCK, "STEPS": STEPS},
            num_warps=WARPS,
            num_stages=STAGES,
        )
        for form in UNPACKED
    ]
