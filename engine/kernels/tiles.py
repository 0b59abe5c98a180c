"""What happens inside one tile of a matmul: reading stored weights, decoding them in registers, multiplying.

Device functions only, for plain, fp8, nvfp4 and int4 weights; knows no experts and launches nothing. The decoded
values are those of `weights.dense`, except that nvfp4's row scale (and a power of two) and fp8's row scale are left for `row_factor`, which
the caller applies to the sums.

Weights are the first operand and rows of x the second: so the wide side of a matrix instruction holds weights, which
are many, and the narrow side holds the few rows an expert has; and Hopper's instruction takes a first operand straight
from registers, which is where decoding leaves it.

Invariant: a byte of a 4-bit format holds columns 2i (low) and 2i + 1 (high). They are never interleaved again: the
product is even columns times even weights plus odd times odd, so x comes as `halved`: all even columns, then all odd.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter keeps bfloat16 as raw 16-bit integers and multiplies those, and runs no PTX.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
GELU_CUBIC = tl.constexpr(0.044715)
GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)


def halved(x: Tensor) -> Tensor:
    """x [R, K] -> [R, K] with each row's even columns first: the order in which 4-bit weights are multiplied."""
    rows, width = x.shape
    return torch.stack((x[:, 0::2], x[:, 1::2]), dim=1).view(rows, width)


@triton.jit
def dot(left, right, acc):  # type: ignore[no-untyped-def]
    """acc + left @ right, summed in float32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc)


@triton.jit
def gelu_tanh(x):  # type: ignore[no-untyped-def]
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), float32: with 1 + tanh(z) = 2 / (1 + exp(-2z))."""
    return x / (1.0 + tl.exp(-GELU_SLOPE * (x + GELU_CUBIC * x * x * x)))


@triton.jit
def _e4m3(byte):  # type: ignore[no-untyped-def]
    """uint8 -> its e4m3 value times 2^-120, float32: the exponent's four bits moved to where float32 has its lowest.

    Chips before 89 cannot convert e4m3; this works on all, subnormal values included. e4m3's NaN is no weight.
    """
    bits = byte.to(tl.int32)
    return (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)


@triton.jit
def _spread(scale, per_scale: tl.constexpr):  # type: ignore[no-untyped-def]
    """[N, G] -> [N, G * per_scale], each column repeated."""
    n: tl.constexpr = scale.shape[0]
    groups: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.broadcast_to(scale[:, :, None], (n, groups, per_scale)), (n, groups * per_scale))


@triton.jit
def _nvfp4_pair(packed, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes [N, B] and e4m3 scales [N, B / 8] as bytes -> values of the low and of the high nibbles, times 2^-8.

    e2m1's exponent is moved to where float32 has its lowest two bits, which makes 2^-126 of the value; the scale is
    lifted by 2^118, the most that keeps the largest finite. The product has 6 significant bits: exact in bfloat16.
    """
    bits = packed.to(tl.int32)
    factor = _spread(_e4m3(scale) * 2.0**120 * 2.0**118, 8)
    low = (((bits & 0x08) << 28) | ((bits & 0x07) << 22)).to(tl.float32, bitcast=True)
    high = (((bits & 0x80) << 24) | ((bits & 0x70) << 18)).to(tl.float32, bitcast=True)
    return (low * factor).to(dtype), (high * factor).to(dtype)


@triton.jit
def _int4_pair(packed, scale, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes [N, B] and bfloat16 scales [N, B / 16] -> values of the low and of the high nibbles.

    A nibble in the lowest bits of 2^23 is that number plus the nibble: no slow integer conversion.
    """
    bits = packed.to(tl.int32)
    factor = _spread(scale.to(tl.float32), 16)
    low = ((bits & 0x0F) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    high = ((bits >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return (low * factor).to(dtype), (high * factor).to(dtype)


@triton.jit
def x_tile(x, rows, k, width, BK: tl.constexpr, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns k to k + BK of rows [BM] of x [*, width], transposed: [BK, BM]; zero beyond `width`."""
    columns = k + tl.arange(0, BK)[:, None]
    pointers = x + rows[None, :] * width + columns
    return tl.load(pointers) if EVEN_K else tl.load(pointers, mask=columns < width, other=0.0)


@triton.jit
def _columns(base, n, k, width, BK: tl.constexpr, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns k to k + BK of rows n [BN] of a matrix [*, width]: [BN, BK]; zero beyond `width`."""
    columns = k + tl.arange(0, BK)[None, :]
    pointers = base + n[:, None] * width + columns
    # read once by the few tiles that run side by side, so not worth a place in the cache afterwards
    if EVEN_K:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=columns < width, other=0, eviction_policy="evict_first")


@triton.jit
def accumulate(acc, x0, x1, weight, scale, n, k, K, FORMAT: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc [BN, BM] + weight[n, k : k + BK] @ x. n int64 [BN], rows of `weight` and `scale` (already in the expert).

    Plain and fp8: x0 [BK, BM], x1 the same. 4-bit: x0, x1 [BK / 2, BM], even and odd columns.
    """
    if FORMAT == "plain":
        acc = dot(_columns(weight, n, k, K, BK, EVEN_K), x0, acc)
    elif FORMAT == "fp8":
        values = _e4m3(_columns(weight, n, k, K, BK, EVEN_K)) * 2.0**120
        acc = dot(values.to(x0.dtype), x0, acc)
    else:
        packed = _columns(weight, n, k // 2, K // 2, BK // 2, EVEN_K)
        if FORMAT == "nvfp4":
            low, high = _nvfp4_pair(packed, _columns(scale, n, k // 16, K // 16, BK // 16, EVEN_K), x0.dtype)
        else:
            low, high = _int4_pair(packed, _columns(scale, n, k // 32, K // 32, BK // 32, EVEN_K), x0.dtype)
        acc = dot(low, x0, acc)
        acc = dot(high, x1, acc)
    return acc


@triton.jit
def load_x(x, rows, k, K, FORMAT: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two tiles of x that `accumulate` wants. rows int64 [BM]."""
    if FORMAT == "plain" or FORMAT == "fp8":
        x0 = x_tile(x, rows, k, K, BK, EVEN_K)
        x1 = x0
    else:  # a row of x is its even half, then its odd half: one matrix [2R, K / 2]
        x0 = x_tile(x, rows * 2, k // 2, K // 2, BK // 2, EVEN_K)
        x1 = x_tile(x, rows * 2 + 1, k // 2, K // 2, BK // 2, EVEN_K)
    return x0, x1


@triton.jit
def row_factor(row_scale, n, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the sums of rows n [BN] are still to be multiplied by: float32 [BN, 1]."""
    if FORMAT == "fp8":
        return tl.load(row_scale + n)[:, None]
    elif FORMAT == "nvfp4":
        return tl.load(row_scale + n)[:, None] * 256.0
    else:
        return tl.full((n.shape[0], 1), 1.0, tl.float32)
