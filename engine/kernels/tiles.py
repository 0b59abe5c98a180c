"""What happens inside one tile of a matmul: reading stored weights, decoding them in registers, multiplying.

Device functions only, for plain, fp8, nvfp4 and int4 weights; knows no experts and launches nothing. The decoded
values are those of `weights.dense`, except that the row scale of fp8 and nvfp4 (and a power of two) is left for
`row_factor`, by which the caller multiplies the sums.

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

# Triton's interpreter keeps bfloat16 as raw 16-bit integers, multiplies those, truncates where a GPU rounds and spoils
# zeros; and it runs no PTX. `rounded`, `widened` and `dot` go around that, and on a GPU are the plain operations.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def halved(x: Tensor) -> Tensor:
    """x [R, K] -> [R, K] with each row's even columns first: the order in which 4-bit weights are multiplied."""
    rows, width = x.shape
    return torch.stack((x[:, 0::2], x[:, 1::2]), dim=1).view(rows, width)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in `dtype`, to the nearest, ties to even."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            up = bits + 0x7FFF + ((bits >> 16) & 1)
            bits = tl.where((bits & 0x7F800000) == 0x7F800000, bits, up) >> 16
            return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def widened(x):
    """x in float32."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def dot(left, right, acc):
    """acc + left @ right, summed in float32."""
    if INTERPRETED:
        left, right = widened(left), widened(right)
    return tl.dot(left, right, acc)


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), float32: with 1 + tanh(z) = 2 / (1 + exp(-2z))."""
    twice_root = 1.5957691216057308  # 2 sqrt(2/pi)
    return x / (1.0 + tl.exp(-twice_root * (x + 0.044715 * x * x * x)))


@triton.jit
def _e4m3(byte):
    """uint8 -> its e4m3 value times 2^-120, float32: the exponent's four bits moved to where float32 has its lowest.

    Chips before 89 cannot convert e4m3; this works on all, subnormal values included. e4m3's NaN is no weight.
    """
    bits = byte.to(tl.int32)
    return (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)


@triton.jit
def _spread(scale, per_scale: tl.constexpr):
    """[N, G] -> [N, G * per_scale], each column repeated."""
    n: tl.constexpr = scale.shape[0]
    groups: tl.constexpr = scale.shape[1]
    return tl.reshape(tl.broadcast_to(scale[:, :, None], (n, groups, per_scale)), (n, groups * per_scale))


# Four bytes at a time, two bfloat16 values a register: about two instructions a value, where the same in float32, which
# the interpreter runs, takes six or more and would leave a chip with fast memory waiting for its arithmetic.
# `prmt` puts a byte into each half of a register; `lop3 0xEA` is (a & b) | c; a sum with -0 makes fma a product.
_E4M3_ASM = tl.constexpr("""{
.reg .b32 p, s, scale, nought;
mov.b32 scale, 0x7B807B80; mov.b32 nought, 0x80008000;
prmt.b32 p, $2, 0, 0x1404; shr.b32 s, p, 4; and.b32 s, s, 0x07F007F0;
lop3.b32 s, p, 0x80008000, s, 0xEA; fma.rn.bf16x2 $0, s, scale, nought;
prmt.b32 p, $2, 0, 0x3424; shr.b32 s, p, 4; and.b32 s, s, 0x07F007F0;
lop3.b32 s, p, 0x80008000, s, 0xEA; fma.rn.bf16x2 $1, s, scale, nought;
}""")
_NVFP4_ASM = tl.constexpr("""{
.reg .b32 p, s, t, nought;
mov.b32 nought, 0x80008000;
prmt.b32 p, $4, 0, 0x1404;
shr.b32 s, p, 2; and.b32 s, s, 0x01C001C0; shl.b32 t, p, 4;
lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 $0, s, $5, nought;
shr.b32 s, p, 6; and.b32 s, s, 0x01C001C0;
lop3.b32 s, p, 0x80008000, s, 0xEA; fma.rn.bf16x2 $2, s, $5, nought;
prmt.b32 p, $4, 0, 0x3424;
shr.b32 s, p, 2; and.b32 s, s, 0x01C001C0; shl.b32 t, p, 4;
lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 $1, s, $6, nought;
shr.b32 s, p, 6; and.b32 s, s, 0x01C001C0;
lop3.b32 s, p, 0x80008000, s, 0xEA; fma.rn.bf16x2 $3, s, $6, nought;
}""")
_INT4_ASM = tl.constexpr("""{
.reg .b32 p, s, one, less, base, nought;
mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; mov.b32 base, 0x43004300; mov.b32 nought, 0x80008000;
prmt.b32 p, $4, 0, 0x4140;
lop3.b32 s, p, 0x000F000F, base, 0xEA; fma.rn.bf16x2 s, s, one, less; fma.rn.bf16x2 $0, s, $5, nought;
shr.b32 p, p, 4;
lop3.b32 s, p, 0x000F000F, base, 0xEA; fma.rn.bf16x2 s, s, one, less; fma.rn.bf16x2 $2, s, $5, nought;
prmt.b32 p, $4, 0, 0x4342;
lop3.b32 s, p, 0x000F000F, base, 0xEA; fma.rn.bf16x2 s, s, one, less; fma.rn.bf16x2 $1, s, $6, nought;
shr.b32 p, p, 4;
lop3.b32 s, p, 0x000F000F, base, 0xEA; fma.rn.bf16x2 s, s, one, less; fma.rn.bf16x2 $3, s, $6, nought;
}""")


@triton.jit
def _fp8_values(byte, dtype: tl.constexpr):
    """e4m3 bytes -> their values."""
    if INTERPRETED or dtype != tl.bfloat16:
        return rounded(_e4m3(byte) * 2.0**120, dtype)
    else:
        return tl.inline_asm_elementwise(_E4M3_ASM, "=r,=r,r", [byte], tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def _nvfp4_pair(packed, scale, dtype: tl.constexpr):
    """Bytes [N, B] and e4m3 scales [N, B / 8] as bytes -> values of the low and of the high nibbles, times 2^-8.

    e2m1's exponent is moved to where the float has its lowest two bits, which makes 2^-126 of the value; the scale is
    lifted by 2^118, the most that keeps the largest finite. The product has 6 significant bits: exact in bfloat16.
    """
    lifted = _e4m3(scale) * 2.0**120 * 2.0**118
    if INTERPRETED or dtype != tl.bfloat16:
        bits, factor = packed.to(tl.int32), _spread(lifted, 8)
        low = (((bits & 0x08) << 28) | ((bits & 0x07) << 22)).to(tl.float32, bitcast=True)
        high = (((bits & 0x80) << 24) | ((bits & 0x70) << 18)).to(tl.float32, bitcast=True)
        return rounded(low * factor, dtype), rounded(high * factor, dtype)
    else:
        factor = _spread(lifted.to(tl.bfloat16), 8)
        return tl.inline_asm_elementwise(
            _NVFP4_ASM, "=r,=r,=r,=r,r,r,r", [packed, factor], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )


@triton.jit
def _int4_pair(packed, scale, dtype: tl.constexpr):
    """Bytes [N, B] and bfloat16 scales [N, B / 16] -> values of the low and of the high nibbles.

    A nibble in the lowest bits of 2^23 (or, in bfloat16, 2^7) is that number plus the nibble: no slow integer
    conversion, and taking away 8 more is exact.
    """
    if INTERPRETED or dtype != tl.bfloat16:
        bits, factor = packed.to(tl.int32), _spread(widened(scale), 16)
        low = ((bits & 0x0F) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
        high = ((bits >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
        return rounded(low * factor, dtype), rounded(high * factor, dtype)
    else:
        factor = _spread(scale, 16)
        return tl.inline_asm_elementwise(
            _INT4_ASM, "=r,=r,=r,=r,r,r,r", [packed, factor], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )


@triton.jit
def x_tile(x, rows, k, width, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns k to k + BK of rows [BM] of x [*, width], transposed: [BK, BM]; zero beyond `width`."""
    columns = k + tl.arange(0, BK)[:, None]
    pointers = x + rows[None, :] * width + columns
    return tl.load(pointers) if EVEN_K else tl.load(pointers, mask=columns < width, other=0.0)


@triton.jit
def _columns(base, n, k, width, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns k to k + BK of rows n [BN] of a matrix [*, width]: [BN, BK]; zero beyond `width`."""
    columns = k + tl.arange(0, BK)[None, :]
    pointers = base + n[:, None] * width + columns
    # read once by the few tiles that run side by side, so not worth a place in the cache afterwards
    if EVEN_K:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=columns < width, other=0, eviction_policy="evict_first")


@triton.jit
def accumulate(acc, x0, x1, weight, scale, n, k, K, FORMAT: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """acc [BN, BM] + weight[n, k : k + BK] @ x. n int64 [BN], rows of `weight` and `scale` (already in the expert).

    Plain and fp8: x0 [BK, BM], x1 the same. 4-bit: x0, x1 [BK / 2, BM], even and odd columns.
    """
    if FORMAT == "plain":
        acc = dot(_columns(weight, n, k, K, BK, EVEN_K), x0, acc)
    elif FORMAT == "fp8":
        acc = dot(_fp8_values(_columns(weight, n, k, K, BK, EVEN_K), x0.dtype), x0, acc)
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
def load_x(x, rows, k, K, FORMAT: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """The two tiles of x that `accumulate` wants. rows int64 [BM]."""
    if FORMAT == "plain" or FORMAT == "fp8":
        x0 = x_tile(x, rows, k, K, BK, EVEN_K)
        x1 = x0
    else:  # a row of x is its even half, then its odd half: one matrix [2R, K / 2]
        x0 = x_tile(x, rows * 2, k // 2, K // 2, BK // 2, EVEN_K)
        x1 = x_tile(x, rows * 2 + 1, k // 2, K // 2, BK // 2, EVEN_K)
    return x0, x1


@triton.jit
def row_factor(row_scale, n, FORMAT: tl.constexpr):
    """What the sums of rows n [BN] are still to be multiplied by: float32 [BN, 1]."""
    if FORMAT == "fp8":
        return tl.load(row_scale + n)[:, None]
    elif FORMAT == "nvfp4":
        return tl.load(row_scale + n)[:, None] * 256.0
    else:
        return tl.full((n.shape[0], 1), 1.0, tl.float32)
