"""What the kernels of the output side do with one tile of a row of logits: softcap and bias, odds, drawing.

Device functions only; launches nothing.

A logit's *height* is its softcapped value plus its bias, its *gap* the row's greatest height minus its own, its *odds*
exp(-gap / temperature): the best id's are 1, and the probability is the odds over their sum.

Invariant: heights do not depend on any temperature, so neither do the best id and its ties. A height is never
infinite: an id that must not be (bias -inf), or that lies beyond the vocabulary, has LOWEST, whose odds are exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.tiles import INTERPRETED, widened

LOWEST = tl.constexpr(-1e30)
# 1 over the least temperature that is told from it: a rate of infinity would make NaN of the best id's gap, which is 0
FASTEST = tl.constexpr(1e30)


@triton.jit
def exp2(x):
    """2^x, float32, x at most about 0; what would be subnormal is 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x for x from 1 to infinity, float32."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def softcapped(logit, softcap):
    """softcap * tanh(logit / softcap), float32: to 2 units of the last place of softcap, never falling.

    With three slow operations a logit in each reading, the exponential included, they and not the memory are what a
    Hopper waits for; so nothing else here may cost much either. Near 0, where 1 - 2 / (exp(2x) + 1) would leave few
    digits, an odd polynomial of least relative error.
    """
    x = logit * (1.0 / softcap)
    square = x * x
    near = -0.0058951569 * square + 0.0207959712
    near = near * square - 0.0537838303
    near = near * square + 0.1333192437
    near = near * square - 0.3333329856
    near = near * square * logit + logit
    far = softcap - (2.0 * softcap) * reciprocal(exp2(tl.abs(x) * 2.8853900817779268) + 1.0)  # 2 log2(e)
    far = (far.to(tl.int32, bitcast=True) | (logit.to(tl.int32, bitcast=True) & -2147483648)).to(
        tl.float32, bitcast=True
    )
    return tl.where(tl.abs(x) < 0.6, near, far)


@triton.jit
def load_logits(logits, ids, vocab, EVEN: tl.constexpr):
    """Logits of ids [N] of the row that `logits` points to, float32. EVEN: no id reaches beyond the vocabulary."""
    if EVEN:
        return widened(tl.load(logits + ids))
    else:
        return widened(tl.load(logits + ids, mask=ids < vocab, other=0.0))


@triton.jit
def lifted(logit, bias, ids, vocab, softcap, BIASED: tl.constexpr, EVEN: tl.constexpr):
    """Heights of the logits of ids [N], float32. `bias` points to the row's."""
    height = softcapped(logit, softcap)
    if BIASED:
        if EVEN:
            height += tl.load(bias + ids)
        else:
            height += tl.load(bias + ids, mask=ids < vocab, other=0.0)
        height = tl.maximum(height, LOWEST)
    if not EVEN:
        height = tl.where(ids < vocab, height, LOWEST)
    return height


@triton.jit
def heights(logits, bias, ids, vocab, softcap, BIASED: tl.constexpr, EVEN: tl.constexpr):
    """Heights of ids [N] of the row that `logits` and `bias` point to, float32."""
    return lifted(load_logits(logits, ids, vocab, EVEN), bias, ids, vocab, softcap, BIASED, EVEN)


@triton.jit
def rate_of(temperature):
    """By which a gap is multiplied to be the logarithm, base 2, of one over its odds."""
    return tl.minimum(1.4426950408889634 / temperature, FASTEST)  # log2(e)


@triton.jit
def first_above(weights, running, target, lanes, N: tl.constexpr):
    """The first of N weights at which their running sum exceeds target, and the sum of those before it.

    Never one of weight 0: where rounding leaves no other, the last that has a weight; 0 if none has (NaN).
    """
    found = tl.min(tl.where((running > target) & (weights > 0), lanes, N), 0)
    found = tl.where(found < N, found, tl.max(tl.where(weights > 0, lanes, 0), 0))
    return found, tl.sum(tl.where(lanes == found - 1, running, 0.0), 0)


@triton.jit
def last(running, lanes, N: tl.constexpr):
    """Of N running sums."""
    return tl.sum(tl.where(lanes == N - 1, running, 0.0), 0)


@triton.jit
def filtered(top_k, top_p, min_p, request_temperature, row, vocab):
    """Whether anything keeps ids from being drawn in this row."""
    k = tl.load(top_k + row)
    narrow = ((k > 0) & (k < vocab)) | (tl.load(top_p + row) < 1) | (tl.load(min_p + row) > 0)
    return narrow & (tl.load(request_temperature + row) > 0)
