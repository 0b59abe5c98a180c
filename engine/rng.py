"""Counter-based random numbers: Philox4x32-10, keyed by a request's seed.

A number is a pure function of (seed, canvas, attempt, step, position): it does not depend on what else runs, on
the order of calls or on the device. Knows nothing of logits or requests.

Invariant: CPU, CUDA and a kernel using the same Philox get the same bits. All arithmetic is int64 with 32-bit masks:
a product of two 32-bit words wraps modulo 2**64, which keeps every bit that the high and low halves need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, seed: int) -> Words:
    """Philox4x32-10 of four counter words (int64 tensors in [0, 2**32), broadcastable) under a 64-bit key.

    The key's low word is the seed's low half, as in Random123 and Triton. Returns four int64 tensors in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & MASK32
        c2 = ((product0 >> 32) ^ c3 ^ k1) & MASK32
        c1, c3 = product1, product0  # only their low halves count: the rest is masked away with the next c0 and c2
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


@dataclass(frozen=True)
class CanvasNoise:
    """All random numbers that one attempt at one canvas can need: row k belongs to denoise pass k.

    Row 0 of `ids` is the initial canvas; row k re-noises after pass k, and row k of `uniforms` draws at pass k.
    """

    ids: Tensor  # int64 [1 + passes, C], uniform over the vocabulary
    uniforms: Tensor  # float32 [1 + passes, C], in [0, 1), 24 bits


def canvas_noise(
    seed: int, *, canvas: int, attempt: int, passes: int, canvas_length: int, vocab_size: int, device: torch.device
) -> CanvasNoise:
    """The noise of canvas number `canvas` of a reply, for up to `passes` denoise passes.

    Counter = (position, pass, canvas, attempt). Made in one go because forty small operations a pass cost more
    than all passes together.
    """
    position = torch.arange(canvas_length, dtype=torch.int64, device=device)[None, :]
    step = torch.arange(passes + 1, dtype=torch.int64, device=device)[:, None]
    constant = torch.zeros_like(position)
    word0, word1, _, _ = philox((position + 0 * step, step + constant, constant + canvas, constant + attempt), seed)
    return CanvasNoise(ids=(word0 * vocab_size) >> 32, uniforms=(word1 >> 8).to(torch.float32) * 2.0**-24)
