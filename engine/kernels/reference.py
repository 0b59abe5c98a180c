"""Every op of the model in plain torch: the specification, and what runs on a CPU.

Pure functions, gathered in `REFERENCE`. Another op set has the same signatures and must agree with these.
Knows tensors only: no config, no layers, no cache.

Invariant: norms, router probabilities, expert sums and logits are computed in float32 whatever the dtype of the rows.

Shapes: R rows, M hidden, H heads, K kv heads, D head dim, S slots, C canvas, T new positions, P committed positions,
E experts, A active experts, I MLP width, F expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.weights import Weight, dense, expert, shape


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. x [..., D]; weight float32 [D], None = ones; same dtype as x."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [R, in] @ weight [out, in] transposed -> [R, out]."""
    return F.linear(x, dense(weight, x.dtype))


def qkv_norm_rope(
    heads: Tensor, qk_weight: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-head norms of the projected q, k, v and RoPE of q and k.

    heads [R, H + 2K, D] holds q, k, v; or [R, H + K, D] where v is the raw k. qk_weight float32 [H + K, D].
    cos [R, D]; sin [R, D] with its first half negated, so that rotating is a swap of halves. Dtype of heads.
    Returns q [R, H, D], k [R, K, D], v [R, K, D].
    """
    head_dim = heads.shape[-1]
    count = qk_weight.shape[0]
    normed = F.rms_norm(heads.float(), (head_dim,), None, eps)
    rotated = rope((normed[:, :count] * qk_weight).to(heads.dtype), cos, sin)
    values = normed[:, -kv_heads:].to(heads.dtype)  # the last K heads are v, or the raw k
    return rotated[:, : count - kv_heads], rotated[:, count - kv_heads :], values


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [R, N, D] by its rows' cos, sin [R, D] (split-half; first half of sin negated)."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos[:, None], swapped, sin[:, None])


def attention_commit(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Causal attention, scale 1. queries [T, H, D]; keys, values [K, P + T, D], the last T the queries' own.

    With a window a query sees itself and the window - 1 positions before it. Returns [T, H * D].
    """
    count, total = queries.shape[0], keys.shape[1]
    distance = torch.arange(total - count, total, device=keys.device)[:, None] - torch.arange(total, device=keys.device)
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, scale=1.0, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(count, -1)


def attention_denoise(
    queries: Tensor, keys: Tensor, values: Tensor, prefixes: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Every canvas position sees its whole canvas and its slot's whole prefix, scale 1.

    queries [S, C, H, D]; keys, values [S, C, K, D]; prefixes: per slot keys and values [K, P, D], P differing.
    Returns [S, C, H * D].
    """
    slots, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    # without a mask the heads that share a key can be rows of one attention: no copies of keys and values
    grouped = queries.transpose(1, 2).reshape(slots, 1, kv_heads, -1, head_dim)  # [S, 1, K, H/K * C, D]
    out = []
    for slot, (prefix_keys, prefix_values) in enumerate(prefixes):
        seen_keys = torch.cat((prefix_keys, keys[slot].transpose(0, 1)), dim=1)[None]  # [1, K, P + C, D]
        seen_values = torch.cat((prefix_values, values[slot].transpose(0, 1)), dim=1)[None]
        out.append(F.scaled_dot_product_attention(grouped[slot], seen_keys, seen_values, scale=1.0))
    return torch.cat(out).reshape(slots, heads, length, head_dim).transpose(1, 2).reshape(slots, length, -1)


def gated_mlp(x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """down(gelu_tanh(gate(x)) * up(x)). x [R, M]; gate_up [2I, M], gate rows first; down [M, I]; returns [R, M]."""
    return linear(_gate(linear(x, gate_up)), down)


def route(
    x: Tensor, norm_weight: Tensor, projection: Tensor, expert_scale: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Choose A = top_k experts a row. x [R, M], norm_weight float32 [M], projection [E, M], expert_scale float32 [E].

    Returns weights float32 [R, A] (renormalised to 1, then times expert_scale) and expert ids int64 [R, A].
    """
    scores = F.linear(rms_norm(x, norm_weight, eps), projection)
    best, experts = scores.float().softmax(dim=-1).topk(top_k, dim=-1)
    return best / best.sum(dim=-1, keepdim=True) * expert_scale[experts], experts


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """Weighted sum of the chosen experts' gated MLPs. x [R, M]; weights, chosen [R, A] as `route` returns them;
    gate_up [E, 2F, M], gate rows first; down [E, M, F]; returns [R, M].

    Rows are sorted by expert, so each expert that is chosen is one pair of matmuls and the others cost nothing;
    a quantised expert is made dense just for these.
    """
    rows, active = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    gathered = x[order // active]  # [R * A, M]
    sizes = torch.bincount(flat, minlength=shape(gate_up)[0]).tolist()
    hidden = x.new_empty(rows * active, shape(gate_up)[1])
    spans = [(index, end - size, end) for index, size, end in _running(sizes) if size]
    for index, start, end in spans:
        torch.mm(gathered[start:end], dense(expert(gate_up, index), x.dtype).t(), out=hidden[start:end])
    hidden = _gate(hidden)
    result = torch.empty_like(gathered)
    for index, start, end in spans:
        torch.mm(hidden[start:end], dense(expert(down, index), x.dtype).t(), out=result[start:end])
    unsorted = torch.empty_like(result).index_copy_(0, order, result).view(rows, active, -1)
    return (unsorted * weights[..., None]).sum(dim=1).to(x.dtype)


def logits(x: Tensor, embedding: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(x @ embedding^T / softcap), float32. x [R, M], embedding [V, M]; returns [R, V]."""
    return F.linear(x, embedding).float().div_(softcap).tanh_().mul_(softcap)


def soft_embedding(scaled_logits: Tensor, embedding: Tensor, scale: float) -> Tensor:
    """softmax(logits) @ embedding * scale. scaled_logits float32 [..., V]; embedding [V, M]; returns [..., M].

    The logits are rounded to the embedding's dtype first, as transformers does; the softmax is float32.
    """
    probabilities = scaled_logits.to(embedding.dtype).softmax(dim=-1, dtype=torch.float32)
    return probabilities.to(embedding.dtype) @ embedding * scale


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _running(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(index, size, end) of consecutive spans."""
    out, end = [], 0
    for index, size in enumerate(sizes):
        end += size
        out.append((index, size, end))
    return out


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of every op; the functions of this file say what each must compute."""

    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    linear: Callable[[Tensor, Weight], Tensor]
    qkv_norm_rope: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor, Tensor]]
    attention_commit: Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
    attention_denoise: Callable[[Tensor, Tensor, Tensor, Sequence[tuple[Tensor, Tensor]]], Tensor]
    gated_mlp: Callable[[Tensor, Weight, Weight], Tensor]
    route: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
    experts: Callable[[Tensor, Tensor, Tensor, Weight, Weight], Tensor]
    logits: Callable[[Tensor, Tensor, float], Tensor]
    soft_embedding: Callable[[Tensor, Tensor, float], Tensor]


REFERENCE = Ops(
    rms_norm=rms_norm,
    linear=linear,
    qkv_norm_rope=qkv_norm_rope,
    attention_commit=attention_commit,
    attention_denoise=attention_denoise,
    gated_mlp=gated_mlp,
    route=route,
    experts=experts,
    logits=logits,
    soft_embedding=soft_embedding,
)
