"""4-bit weights of experts in the order in which the threads of Hopper's matrix instruction want them.

What `weights` describes lies row by row, so a tile of 64 rows is read in pieces of 32 or 64 bytes from as many places,
which costs DRAM and L2 up to half of what they give. Here a block of 64 rows and 64 columns is 2 KiB in one piece, a
thread's words one after the other; and a word's bits are arranged so that decoding takes as few instructions as we
know. Pure tensor operations; what is computed from it, `hopper_experts` says.

Invariant: nothing is lost: `restored` gives the weight back, but for the scale of groups whose values are all zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.weights import NVFP4_GROUP, Int4Weight, Nvfp4Weight

BLOCK = 64  # rows, and columns: a warp group's rows, and as many columns as one word holds scales for
WORDS = BLOCK * BLOCK // 8  # of a block
THREADS = 128
# Where a word has the bits of a value: for each of its four pairs, the places of bit 0 (the lowest) to bit 3 of the
# pair's first value. The second value's are the same 16 bits further, around the end of the word: what is decoded by
# one mask, after turning the word, is then a register of two.
NVFP4_BITS = ((6, 7, 8, 15), (9, 10, 11, 18), (12, 13, 14, 21), (4, 0, 1, 3))
INT4_BITS = ((3, 4, 5, 6), (7, 8, 9, 10), (11, 12, 13, 14), (15, 16, 17, 18))
NVFP4_EXPONENT = 106  # float32's exponent less this fits five bits for every e4m3 value, and none of them is all ones
INT4_LIFT = 122  # a scale is stored times two to this, so it must be less than 32
INT4_LARGEST = 2.0 ** (127 - INT4_LIFT)


@dataclass(frozen=True)
class FragmentWeight:
    """Matrices [E, out, in] of 4-bit values, in blocks [E, out / 64, in / 64] of int32 words.

    Word thread * 4 + half * 2 + pair of a block has columns 32 * pair + 8 * (thread % 4) and seven more of row
    16 * (thread // 32) + 8 * half + thread // 4 % 8. The scales of a row's 64 columns are one word.
    """

    form: str  # nvfp4 or int4
    words: Tensor  # int32 [E, out / 64, in / 64, 512]
    scale: Tensor  # int32 [E, out / 64, in / 64, 64]
    row_scale: Tensor | None  # float32 [E, out], of nvfp4


def fits(weight: object) -> bool:
    """Whether a weight can be `arranged`."""
    match weight:
        case Nvfp4Weight(packed, _, _):
            pass
        case Int4Weight(packed, group_scale):
            if not bool((group_scale.abs() < INT4_LARGEST).all()):
                return False
        case _:
            return False
    return packed.dim() == 3 and packed.shape[1] % BLOCK == 0 and 2 * packed.shape[2] % BLOCK == 0


def arranged(weight: Nvfp4Weight | Int4Weight) -> FragmentWeight:
    """A weight [E, out, in] that `fits`, in the same memory: the weight that is given is overwritten, an expert at a
    time."""
    experts, out, half = weight.packed.shape
    rows, columns = out // BLOCK, 2 * half // BLOCK
    scales = weight.block_scale if isinstance(weight, Nvfp4Weight) else weight.group_scale
    words = weight.packed.view(torch.int32).view(experts, rows, columns, WORDS)
    scale = scales.view(torch.int32).view(experts, rows, columns, BLOCK)
    for index in range(experts):
        nibbles = _nibbles(weight.packed[index])
        if isinstance(weight, Nvfp4Weight):
            nibbles, found = _nvfp4_scales(nibbles, weight.block_scale[index].float())
        else:
            found = (weight.group_scale[index].float() * 2.0**INT4_LIFT).to(torch.bfloat16)
        packed = _packed(nibbles, NVFP4_BITS if isinstance(weight, Nvfp4Weight) else INT4_BITS)
        words[index] = _blocked(packed)
        scale[index] = found.view(torch.int32).view(rows, BLOCK, columns).transpose(1, 2)
    if isinstance(weight, Nvfp4Weight):
        return FragmentWeight("nvfp4", words, scale, weight.row_scale)
    return FragmentWeight("int4", words, scale, None)


def restored(weight: FragmentWeight) -> Nvfp4Weight | Int4Weight:
    """The weight that was `arranged`, in memory of its own."""
    experts, rows, columns, _ = weight.words.shape
    bits = NVFP4_BITS if weight.form == "nvfp4" else INT4_BITS
    words = weight.words.view(experts, rows, columns, 4, 8, 4, 2, 2)  # warp, row, quarter, half, pair
    words = words.permute(0, 1, 3, 6, 4, 2, 7, 5).reshape(experts, rows * BLOCK, columns * 8)
    nibbles = torch.zeros(*words.shape, 8, dtype=torch.int32, device=words.device)
    for value in range(8):
        for bit, place in enumerate(bits[value // 2]):
            nibbles[..., value] |= (words >> ((place + 16 * (value % 2)) % 32) & 1) << bit
    packed = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8).flatten(-2)
    scale = weight.scale.transpose(2, 3).reshape(experts, rows * BLOCK, columns).contiguous()
    if weight.form == "nvfp4":
        assert weight.row_scale is not None
        code = scale.view(torch.uint8).int()
        found = ((code + (NVFP4_EXPONENT << 3)) << 20).view(torch.float32)
        return Nvfp4Weight(packed, found.to(torch.float8_e4m3fn), weight.row_scale)
    return Int4Weight(packed, (scale.view(torch.bfloat16).float() * 2.0**-INT4_LIFT).to(torch.bfloat16))


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [out, in / 2] -> int32 [out, in / 8, 8]."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.view(packed.shape[0], -1, 8).int()


def _nvfp4_scales(nibbles: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales float32 [out, in / 16] -> values, and scales of five bits of exponent and three of mantissa,
    uint8. There is no zero among these, so the values of such a group are made zero; and no sign, so theirs change."""
    words = scale.repeat_interleave(NVFP4_GROUP // 8, dim=-1)[..., None]
    nibbles = torch.where(words == 0, 0, torch.where(words < 0, nibbles ^ 8, nibbles))
    code = (scale.abs().view(torch.int32) >> 20) - (NVFP4_EXPONENT << 3)
    return nibbles, code.clamp(min=0).to(torch.uint8)


def _packed(nibbles: Tensor, bits: tuple[tuple[int, ...], ...]) -> Tensor:
    """int32 [out, in / 8, 8] -> words int32 [out, in / 8]."""
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32, device=nibbles.device)
    for value in range(8):
        for bit, place in enumerate(bits[value // 2]):
            words |= (nibbles[..., value] >> bit & 1) << ((place + 16 * (value % 2)) % 32)
    return words


def _blocked(words: Tensor) -> Tensor:
    """int32 [out, in / 8] -> [out / 64, in / 64, 512]."""
    out, width = words.shape
    split = words.view(out // BLOCK, 4, 2, 8, width // 8, 2, 4)  # warp, half, row; pair, quarter
    return split.permute(0, 4, 1, 3, 6, 2, 5).reshape(out // BLOCK, width // 8, WORDS)
