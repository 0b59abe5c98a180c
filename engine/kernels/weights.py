"""How a weight matrix is stored: a plain tensor, or one of three quantised layouts.

A matrix is [..., out, in] with `in` the dimension that is summed over; the leading dimension, if any, is the expert.
`dense` is the definition of what a stored weight means; kernels that read it packed must agree with it. Knows no
checkpoint names and no kernels.

Invariant: packing never changes the order of rows or columns, so stacking rows of two stored weights is `torch.cat`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NVFP4_GROUP = 16
INT4_GROUP = 32
# e2m1: sign, two exponent bits, one mantissa bit
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Fp8Weight:
    """value = values * row_scale[..., None]."""

    values: Tensor  # float8_e4m3fn [..., out, in]
    row_scale: Tensor  # float32 [..., out]


@dataclass(frozen=True)
class Nvfp4Weight:
    """value = e2m1(packed) * block_scale * row_scale[..., None]; the low nibble of a byte is the even column."""

    packed: Tensor  # uint8 [..., out, in / 2]
    block_scale: Tensor  # float8_e4m3fn [..., out, in / 16]
    row_scale: Tensor  # float32 [..., out]: the tensor's global scale, repeated, so that stacked rows may differ


@dataclass(frozen=True)
class Int4Weight:
    """value = (nibble - 8) * group_scale; the low nibble of a byte is the even column."""

    packed: Tensor  # uint8 [..., out, in / 2]
    group_scale: Tensor  # bfloat16 [..., out, in / 32]


QuantizedWeight = Fp8Weight | Nvfp4Weight | Int4Weight
Weight = Tensor | QuantizedWeight


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [..., out, in] that a stored weight stands for, computed in float32 and rounded to `dtype` once."""
    match weight:
        case Tensor():
            return weight.to(dtype)
        case Fp8Weight(values, row_scale):
            return (values.float() * row_scale[..., None]).to(dtype)
        case Nvfp4Weight(packed, block_scale, row_scale):
            table = torch.tensor(E2M1, device=packed.device)
            scale = block_scale.float().repeat_interleave(NVFP4_GROUP, dim=-1) * row_scale[..., None]
            return (table[_nibbles(packed)] * scale).to(dtype)
        case Int4Weight(packed, group_scale):
            scale = group_scale.float().repeat_interleave(INT4_GROUP, dim=-1)
            return ((_nibbles(packed).float() - 8.0) * scale).to(dtype)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> int64 [..., 2n], low nibble first."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.flatten(-2).long()


def plain(weight: Weight) -> Tensor:
    """The tensor of a weight that is never quantised: a norm, a scale, the embedding."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected a plain tensor, not a {type(weight).__name__}")
    return weight


def shape(weight: Weight) -> tuple[int, ...]:
    """Shape of the matrix that a stored weight stands for, [..., out, in]."""
    match weight:
        case Tensor():
            return tuple(weight.shape)
        case Fp8Weight(values, _):
            return tuple(values.shape)
        case Nvfp4Weight(packed, _, _) | Int4Weight(packed, _):
            return (*packed.shape[:-1], 2 * packed.shape[-1])


def expert(weight: Weight, index: int) -> Weight:
    """The matrix [out, in] of one expert, a view of [E, out, in]."""
    match weight:
        case Tensor():
            return weight[index]
        case Fp8Weight(values, row_scale):
            return Fp8Weight(values[index], row_scale[index])
        case Nvfp4Weight(packed, block_scale, row_scale):
            return Nvfp4Weight(packed[index], block_scale[index], row_scale[index])
        case Int4Weight(packed, group_scale):
            return Int4Weight(packed[index], group_scale[index])


def nbytes(weight: Weight) -> int:
    """Bytes a stored weight takes."""
    return weight.nbytes if isinstance(weight, Tensor) else sum(part.nbytes for part in vars(weight).values())
