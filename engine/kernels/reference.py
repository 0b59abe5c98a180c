"""Every op of the model in plain torch: the specification, and what runs on a CPU.

Pure functions, gathered in `REFERENCE`. Another op set has the same signatures and must agree with these.
Knows tensors, pages and views only: no config, no layers, no slots.

Invariant: norms, router probabilities and expert sums are computed in float32 whatever the dtype of the rows. What
follows the head is in `reference_output`, how a canvas begins in `reference_canvas`.

Shapes: R rows, M hidden, H heads, K kv heads, D head dim, E experts, A active experts, I MLP width, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.readers import Entrance, Experts, Mlp
from engine.kernels.reference_canvas import CanvasStart, CanvasState, start_canvas
from engine.kernels.reference_output import Draw, Reading, read_logits, soft_embedding
from engine.kernels.views import AttentionView, Segment
from engine.kernels.weights import Weight, dense, expert, shape
from engine.pages import PAGE

# A matmul on a CPU takes another way, with other rounding, for fewer rows; with at least these a row's result does not
# depend on how many there are, so neither does a reply on what is served beside it.
ROWS = 16
# Always a multiple of ROWS: many threads may get too few of any other number. In bfloat16, oneDNN moreover makes and
# keeps 0.7 MB of code for every number of rows it meets: so there are not more than this at a time.
MOST_ROWS = 256

# gelu_tanh's exponent is (_LINEAR + _CUBIC x**2) x
_LINEAR = -2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. x [..., D]; weight float32 [D], None = ones; same dtype as x."""
    return _normed(x, weight, eps).to(x.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same in float32. Half as many passes over x as torch's own takes on a CPU."""
    wide = x.float()
    mean_square: Tensor = torch.linalg.vecdot(wide, wide).div_(x.shape[-1])
    normed: Tensor = wide * mean_square.add_(eps).rsqrt_()[..., None]
    return normed if weight is None else normed.mul_(weight)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [R, in] @ weight [out, in] transposed -> [R, out]."""
    return _times(x, dense(weight, x.dtype))


def qkv_norm_rope_write(
    heads: Tensor,
    qk_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    where: Tensor,
) -> Tensor:
    """Per-head norms of the projected q, k, v and RoPE of q and k; store k and v, return q [R, H, D].

    heads [R, H + 2K, D] holds q, k, v; or [R, H + K, D] where v is the raw k. qk_weight float32 [H + K, D].
    cos [R, D]; sin [R, D] with its first half negated, so that rotating is a swap of halves. Dtype of heads.
    keys, values [pages, PAGE, K, D] are written at page * PAGE + offset = where, int32 [R], no two rows alike.
    """
    head_dim, kv_heads = keys.shape[3], keys.shape[2]
    count = qk_weight.shape[0]
    normed = _normed(heads, None, eps)
    rotated = rope((normed[:, :count] * qk_weight).to(heads.dtype), cos, sin)
    keys.view(-1, kv_heads, head_dim)[where] = rotated[:, count - kv_heads :]
    values.view(-1, kv_heads, head_dim)[where] = normed[:, -kv_heads:].to(heads.dtype)  # the last K are v or the raw k
    return rotated[:, : count - kv_heads]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [R, N, D] by its rows' cos, sin [R, D] (split-half; first half of sin negated)."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos[:, None], swapped, sin[:, None])


def attention(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """Every row attends to the positions that `view` gives it, scale 1. Returns [R, H * D].

    queries [R, H, D]; keys, values [pages, PAGE, K, D]; H / K query heads share a key head. What a row of a commit
    comes to does not depend on which rows are committed with it, to the last bit: each is computed in the company of
    all rows of its page, real or not.
    """
    out = torch.zeros_like(queries)
    for segment, table in zip(view.segments, view.table, strict=True):
        rows = slice(segment.first, segment.first + segment.count)
        if segment.uniform:
            out[rows] = _uniform(queries[rows], keys, values, table, int(view.low[rows][0]), int(view.high[rows][0]))
            continue
        position = segment.start
        for count, high in _page_by_page(segment, view.high[rows].tolist()):
            part = slice(segment.first + position - segment.start, segment.first + position - segment.start + count)
            low = int(view.low[part][-1])
            out[part] = _causal(queries[part], keys, values, table, position, low, high)
            position += count
    return out.flatten(1)


def attend(
    heads: Tensor,
    qk_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    view: AttentionView,
    turned: int,
) -> Tensor:
    """`qkv_norm_rope_write`, then `attention` of its queries: returns [R, H * D].

    `turned`: the columns of each half from this one on have cos 1 and sin 0.
    """
    return attention(qkv_norm_rope_write(heads, qk_weight, cos, sin, eps, keys, values, view.where), keys, values, view)


def _page_by_page(segment: Segment, high: list[int]) -> Iterator[tuple[int, int | None]]:
    """A commit's rows in runs that end with a page or where an image begins or ends: their number, and what an image's
    rows see up to; None for text. An image's last row sees what it would as text, and is taken so."""
    begin = 0
    while begin < segment.count:
        position = segment.start + begin
        image = high[begin] > position + 1
        end = begin
        while end < segment.count and (
            high[end] == high[begin] and high[end] > segment.start + end + 1
            if image
            else high[end] == segment.start + end + 1
        ):
            end += 1
        count = min(end - begin, PAGE - position % PAGE)
        yield count, high[begin] if image else None
        begin += count


def _uniform(queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, low: int, high: int) -> Tensor:
    """Attention of rows [n, H, D] that all see the positions from low to high."""
    begin = low % PAGE
    seen_keys, seen_values = (
        stored[table[low // PAGE : -(-high // PAGE)].long()].flatten(0, 1)[begin : begin + high - low].transpose(0, 1)
        for stored in (keys, values)
    )  # [K, positions, D]
    # without a mask the heads that share a key can be rows of one attention: no copies of keys and values
    grouped = queries.transpose(0, 1).reshape(1, keys.shape[2], -1, keys.shape[3])
    seen = F.scaled_dot_product_attention(grouped, seen_keys[None], seen_values[None], scale=1.0)
    return seen.reshape(queries.shape[1], queries.shape[0], -1).transpose(0, 1)


def _causal(
    queries: Tensor, keys: Tensor, values: Tensor, table: Tensor, position: int, low: int, high: int | None
) -> Tensor:
    """Attention of the rows [n, H, D] from a position on, all of one page; `low` of the last of them. `high`: up to
    where rows of an image see; None = each up to itself."""
    count, number = queries.shape[0], position // PAGE
    reach = position + count - 1 - low if low else position + count  # positions behind a row that it sees
    first = max(0, number * PAGE - reach) // PAGE
    behind = number + 1 if high is None else -(-high // PAGE)
    pages = table[first:behind].clamp(min=0).long()  # one that is not held any more is seen by none of the rows
    seen_keys, seen_values = (stored[pages].flatten(0, 1).transpose(0, 1)[None] for stored in (keys, values))
    company = queries.new_zeros(PAGE, *queries.shape[1:])
    offset = position % PAGE
    company[offset : offset + count] = queries
    rows = torch.arange(number * PAGE, (number + 1) * PAGE, device=queries.device)[:, None]
    seen = torch.arange(first * PAGE, behind * PAGE, device=queries.device)
    mask = ((seen <= rows) if high is None else (seen < high)) & (seen >= rows - reach)
    attended = F.scaled_dot_product_attention(
        company.transpose(0, 1)[None], seen_keys, seen_values, attn_mask=mask, scale=1.0, enable_gqa=True
    )
    return attended[0, :, offset : offset + count].transpose(0, 1)


def join_attention(
    x: Tensor,
    projected: Tensor,
    post_weight: Tensor,
    mlp: Entrance,
    experts: Entrance,
    router_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h = x + norm(projected) * post_weight, and norm(h) times the weight of each of the next three.

    x, projected [R, M]; weights float32 [M]. Returns h and the inputs of the dense MLP, the experts and the router
    (which thus reads the residual, not what the experts read), all [R, M]; those that have a reader as it takes them.
    """
    h = x + rms_norm(projected, post_weight, eps)
    normed = _normed(h, None, eps)
    for_mlp, for_experts = (normed * weight for weight in (mlp.norm, experts.norm))
    return h, for_mlp.to(x.dtype), for_experts.to(x.dtype), normed.mul_(router_weight).to(x.dtype)


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
) -> tuple[Tensor, Tensor]:
    """The layer's output x = (h + norm(norm(mlp) + norm(routed))) * scalar, and what the next layer reads, norm(x).

    h, mlp [R, M]; routed is the sum of the experts' parts [R, A, M] times their shares, float32 [R, A]; weights float32
    [M], of the norms of mlp, of routed and of their sum; x is normed for `following`; a row's scalar is scalars[mode],
    float32 [2] and int32 [R]. Returns both [R, M].
    """
    routed = (parts * shares[..., None]).sum(dim=1).to(h.dtype)
    y = rms_norm(mlp, mlp_weight, eps) + rms_norm(routed, experts_weight, eps)
    # rounded first, as transformers multiplies by a scalar of the weights' dtype
    x = (h + rms_norm(y, post_weight, eps)) * scalars.to(h.dtype)[modes, None]
    return x, rms_norm(x, following.norm, eps)


def gated_mlp(x: Tensor, mlp: Mlp) -> Tensor:
    """down(gelu_tanh(gate(x)) * up(x)). x [R, M]; returns [R, M]."""
    return linear(_gate(linear(x, mlp.gate_up)), mlp.down)


def route(x: Tensor, projection: Tensor, expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose A = top_k experts a row. x [R, M], already normed; projection [E, M], expert_scale float32 [E].

    Returns shares float32 [R, A] (renormalised to 1, then times expert_scale) and expert ids int64 [R, A].
    """
    scores = _times(x, projection)
    best, experts = scores.float().softmax(dim=-1).topk(top_k, dim=-1)
    return best / best.sum(dim=-1, keepdim=True) * expert_scale[experts], experts


def experts(x: Tensor, chosen: Tensor, which: Experts) -> Tensor:
    """The chosen experts' gated MLPs. x [R, M]; chosen [R, A] as `route` returns it; returns [R, A, M], which
    `join_layer` sums.

    Rows are sorted by expert, so each expert that is chosen is one pair of matmuls and the others cost nothing;
    a quantised expert is made dense just for these.
    """
    rows, active = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    gathered = x.new_empty(rows * active + ROWS, x.shape[1])
    gathered[rows * active :] = 0
    torch.index_select(x, 0, order // active, out=gathered[: rows * active])
    sizes = torch.bincount(flat, minlength=shape(which.gate_up)[0]).tolist()
    hidden = x.new_empty(gathered.shape[0], shape(which.gate_up)[1])
    # A span is made longer to a multiple of ROWS; what it computes for the next one's rows is overwritten by that one.
    spans = [(index, end - size, end - size + _round_up(size)) for index, size, end in _running(sizes) if size]
    for index, start, end in spans:
        _multiply(gathered[start:end], dense(expert(which.gate_up, index), x.dtype), hidden[start:end])
    hidden = _gate(hidden)
    result = torch.empty_like(gathered)
    for index, start, end in spans:
        _multiply(hidden[start:end], dense(expert(which.down, index), x.dtype), result[start:end])
    result = result[: rows * active]
    return torch.empty_like(result).index_copy_(0, order, result).view(rows, active, -1)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in] @ weight [out, in] transposed -> [R, out]."""
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, _round_up(rows) - rows)) if rows % ROWS else x
    out = x.new_empty(padded.shape[0], weight.shape[0])
    _multiply(padded, weight, out)
    return out[:rows]


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """The same into `out`, for a multiple of ROWS."""
    if x.shape[0] <= MOST_ROWS or x.dtype == torch.float32:
        torch.mm(x, weight.t(), out=out)
        return
    for some, into in zip(x.split(MOST_ROWS), out.split(MOST_ROWS), strict=True):
        torch.mm(some, weight.t(), out=into)


def _round_up(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def _gate(gate_up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up of [R, 2 * W], rounded between them: [R, W].

    gelu_tanh(x) = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x**3))), since (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)).
    Not torch's own: at the ends of the pieces that it cuts for its threads that rounds otherwise, and where those ends
    are depends on the number of rows.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    divisor = torch.addcmul(wide.new_full((), _LINEAR), wide, wide, value=_CUBIC).mul_(wide).exp_().add_(1)
    return torch.div(wide, divisor, out=divisor).to(up.dtype).mul_(up)


def _running(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(index, size, end) of consecutive spans."""
    out, end = [], 0
    for index, size in enumerate(sizes):
        end += size
        out.append((index, size, end))
    return out


def in_turn(
    first: Callable[[], Tensor], second: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One function after the other."""
    return first(), second()


# Rows as a product takes them. An op set's joins make them and its products take them, as they take tensors; to
# everybody else they are opaque. The reference's are tensors.
Operand = Any


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of every op; the functions of this file say what each must compute.

    `row_align`: the segments of an AttentionView must begin at multiples of it; rows between them fill up. `overlap`
    runs two functions that do not depend on each other and returns what they return; on a GPU they share it. `chosen`:
    what was chosen by measuring, a line each.
    """

    row_align: int
    chosen: tuple[str, ...]
    overlap: Callable[[Callable[[], Tensor], Callable[[], tuple[Tensor, Tensor]]], tuple[Tensor, tuple[Tensor, Tensor]]]

    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    linear: Callable[[Operand, Weight], Tensor]
    qkv_norm_rope_write: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor, Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor, AttentionView, int], Tensor]
    join_attention: Callable[
        [Tensor, Tensor, Tensor, Entrance, Entrance, Tensor, float], tuple[Tensor, Operand, Operand, Tensor]
    ]
    join_layer: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Entrance, float],
        tuple[Tensor, Operand],
    ]
    gated_mlp: Callable[[Operand, Mlp], Tensor]
    route: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    experts: Callable[[Operand, Tensor, Experts], Tensor]
    read_logits: Callable[[Tensor, float, Draw], Reading]
    soft_embedding: Callable[[Tensor, Tensor, float], Tensor]
    start_canvas: Callable[[CanvasState, int, CanvasStart], None]


REFERENCE = Ops(
    row_align=1,
    chosen=(),
    overlap=in_turn,
    rms_norm=rms_norm,
    linear=linear,
    qkv_norm_rope_write=qkv_norm_rope_write,
    attend=attend,
    join_attention=join_attention,
    join_layer=join_layer,
    gated_mlp=gated_mlp,
    route=route,
    experts=experts,
    read_logits=read_logits,
    soft_embedding=soft_embedding,
    start_canvas=start_canvas,
)
