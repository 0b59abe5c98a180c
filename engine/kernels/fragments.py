"""Lays out experts' 4-bit weights in the order in which the threads of Hopper's matrix instruction want them.

As checkpoints have them they lie row by row, so a tile of 64 rows is read in pieces of 32 or 64 bytes from as many
places, which costs up to half of what DRAM gives. As fragments, a block of 64 rows and columns is 2 KiB in one piece, a
thread's words lie one after the other, and a word's bits are arranged so that decoding takes few instructions. Plain
tensor operations; `weights.FragmentWeight` says what is where, `experts_hopper` multiplies.

Invariant: what a weight stands for stays the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from engine.kernels.weights import (
    FRAGMENT,
    FRAGMENT_BITS,
    FRAGMENT_WORDS,
    INT4_LIFT,
    NVFP4_EXPONENT,
    NVFP4_GROUP,
    FragmentWeight,
    Int4Weight,
    Nvfp4Weight,
    Weight,
)

TOGETHER = 16  # experts: 32 MB of words, and a few times as much while they move
INT4_LARGEST = 2.0 ** (127 - INT4_LIFT)  # that a group scale may be, times two to the lift, in bfloat16


def arrange_experts(weights: MutableMapping[str, Weight]) -> None:
    """Put fragments in the place of all experts' 4-bit weights that fit, in the same memory: who holds one of these
    weights still holds nothing of use. Names as in `Checkpoint.tensors`. A layer whose two matrices do not both fit
    stays as it is."""
    for name in [name for name in weights if name.endswith(".expert_gate_up")]:
        other = name.removesuffix("gate_up") + "down"
        one, two = weights[name], weights[other]
        if isinstance(one, Nvfp4Weight | Int4Weight) and isinstance(two, Nvfp4Weight | Int4Weight) and fit(one, two):
            weights[name], weights[other] = arranged(one), arranged(two)


def fit(gate_up: Nvfp4Weight | Int4Weight, down: Nvfp4Weight | Int4Weight) -> bool:
    """Whether a layer's two weights [E, out, in] can be `arranged`, and the kernel's blocks divide them."""
    for weight in (gate_up, down):
        if isinstance(weight, Int4Weight) and not bool((weight.group_scale.abs() < INT4_LARGEST).all()):
            return False
        if 2 * weight.packed.shape[-1] % FRAGMENT or weight.packed.shape[-2] % (2 * FRAGMENT):
            return False
    return True


def arranged(weight: Nvfp4Weight | Int4Weight) -> FragmentWeight:
    """A weight [E, out, in] that fits, in the same memory: what is given is overwritten, some experts at a time."""
    experts, out, half = weight.packed.shape
    rows, columns = out // FRAGMENT, 2 * half // FRAGMENT
    scales = weight.block_scale if isinstance(weight, Nvfp4Weight) else weight.group_scale
    words = weight.packed.view(torch.int32).view(experts, rows, columns, FRAGMENT_WORDS)
    scale = scales.view(torch.int32).view(experts, rows, columns, FRAGMENT)
    form = "nvfp4" if isinstance(weight, Nvfp4Weight) else "int4"
    for first in range(0, experts, TOGETHER):
        some = slice(first, first + TOGETHER)
        found = weight.packed[some].view(torch.int32)
        if isinstance(weight, Nvfp4Weight):
            found, coded = _nvfp4_scales(found, weight.block_scale[some].float())
        else:
            coded = (weight.group_scale[some].float() * 2.0**INT4_LIFT).to(torch.bfloat16)
        words[some] = _blocked(_moved(found, FRAGMENT_BITS[form]))
        scale[some] = coded.view(torch.int32).view(-1, rows, FRAGMENT, columns).transpose(2, 3)
    return FragmentWeight(form, words, scale, weight.row_scale if isinstance(weight, Nvfp4Weight) else None)


def _nvfp4_scales(words: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Words int32 [E, out, in / 8] and scales float32 [E, out, in / 16] -> words, and scales of five bits of exponent
    and three of mantissa, uint8. There is no zero among these, so the values of such a group are made zero; and no
    sign, so theirs change."""
    of_word = scale.repeat_interleave(NVFP4_GROUP // 8, dim=-1)
    words = torch.where(of_word == 0, 0, torch.where(of_word < 0, words ^ _signed(0x88888888), words))
    code = (scale.abs().view(torch.int32) >> 20) - (NVFP4_EXPONENT << 3)
    return words, code.clamp(min=0).to(torch.uint8)


def _moved(words: Tensor, bits: tuple[tuple[int, ...], ...]) -> Tensor:
    """int32 words of eight values, four bits each, lowest first -> the same with bits where `bits` says: all that move
    equally far at once."""
    targets: dict[int, int] = {}
    for value, places in enumerate(bits):
        for bit, place in enumerate(places):
            far = place - (4 * value + bit)
            targets[far] = targets.get(far, 0) | 1 << place
    moved = torch.zeros_like(words)
    for far, target in targets.items():
        moved |= (words << far if far >= 0 else words >> -far) & _signed(target)
    return moved


def _signed(word: int) -> int:
    """32 bits as an int32 has them."""
    return word - (1 << 32) if word >> 31 else word


def _blocked(words: Tensor) -> Tensor:
    """int32 [E, out, in / 8] -> [E, out / 64, in / 64, 512]."""
    experts, out, width = words.shape
    split = words.view(experts, out // FRAGMENT, 4, 2, 8, width // 8, 2, 4)  # warp, half, row; pair, quarter
    return split.permute(0, 1, 5, 2, 4, 7, 3, 6).reshape(experts, out // FRAGMENT, width // 8, FRAGMENT_WORDS)
