"""One layer of the stack, and RoPE's tables.

A layer is the same in both modes; what differs (mask, cache, scalar) is done between `project` and `finish` or
passed in. Knows rows, not slots: x is [R, M] throughout.

Invariant: no state changes after construction; RoPE's tables only grow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config import LayerConfig, ModelConfig
from engine.kernels.reference import Ops
from engine.kernels.weights import Weight, plain


class Layer:
    """Attention, dense MLP and experts side by side, with their norms."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, weights: Mapping[str, Weight], ops: Ops) -> None:
        """`weights`: those under layers.N. of `tensor_names.tensor_table`, without that prefix."""
        self.config = layer
        self.window = config.sliding_window if layer.kind == "sliding" else None
        self.commit_scalar = float(plain(weights["commit_scalar"]))
        self.denoise_scalar = float(plain(weights["denoise_scalar"]))
        self._eps = config.rms_norm_eps
        self._top_k = config.top_k_experts
        self._ops = ops
        self._qkv, self._out = weights["qkv"], weights["out"]
        self._gate_up, self._down = weights["gate_up"], weights["down"]
        self._router = plain(weights["router"])
        self._expert_gate_up, self._expert_down = weights["expert_gate_up"], weights["expert_down"]
        # small and always used in float32: converted once
        self._input_norm = plain(weights["input_norm"]).float()
        self._post_attention_norm = plain(weights["post_attention_norm"]).float()
        self._pre_mlp_norm = plain(weights["pre_mlp_norm"]).float()
        self._post_mlp_norm = plain(weights["post_mlp_norm"]).float()
        self._pre_experts_norm = plain(weights["pre_experts_norm"]).float()
        self._post_experts_norm = plain(weights["post_experts_norm"]).float()
        self._post_ffn_norm = plain(weights["post_ffn_norm"]).float()
        self._router_norm = plain(weights["router_scale"]).float() * config.hidden_size**-0.5
        self._expert_scale = plain(weights["expert_scale"]).float()
        self._qk_norm = torch.cat(  # [H + K, D]
            (
                plain(weights["q_norm"]).float().expand(config.num_heads, -1),
                plain(weights["k_norm"]).float().expand(layer.kv_heads, -1),
            )
        )

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, H, D], k [R, K, D], v [R, K, D] of the rows x [R, M], normed and rotated by cos, sin [R, D]."""
        ops, layer = self._ops, self.config
        heads = ops.linear(ops.rms_norm(x, self._input_norm, self._eps), self._qkv).view(x.shape[0], -1, layer.head_dim)
        return ops.qkv_norm_rope(heads, self._qk_norm, cos, sin, layer.kv_heads, self._eps)

    def finish(self, x: Tensor, attended: Tensor, scalar: float) -> Tensor:
        """The layer's output [R, M] from its input x [R, M] and the attention's result [R, H * D]."""
        ops, eps = self._ops, self._eps
        h = x + ops.rms_norm(ops.linear(attended, self._out), self._post_attention_norm, eps)
        dense = ops.gated_mlp(ops.rms_norm(h, self._pre_mlp_norm, eps), self._gate_up, self._down)
        # the router reads the raw residual, not what the experts read
        weights, chosen = ops.route(h, self._router_norm, self._router, self._expert_scale, self._top_k, eps)
        routed = ops.experts(
            ops.rms_norm(h, self._pre_experts_norm, eps), weights, chosen, self._expert_gate_up, self._expert_down
        )
        y = ops.rms_norm(dense, self._post_mlp_norm, eps) + ops.rms_norm(routed, self._post_experts_norm, eps)
        return (h + ops.rms_norm(y, self._post_ffn_norm, eps)) * scalar


class RopeTable:
    """cos and sin of every position so far needed, for one head size and base. Grows by doubling."""

    def __init__(self, head_dim: int, theta: float, partial: float, device: torch.device, dtype: torch.dtype) -> None:
        rotated = int(partial * head_dim // 2)
        exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.float32, device=device) / head_dim
        self._frequencies = torch.zeros(head_dim // 2, device=device)  # 0 = not rotated
        self._frequencies[:rotated] = 1.0 / (theta**exponents)
        self._dtype = dtype
        self._cos = self._sin = torch.empty(0, head_dim, dtype=dtype, device=device)

    def rows(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin [count, D] of the positions from `start`; the first half of sin is negated (see `rope`)."""
        end = start + count
        if end > self._cos.shape[0]:
            self._grow(max(end, 2 * self._cos.shape[0], 1024))
        return self._cos[start:end], self._sin[start:end]

    def _grow(self, size: int) -> None:
        positions = torch.arange(size, dtype=torch.float32, device=self._frequencies.device)
        angles = positions[:, None] * self._frequencies  # [size, D / 2], float32 as in transformers
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((cos, cos), dim=-1).to(self._dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).to(self._dtype)
