"""The small operations around the matmuls: norms, RoPE with the writing of keys and values, and a layer's two joins.

Each reads its rows once and keeps them in registers between the steps that the reference does one by one; everything is
computed in float32 and rounded where it is stored. A join writes rows in the order in which their reader takes them: a
kernel of its own for that takes 2 to 4 us, as long as a join itself. Knows rows and pages, no layers.

Invariant: one program a row (or a row and its heads), so a row's result does not depend on its neighbours. What is
written in an order is, to the bit, what `operands.taken` would make of the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import HOPPER, SHARED_LIMIT
from engine.kernels.grouped import E4M3_CHIPS, FORMATS, ROW_TILES, EightBit, tiling
from engine.kernels.launching import launch
from engine.kernels.linears import ROW_TILES as DENSE_TILES
from engine.kernels.operands import EIGHT_BIT, FRAGMENTS, PLAIN, Operand, Order, Orders, order_for, unwritten, values_of
from engine.kernels.readers import Entrance
from engine.kernels.rounding import in_eight_bit
from engine.kernels.tiles import column_of, rounded, widened

MODEL_WIDTH = 2816
WARPS = 8  # of such a row: twelve numbers a thread
ROW, VECTOR = "*bf16:16", "*fp32:16"


@triton.jit
def _row(pointer, offset, columns, live):
    return widened(tl.load(pointer + offset + columns, mask=live, other=0.0))


@triton.jit
def _vector(pointer, columns, live):
    return tl.load(pointer + columns, mask=live, other=0.0)


@triton.jit
def _as(x, pointer):
    """float32 x rounded to what `pointer` points to."""
    return rounded(x, pointer.dtype.element_ty)


@triton.jit
def _normed(x, width, eps):
    """x / rms(x) of a row whose columns beyond `width` are zero."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)


@triton.jit
def rms_norm_kernel(x, weight, out, width, eps, WEIGHTED: tl.constexpr, LANES: tl.constexpr):
    """out[row] = norm(x[row]) * weight."""
    offset = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, LANES)
    live = columns < width
    result = _normed(_row(x, offset, columns, live), width, eps)
    if WEIGHTED:
        result *= tl.load(weight + columns, mask=live, other=0.0)
    tl.store(out + offset + columns, rounded(result, out.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As `reference.rms_norm`; x contiguous."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    launch(rms_norm_kernel, (x.numel() // width,))(
        x,
        x if weight is None else weight,
        out,
        width,
        eps,
        WEIGHTED=weight is not None,
        LANES=triton.next_power_of_2(width),
        num_warps=WARPS,
    )
    return out


@triton.jit
def qkv_kernel(
    heads, qk_weight, cos, sin, queries, keys, values, where, eps,
    Q: tl.constexpr, KV: tl.constexpr, N: tl.constexpr, D: tl.constexpr, FOLDED_FROM: tl.constexpr,
):  # fmt: skip
    """One program a row and KV of its N heads, so that all of a program's heads are of one sort.

    N = Q + 2 KV: queries, keys, values. N = Q + KV: the keys before their weights and RoPE are the values too.
    Queries are folded in the columns of each half from FOLDED_FROM on; with D // 2 in none.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * KV
    head = first + tl.arange(0, KV)[:, None]
    half = tl.arange(0, D // 2)[None, :]
    source = heads + (row * N + head) * D + half
    left, right = widened(tl.load(source)), widened(tl.load(source + D // 2))
    scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / D + eps)[:, None]
    left, right = left * scale, right * scale
    place = tl.load(where + row).to(tl.int64)
    stored = (place * KV + head - first) * D + half
    kept = (place >= 0) & (half < D)  # a row that only fills up is stored nowhere
    if first >= Q + KV or (first >= Q and N == Q + KV):
        tl.store(values + stored, _as(left, heads), mask=kept)
        tl.store(values + stored + D // 2, _as(right, heads), mask=kept)
    if first < Q + KV:
        weight = qk_weight + head * D + half
        left, right = left * tl.load(weight), right * tl.load(weight + D // 2)
        if FOLDED_FROM < D // 2 and first < Q:
            # rounded once, below: scores are then as far off as the reference's; rounded before too, a sixth further
            key_weight, folded = qk_weight + (Q + head // (Q // KV)) * D + half, half >= FOLDED_FROM
            left *= tl.load(key_weight, mask=folded, other=1.0)
            right *= tl.load(key_weight + D // 2, mask=folded, other=1.0)
        # as the reference: normed heads are rounded before they are turned
        left, right = widened(_as(left, heads)), widened(_as(right, heads))
        turn = row * D + half
        turned = left * widened(tl.load(cos + turn)) + right * widened(tl.load(sin + turn))
        turned_right = right * widened(tl.load(cos + turn + D // 2)) + left * widened(tl.load(sin + turn + D // 2))
        if first < Q:
            target = queries + (row * Q + head) * D + half
            tl.store(target, _as(turned, heads))
            tl.store(target + D // 2, _as(turned_right, heads))
        else:
            tl.store(keys + stored, _as(turned, heads), mask=kept)
            tl.store(keys + stored + D // 2, _as(turned_right, heads), mask=kept)


def qkv_norm_rope_write(
    heads: Tensor,
    qk_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    where: Tensor,
    *,
    folded_from: int | None = None,
) -> Tensor:
    """As `reference.qkv_norm_rope_write`; all contiguous, the number of query heads a multiple of the key heads'.

    `folded_from`: queries come multiplied by their key head's weight in the columns of each half from this one on, for
    who multiplies them there with keys before their weight. RoPE must not turn these.
    """
    rows, count, head_dim = heads.shape
    kv_heads = keys.shape[2]
    query_heads = qk_weight.shape[0] - kv_heads
    queries = heads.new_empty(rows, query_heads, head_dim)
    launch(qkv_kernel, (rows, count // kv_heads))(
        heads, qk_weight, cos, sin, queries, keys, values, where, eps,
        Q=query_heads, KV=kv_heads, N=count, D=head_dim,
        FOLDED_FROM=head_dim // 2 if folded_from is None else folded_from, num_warps=4,
    )  # fmt: skip
    return queries


@triton.jit
def _hand_over(found, target, scale, row, width, columns, live, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Store a row, zero beyond its width and rounded to its dtype, in an order."""
    if FORM == "e4m3":
        values, factor = in_eight_bit(widened(found))
        # Told of no more than 8, Triton gives a thread 8 values of the whole kernel, as without rounding; with the 16
        # that a store of 16 bytes would like, it would add the sums of squares up in another order.
        tl.store(tl.multiple_of(target + row * width + columns, 8), values, mask=live)
        tl.store(scale + row, factor)
    else:
        tl.store(target + row * width + column_of(columns, FORM, BLOCK), found, mask=live)


def _pointers(x: Operand) -> tuple[Tensor, Tensor]:
    """Where the values go, and the scales, if there are any."""
    return values_of(x), x.scale if isinstance(x, EightBit) else values_of(x)


@triton.jit
def join_attention_kernel(
    x, projected, post_weight, mlp_weight, experts_weight, router_weight, h, mlp, mlp_scale, experts, experts_scale,
    router, width, eps, MLP: tl.constexpr, MLP_BK: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_BK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """One program a row: `reference.join_attention`. Everything is asked for before the first sum waits for its row."""
    row = tl.program_id(0).to(tl.int64)
    offset = row * width
    columns = tl.arange(0, LANES)
    live = columns < width
    added, residual = _row(projected, offset, columns, live), _row(x, offset, columns, live)
    post, first = _vector(post_weight, columns, live), _vector(mlp_weight, columns, live)
    second, third = _vector(experts_weight, columns, live), _vector(router_weight, columns, live)
    added = widened(_as(_normed(added, width, eps) * post, x))
    joined = _as(residual + added, x)
    tl.store(h + offset + columns, joined, mask=live)
    normed = _normed(widened(joined), width, eps)
    _hand_over(_as(normed * first, x), mlp, mlp_scale, row, width, columns, live, MLP, MLP_BK)
    _hand_over(_as(normed * second, x), experts, experts_scale, row, width, columns, live, EXPERTS, EXPERTS_BK)
    tl.store(router + offset + columns, _as(normed * third, x), mask=live)


def join_attention(
    x: Tensor,
    projected: Tensor,
    post_weight: Tensor,
    mlp: Entrance,
    experts: Entrance,
    router_weight: Tensor,
    eps: float,
    *,
    orders: Orders,
) -> tuple[Tensor, Operand, Operand, Tensor]:
    """As `reference.join_attention`; all contiguous."""
    rows, width = x.shape
    h, router = x.new_empty(2, rows, width).unbind()
    mlp_order, experts_order = orders(mlp.reader, rows), orders(experts.reader, rows)
    mlp_rows, experts_rows = unwritten(x, mlp_order), unwritten(x, experts_order)
    launch(join_attention_kernel, (rows,))(
        x, projected, post_weight, mlp.norm, experts.norm, router_weight, h, *_pointers(mlp_rows),
        *_pointers(experts_rows), router, width, eps, MLP=mlp_order.form, MLP_BK=mlp_order.block,
        EXPERTS=experts_order.form, EXPERTS_BK=experts_order.block, LANES=triton.next_power_of_2(width),
        num_warps=WARPS,
    )  # fmt: skip
    return h, mlp_rows, experts_rows, router


@triton.jit
def join_layer_kernel(
    h, mlp, parts, shares, mlp_weight, experts_weight, post_weight, scalars, modes, next_weight, x, normed,
    normed_scale, width, eps, A: tl.constexpr, NEXT: tl.constexpr, NEXT_BK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program a row: `reference.join_layer`. Everything is asked for before the first norm waits for its row; the
    experts' parts are summed in the order they were chosen."""
    row = tl.program_id(0).to(tl.int64)
    offset = row * width
    columns = tl.arange(0, LANES)
    live = columns < width
    dense, residual = _row(mlp, offset, columns, live), _row(h, offset, columns, live)
    routed = tl.zeros((LANES,), tl.float32)
    for place in tl.static_range(A):
        routed += _row(parts, (row * A + place) * width, columns, live) * tl.load(shares + row * A + place)
    sparse = widened(_as(routed, h))
    first, second = _vector(mlp_weight, columns, live), _vector(experts_weight, columns, live)
    post, following = _vector(post_weight, columns, live), _vector(next_weight, columns, live)
    # the scalar is rounded first, as transformers multiplies by one of the weights' dtype
    scalar = widened(_as(tl.load(scalars + tl.load(modes + row)), h))
    dense = widened(_as(_normed(dense, width, eps) * first, h))
    sparse = widened(_as(_normed(sparse, width, eps) * second, h))
    both = widened(_as(dense + sparse, h))
    added = _normed(both, width, eps) * post
    joined = widened(_as(residual + widened(_as(added, h)), h))
    joined = _as(joined * scalar, h)
    tl.store(x + offset + columns, joined, mask=live)
    found = _as(_normed(widened(joined), width, eps) * following, h)
    _hand_over(found, normed, normed_scale, row, width, columns, live, NEXT, NEXT_BK)


def join_layer(
    h: Tensor,
    mlp: Tensor,
    parts: Tensor,
    shares: Tensor,
    mlp_weight: Tensor,
    experts_weight: Tensor,
    post_weight: Tensor,
    scalars: Tensor,
    modes: Tensor,
    following: Entrance,
    eps: float,
    *,
    orders: Orders,
) -> tuple[Tensor, Operand]:
    """As `reference.join_layer`; all contiguous."""
    rows, width = h.shape
    order = orders(following.reader, rows)
    x, normed = torch.empty_like(h), unwritten(h, order)
    launch(join_layer_kernel, (rows,))(
        h, mlp, parts, shares, mlp_weight, experts_weight, post_weight, scalars, modes, following.norm, x,
        *_pointers(normed), width, eps, A=shares.shape[1], NEXT=order.form, NEXT_BK=order.block,
        LANES=triton.next_power_of_2(width), num_warps=WARPS,
    )  # fmt: skip
    return x, normed


def cases() -> list[KernelCase]:
    """At the model's shapes: rows of 2816; 16 heads, 8 key heads of 256 and 2 of 512. Joins in the orders that may be
    chosen on a chip: any for the dense layers beside any for the experts, since a checkpoint may store each its way,
    and where all of 8 bit is refused for one of them, that one is decoded."""
    found = [
        KernelCase(
            name=f"rms_norm[{'weighted' if weighted else 'plain'}]",
            kernel=rms_norm_kernel,
            signature={"x": ROW, "weight": VECTOR if weighted else ROW, "out": ROW, "width": "i32:16", "eps": "fp32"},
            constants={"WEIGHTED": weighted, "LANES": 4096},
            num_warps=WARPS,
            num_stages=3,
        )
        for weighted in (True, False)
    ]
    joins: dict[tuple[Order, Order], list[int]] = {}
    layers: dict[Order, list[int]] = {}
    for chip in SHARED_LIMIT:
        split = _orders(chip, DENSE_TILES, gated=False)
        for orders in product(split | _orders(chip, DENSE_TILES, gated=True), _experts_orders(chip)):
            joins.setdefault(orders, []).append(chip)
        for order in split:  # a single matrix follows, or a norm that nobody reads in an order
            layers.setdefault(order, []).append(chip)
    found += [_attention_case(*orders, tuple(chips)) for orders, chips in joins.items()]
    found += [_layer_case(order, tuple(chips)) for order, chips in layers.items()]
    for head_dim, kv_heads, count, folded_from in ((256, 8, 32, 128), (512, 2, 18, 256), (512, 2, 18, 64)):
        folded = ",folded" if folded_from < head_dim // 2 else ""
        found.append(
            KernelCase(
                name=f"qkv[{head_dim}{folded}]",
                kernel=qkv_kernel,
                signature=dict.fromkeys(("heads", "cos", "sin", "queries", "keys", "values"), ROW)
                | {"qk_weight": VECTOR, "where": "*i32:16", "eps": "fp32"},
                constants={"Q": 16, "KV": kv_heads, "N": count, "D": head_dim, "FOLDED_FROM": folded_from},
                num_warps=4,
                num_stages=3,
            )
        )
    return found


def _orders(chip: int, row_tiles: Sequence[int], *, gated: bool) -> dict[Order, None]:
    """How weights of the model's width may want rows on a chip: plain, in 8 bit, or as their tiles decode them."""
    forms = [form for form in FORMATS if form != "e4m3" or chip in E4M3_CHIPS]
    tiles = product(forms, row_tiles)
    return dict.fromkeys(
        order_for(form, tiling(form, bm, MODEL_WIDTH, gated=gated, chip=chip).BK) for form, bm in tiles
    )


def _experts_orders(chip: int) -> dict[Order, None]:
    """The same of experts. Where 4-bit ones lie as fragments, those that do not fit stay as they are."""
    return _orders(chip, ROW_TILES, gated=True) | ({FRAGMENTS: None} if chip == HOPPER else {})


def _handed_over(name: str, order: Order) -> dict[str, str]:
    """The types of rows in an order, and of their scales."""
    if order == EIGHT_BIT:
        return {name: "*fp8e4nv:16", f"{name}_scale": VECTOR}
    return {name: ROW, f"{name}_scale": ROW}


def _join_case(
    name: str, kernel: Any, signature: dict[str, str], sizes: dict[str, int], chips: tuple[int, ...], **orders: Order
) -> KernelCase:
    constants: dict[str, Any] = {"LANES": 4096} | sizes
    for reader, order in orders.items():
        constants |= {reader: order.form, f"{reader}_BK": order.block}
    told = " and ".join(
        order.form if order in (PLAIN, EIGHT_BIT) else " ".join(map(str, order)) for order in orders.values()
    )
    return KernelCase(
        name=f"{name}[{told}]",
        kernel=kernel,
        signature=signature | {"width": "i32:16", "eps": "fp32"},
        constants=constants,
        num_warps=WARPS,
        num_stages=3,
        chips=chips,
    )


def _attention_case(mlp: Order, experts: Order, chips: tuple[int, ...]) -> KernelCase:
    weights = ("post_weight", "mlp_weight", "experts_weight", "router_weight")
    signature = dict.fromkeys(("x", "projected", "h", "router"), ROW) | dict.fromkeys(weights, VECTOR)
    signature |= _handed_over("mlp", mlp) | _handed_over("experts", experts)
    return _join_case("join_attention", join_attention_kernel, signature, {}, chips, MLP=mlp, EXPERTS=experts)


def _layer_case(following: Order, chips: tuple[int, ...]) -> KernelCase:
    weights = ("shares", "mlp_weight", "experts_weight", "post_weight", "scalars", "next_weight")
    signature = dict.fromkeys(("h", "mlp", "parts", "x"), ROW) | dict.fromkeys(weights, VECTOR)
    signature |= {"modes": "*i32:16"} | _handed_over("normed", following)
    return _join_case("join_layer", join_layer_kernel, signature, {"A": 8}, chips, NEXT=following)
