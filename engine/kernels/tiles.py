"""What happens inside one tile of a matmul: reading stored weights, decoding them in registers, multiplying.

Device functions only, for plain, fp8, nvfp4 and int4 weights; knows no experts and launches nothing. The decoded
values are those of `weights.dense`, except that the row scale of fp8 and nvfp4 (and a power of two) is left for
`row_factor`, by which the caller multiplies the sums. A fifth form, e4m3, is fp8 weights that are multiplied as they
are: x has then been rounded to 8 bit too, each row by a scale of its own (`round_rows`).

Weights are the first operand and rows of x the second: so the wide side of a matrix instruction holds weights, which
are many, and the narrow side holds the few rows an expert has; and Hopper's instruction takes a first operand straight
from registers, which is where decoding leaves it.

Invariant: a word of 32 bits is decoded into pairs of values that lie 16 bits apart in it, and pairs stay together; rows
and columns are numbered so that decoded values stay in the thread that decoded them. The product does not care about
the order of columns, so x comes `ordered` the same way; rows are put right where results are stored.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter keeps bfloat16 as raw 16-bit integers, multiplies those, truncates where a GPU rounds and spoils
# zeros; and it runs no PTX. `rounded`, `widened` and `dot` go around that, and on a GPU are the plain operations.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def ordered(x: Tensor, form: str, block: int) -> Tensor:
    """x [R, K] with its columns in the order in which a format's words are decoded, `block` columns together: that of
    `column_of`."""
    if form in ("plain", "e4m3"):
        return x
    rows, width = x.shape
    if form == "fragment":  # quarter, two bits of the pair, half of a pair -> pair, quarter, half of a pair
        split = x.view(rows, width // 32, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5)
    elif form == "fp8":  # quarter, word, half of a pair, pair -> word, pair, quarter, half of a pair
        split = x.view(rows, width // block, 4, block // 16, 2, 2).permute(0, 1, 3, 5, 2, 4)
    else:
        split = x.view(rows, width // block, 4, block // 32, 2, 2, 2).permute(0, 1, 3, 5, 6, 2, 4)
    return split.reshape(rows, width)


@triton.jit
def column_of(n, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """Where `ordered` puts column n."""
    start = n // BLOCK * BLOCK
    quarter = n // (BLOCK // 4) % 4
    if FORMAT == "plain" or FORMAT == "e4m3":
        return n
    elif FORMAT == "fragment":
        return n // 32 * 32 + n // 4 % 2 * 16 + n // 2 % 2 * 8 + n // 8 % 4 * 2 + n % 2
    elif FORMAT == "fp8":
        return start + n // 4 % (BLOCK // 16) * 16 + n % 2 * 8 + quarter * 2 + n // 2 % 2
    else:
        return start + n // 8 % (BLOCK // 32) * 32 + n // 2 % 2 * 16 + n % 2 * 8 + quarter * 2 + n // 4 % 2


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
def dot(left, right, acc, imprecise: tl.constexpr = None):
    """acc + left @ right, summed in float32; 8-bit operands: so many products at a time as exactly as the chip can."""
    if INTERPRETED:
        left, right = widened(left), widened(right)
    return tl.dot(left, right, acc, max_num_imprecise_acc=imprecise)


@triton.jit
def to_e4m3(x):
    """float32 x, at most 448, in e4m3, to the nearest, ties to even."""
    if INTERPRETED:  # which truncates: only what is exact already survives that
        exponent = (tl.abs(x).to(tl.int32, bitcast=True) >> 23) - 127
        step = ((tl.maximum(exponent, -6) - 3 + 127) << 23).to(tl.float32, bitcast=True)
        x = (x / step + 12582912.0 - 12582912.0) * step
    return x.to(tl.float8e4nv)


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


# A word at a time, whose values 16 bits apart make a register of two bfloat16 each with no more than shifts and masks:
# two to three instructions a value. The same in float32, which the interpreter runs, takes six or more and would leave
# a chip with fast memory waiting for its arithmetic. `lop3 0xEA` is (a & b) | c; a sum with -0 makes fma a product.
_E4M3_ASM = tl.constexpr("""{
.reg .b32 s, t, v0, v1, lift, nought;
mov.b32 lift, 0x7B807B80; mov.b32 nought, 0x80008000;
shl.b32 s, $4, 4; and.b32 s, s, 0x07F007F0; shl.b32 t, $4, 8;
lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 v0, s, lift, nought;
shr.b32 s, $4, 4; and.b32 s, s, 0x07F007F0;
lop3.b32 s, $4, 0x80008000, s, 0xEA; fma.rn.bf16x2 v1, s, lift, nought;
mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1;
}""")
# The scale twice in a register: moved to where bfloat16 has its exponent, which makes 2^-120 of e4m3's value, and
# lifted by 2^238 in two steps.
_SCALE_ASM = tl.constexpr("""{
.reg .b32 s, lift, nought;
mov.b32 lift, 0x7B007B00; mov.b32 nought, 0x80008000;
prmt.b32 s, $1, 0, 0x4040; shl.b32 s, s, 4; fma.rn.bf16x2 s, s, lift, nought; fma.rn.bf16x2 $0, s, lift, nought;
}""")
_NVFP4_ASM = tl.constexpr("""{
.reg .b32 s, t, v0, v1, v2, v3, nought;
mov.b32 nought, 0x80008000;
shl.b32 s, $8, 6; and.b32 s, s, 0x01C001C0; shl.b32 t, $8, 12;
lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 v0, s, $9, nought;
shl.b32 s, $8, 2; and.b32 s, s, 0x01C001C0; shl.b32 t, $8, 8;
lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 v1, s, $9, nought;
shr.b32 s, $8, 2; and.b32 s, s, 0x01C001C0; shl.b32 t, $8, 4;
lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 v2, s, $9, nought;
shr.b32 s, $8, 6; and.b32 s, s, 0x01C001C0; mov.b32 t, $8;
lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 v3, s, $9, nought;
mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1; mov.b32 {$4,$5}, v2; mov.b32 {$6,$7}, v3;
}""")
_INT4_ASM = tl.constexpr("""{
.reg .b32 s, v0, v1, v2, v3, one, less, base, nought;
mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; mov.b32 base, 0x43004300; mov.b32 nought, 0x80008000;
mov.b32 s, $8; lop3.b32 s, s, 0x000F000F, base, 0xEA;
fma.rn.bf16x2 s, s, one, less; fma.rn.bf16x2 v0, s, $9, nought;
shr.b32 s, $8, 4; lop3.b32 s, s, 0x000F000F, base, 0xEA;
fma.rn.bf16x2 s, s, one, less; fma.rn.bf16x2 v1, s, $9, nought;
shr.b32 s, $8, 8; lop3.b32 s, s, 0x000F000F, base, 0xEA;
fma.rn.bf16x2 s, s, one, less; fma.rn.bf16x2 v2, s, $9, nought;
shr.b32 s, $8, 12; lop3.b32 s, s, 0x000F000F, base, 0xEA;
fma.rn.bf16x2 s, s, one, less; fma.rn.bf16x2 v3, s, $9, nought;
mov.b32 {$0,$1}, v0; mov.b32 {$2,$3}, v1; mov.b32 {$4,$5}, v2; mov.b32 {$6,$7}, v3;
}""")


# Which thread of a matrix instruction wants which value of the first operand is given by the instruction; which thread
# loads which word, by the width of a load. Where rows and columns are numbered so that both are the same thread,
# decoded values need not travel through shared memory. Of a block's columns, four threads hold a quarter each; of 64
# rows, four warps hold eight in each half.


@triton.jit
def row_of(i, FORMAT: tl.constexpr):
    """Which row of a tile of weights, as loaded, is the i-th of the product."""
    if FORMAT == "plain" or FORMAT == "e4m3":
        return i
    return i // 64 * 64 + i // 8 % 2 * 32 + i // 16 % 4 * 8 + i % 8


@triton.jit
def in_order(made, FORMAT: tl.constexpr, FOLLOWING: tl.constexpr, BLOCK: tl.constexpr):
    """[N, M] whose rows are as `row_of` says -> as `column_of` puts them for what follows. Stored with the numbers of
    its columns instead, a thread would store one number at a time: Triton sees no neighbours in permuted numbers."""
    n: tl.constexpr = made.shape[0]
    m: tl.constexpr = made.shape[1]
    if FORMAT != "plain" and FORMAT != "e4m3":
        made = tl.reshape(tl.permute(tl.reshape(made, (n // 64, 4, 2, 8, m)), (0, 2, 1, 3, 4)), (n, m))
    if FOLLOWING == "fp8":
        split = tl.reshape(made, (n // BLOCK, 4, BLOCK // 16, 2, 2, m))
        made = tl.reshape(tl.permute(split, (0, 2, 4, 1, 3, 5)), (n, m))
    elif FOLLOWING != "plain":
        split = tl.reshape(made, (n // BLOCK, 4, BLOCK // 32, 2, 2, 2, m))
        made = tl.reshape(tl.permute(split, (0, 2, 4, 5, 1, 3, 6)), (n, m))
    return made


@triton.jit
def _arranged4(a, b, c, d):
    """Two pairs (a, b), (c, d) of each word [N, W] -> [N, 4 W]: rows as `row_of` says, columns `ordered`."""
    n: tl.constexpr = a.shape[0]
    w: tl.constexpr = a.shape[1]
    pairs = tl.join(tl.join(a, b), tl.join(c, d))  # [N, W, in the pair, pair]
    split = tl.reshape(pairs, (n // 64, 2, 4, 8, 4, w // 4, 2, 2))
    return tl.reshape(tl.permute(split, (0, 2, 1, 3, 5, 7, 4, 6)), (n, 4 * w))


@triton.jit
def _arranged8(a, b, c, d, e, f, g, h):
    """Four pairs (a, b), ... of each word [N, W] -> [N, 8 W]: rows as `row_of` says, columns `ordered`."""
    n: tl.constexpr = a.shape[0]
    w: tl.constexpr = a.shape[1]
    first, second = tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h))
    pairs = tl.join(first, second)  # [N, W, in the pair, pair % 2, pair // 2]
    split = tl.reshape(pairs, (n // 64, 2, 4, 8, 4, w // 4, 2, 2, 2))
    return tl.reshape(tl.permute(split, (0, 2, 1, 3, 5, 8, 7, 4, 6)), (n, 8 * w))


@triton.jit
def _byte(words, place: tl.constexpr):
    return (words >> (8 * place)) & 0xFF


@triton.jit
def _fp8_values(words, dtype: tl.constexpr):
    """Four e4m3 bytes a word [N, W] -> values [N, 4 W]."""
    if INTERPRETED or dtype != tl.bfloat16:
        a, b = rounded(_e4m3(_byte(words, 0)) * 2.0**120, dtype), rounded(_e4m3(_byte(words, 2)) * 2.0**120, dtype)
        c, d = rounded(_e4m3(_byte(words, 1)) * 2.0**120, dtype), rounded(_e4m3(_byte(words, 3)) * 2.0**120, dtype)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _E4M3_ASM,
            "=h,=h,=h,=h,r",
            [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    return _arranged4(a, b, c, d)


@triton.jit
def _scales(scale, n, k, K, GROUP: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr):
    """The scale of each of BK / 8 words of weights from column k on, int32 [N, BK / 8], in the lowest BITS bits.

    `scale` [*, K / 64] int32, rows n; GROUP words of weights share a scale. Every thread shifts out what it needs: none
    waits for another.
    """
    word = tl.arange(0, BK // 8)[None, :]
    pointers = scale + n * (K // 64) + k // 64
    if BK == 128:  # two words at one load
        first, second = tl.split(tl.load(pointers[:, None] + tl.arange(0, 2)[None, :]))
        found = tl.where(word < 8, first[:, None], second[:, None])
    else:
        found = tl.load(pointers)[:, None]
    return (found >> (word % 8 // GROUP * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _e2m1(words, factor, place: tl.constexpr, dtype: tl.constexpr):
    bits = words >> (4 * place)
    value = (((bits & 0x08) << 28) | ((bits & 0x07) << 22)).to(tl.float32, bitcast=True)
    return rounded(value * factor, dtype)


@triton.jit
def _nvfp4_values(words, scale, dtype: tl.constexpr):
    """Eight nibbles a word and its e4m3 scale, both [N, W] -> values [N, 8 W] times 2^-8.

    e2m1's exponent is moved to where the float has its lowest two bits, which makes 2^-126 of the value; the scale is
    lifted by 2^118, the most that keeps the largest finite. The product has 6 significant bits: exact in bfloat16.
    """
    if INTERPRETED or dtype != tl.bfloat16:
        f = _e4m3(scale) * 2.0**120 * 2.0**118
        return _arranged8(
            _e2m1(words, f, 0, dtype), _e2m1(words, f, 4, dtype), _e2m1(words, f, 1, dtype), _e2m1(words, f, 5, dtype),
            _e2m1(words, f, 2, dtype), _e2m1(words, f, 6, dtype), _e2m1(words, f, 3, dtype), _e2m1(words, f, 7, dtype),
        )  # fmt: skip
    else:
        factor = tl.inline_asm_elementwise(_SCALE_ASM, "=r,r", [scale], tl.int32, is_pure=True, pack=1)
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _NVFP4_ASM,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [words, factor],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
        return _arranged8(a, b, c, d, e, f, g, h)


@triton.jit
def _int4(words, factor, place: tl.constexpr, dtype: tl.constexpr):
    value = (((words >> (4 * place)) & 0x0F) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return rounded(value * factor, dtype)


@triton.jit
def _int4_values(words, scale, dtype: tl.constexpr):
    """Eight nibbles a word and its bfloat16 scale, both [N, W] -> values [N, 8 W].

    A nibble in the lowest bits of 2^23 (or, in bfloat16, 2^7) is that number plus the nibble: no slow integer
    conversion, and taking away 8 more is exact.
    """
    if INTERPRETED or dtype != tl.bfloat16:
        f = (scale << 16).to(tl.float32, bitcast=True)
        return _arranged8(
            _int4(words, f, 0, dtype), _int4(words, f, 4, dtype), _int4(words, f, 1, dtype), _int4(words, f, 5, dtype),
            _int4(words, f, 2, dtype), _int4(words, f, 6, dtype), _int4(words, f, 3, dtype), _int4(words, f, 7, dtype),
        )  # fmt: skip
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _INT4_ASM,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [words, scale | (scale << 16)],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
        return _arranged8(a, b, c, d, e, f, g, h)


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
    elif base.dtype.element_ty == tl.float8e4nv:  # of which Triton makes no integer 0
        return tl.load(pointers, mask=columns < width, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=columns < width, other=0, eviction_policy="evict_first")


@triton.jit
def decoded(weight, scale, n, k, K, FORMAT: tl.constexpr, dtype: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """weight[n, k : k + BK], less `row_factor`: [BN, BK]. n int64 [BN], rows of `weight` and `scale` (already in the
    expert).

    What is decoded is a matrix of int32 words; of the result, rows are numbered as `row_of` says and columns `ordered`
    in blocks of BK. 4-bit: `scale` too is a matrix of words, each of which holds the scales of 64 columns; BK is 64 or
    128 and divides K.
    """
    if FORMAT == "plain" or FORMAT == "e4m3":
        return _columns(weight, n, k, K, BK, EVEN_K)
    elif FORMAT == "fp8":
        return _fp8_values(_columns(weight, n, k // 4, K // 4, BK // 4, EVEN_K), dtype)
    else:
        width = K // 8
        if BK == 128:  # four words at a load, not two, as the order of columns assumes
            width = tl.multiple_of(width, 16)
        words = _columns(weight, n, k // 8, width, BK // 8, EVEN_K)
        if FORMAT == "nvfp4":
            return _nvfp4_values(words, _scales(scale, n, k, K, 2, 8, BK), dtype)
        else:
            return _int4_values(words, _scales(scale, n, k, K, 4, 16, BK), dtype)


@triton.jit
def accumulate(acc, x, weight, scale, n, k, K, FORMAT: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """acc [BN, BM] + `decoded` weights @ x [BK, BM]; x comes `ordered` the same way."""
    values = decoded(weight, scale, n, k, K, FORMAT, x.dtype, BK, EVEN_K)
    if FORMAT == "e4m3":  # Hopper sums 8-bit products in 14 bits: every BK columns they are added up in float32
        return dot(values, x, acc, BK)
    return dot(values, x, acc, None)


@triton.jit
def row_factor(row_scale, n, FORMAT: tl.constexpr):
    """What the sums of rows n [BN] are still to be multiplied by: float32 [BN, 1]."""
    if FORMAT == "fp8" or FORMAT == "e4m3":
        return tl.load(row_scale + n)[:, None]
    elif FORMAT == "nvfp4":
        return tl.load(row_scale + n)[:, None] * 256.0
    else:
        return tl.full((n.shape[0], 1), 1.0, tl.float32)
