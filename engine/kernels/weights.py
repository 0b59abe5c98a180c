"""How a weight matrix is stored: a plain tensor, one of three quantised layouts, or 4-bit ones as Hopper reads them.

A matrix is [..., out, in] with `in` the dimension that is summed over; the leading dimension, if any, is the expert.
`dense` is the definition of what a stored weight means; kernels that read it packed must agree with it. Knows no
checkpoint names and no kernels.

Invariant: packing never changes the order of rows or columns, so stacking rows of two stored weights is `torch.cat`;
but for fragments, which are made (`fragments`) when nothing is left to stack.
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


FRAGMENT = 64  # rows, and columns, of a block: a warp group's rows, and as many columns as a word holds scales for
FRAGMENT_WORDS = FRAGMENT * FRAGMENT // 8
# For each of a word's four pairs, the places of bit 0 (the lowest) to bit 3 of the pair's first value. The second
# value's are the same 16 bits further, around the end of the word: what one mask takes, after turning the word, is then
# a register of two.
_PAIRS = {
    "nvfp4": ((6, 7, 8, 15), (9, 10, 11, 18), (12, 13, 14, 21), (4, 0, 1, 3)),
    "int4": ((3, 4, 5, 6), (7, 8, 9, 10), (11, 12, 13, 14), (15, 16, 17, 18)),
}
# Where a word has the bits of its eight values.
FRAGMENT_BITS = {
    form: tuple(tuple((place + far) % 32 for place in pair) for pair in pairs for far in (0, 16))
    for form, pairs in _PAIRS.items()
}
NVFP4_EXPONENT = 106  # float32's exponent less this fits five bits for every e4m3 value, and none of them is all ones
INT4_LIFT = 122  # group scales are stored times two to this


@dataclass(frozen=True)
class FragmentWeight:
    """4-bit values in blocks of 64 rows and columns, in the order in which threads of a matrix instruction want them.

    Word thread * 4 + half * 2 + pair of a block has columns 32 * pair + 8 * (thread % 4) and seven more of row
    16 * (thread // 32) + 8 * half + thread // 4 % 8. The scales of a row's 64 columns are one word: four bytes, of an
    e4m3 value's exponent in five bits and its mantissa in three; or two bfloat16.
    """

    form: str  # nvfp4 or int4
    words: Tensor  # int32 [..., out / 64, in / 64, 512]
    scale: Tensor  # int32 [..., out / 64, in / 64, 64]
    row_scale: Tensor | None  # float32 [..., out], of nvfp4


QuantizedWeight = Fp8Weight | Nvfp4Weight | Int4Weight
Weight = Tensor | QuantizedWeight | FragmentWeight


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
        case FragmentWeight():
            return dense(restored(weight), dtype)


def restored(weight: FragmentWeight) -> Nvfp4Weight | Int4Weight:
    """The weight that fragments were made of, in memory of its own."""
    *stack, rows, columns, _ = weight.words.shape
    words = weight.words.view(-1, rows, columns, 4, 8, 4, 2, 2)  # warp, row, quarter, half, pair
    words = words.permute(0, 1, 3, 6, 4, 2, 7, 5).reshape(*stack, rows * FRAGMENT, columns * 8)
    nibbles = torch.zeros(*words.shape, 8, dtype=torch.int32, device=words.device)
    for value, places in enumerate(FRAGMENT_BITS[weight.form]):
        for bit, place in enumerate(places):
            nibbles[..., value] |= (words >> place & 1) << bit
    packed = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8).flatten(-2)
    scale = (
        weight.scale.transpose(-1, -2)
        .clone(memory_format=torch.contiguous_format)
        .view(*stack, rows * FRAGMENT, columns)
    )
    if weight.row_scale is None:
        return Int4Weight(packed, (scale.view(torch.bfloat16).float() * 2.0**-INT4_LIFT).to(torch.bfloat16))
    found = ((scale.view(torch.uint8).int() + (NVFP4_EXPONENT << 3)) << 20).view(torch.float32)
    return Nvfp4Weight(packed, found.to(torch.float8_e4m3fn), weight.row_scale)


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
        case FragmentWeight(_, words, _, _):
            *stack, rows, columns, _ = words.shape
            return (*stack, rows * FRAGMENT, columns * FRAGMENT)


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
        case FragmentWeight(form, words, scale, row_scale):
            return FragmentWeight(form, words[index], scale[index], None if row_scale is None else row_scale[index])


def nbytes(weight: Weight) -> int:
    """Bytes a stored weight takes."""
    if isinstance(weight, Tensor):
        return weight.nbytes
    return sum(part.nbytes for part in vars(weight).values() if isinstance(part, Tensor))
