"""One layer of the stack, and RoPE.

A layer is the same in both modes, and rows of both go through it together; what differs (what a row sees, its scalar)
is in the view and the modes passed in. Knows rows, not slots: x is [R, M] throughout.

Invariant: no state changes after construction, except the keys and values that `attend` and `write` store.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config import LayerConfig, ModelConfig
from engine.kernels.readers import Entrance, Experts, Mlp
from engine.kernels.reference import Operand, Ops
from engine.kernels.views import AttentionView
from engine.kernels.weights import Weight, plain


class Layer:
    """Attention, dense MLP and experts side by side, with their norms."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, weights: Mapping[str, Weight], ops: Ops) -> None:
        """`weights`: those under layers.N. of `tensor_names.tensor_table`, without that prefix."""
        self.config = layer
        self.scalars = torch.cat(
            [plain(weights[f"{mode}_scalar"]) for mode in ("commit", "denoise")]
        ).float()  # by a row's mode
        self._eps = config.rms_norm_eps
        self._ops = ops
        self._qkv, self._out = weights["qkv"], weights["out"]
        self._mlp = Mlp(weights["gate_up"], weights["down"])
        self._router = plain(weights["router"])
        self._experts = Experts(weights["expert_gate_up"], weights["expert_down"], config.top_k_experts)
        # small and always used in float32: converted once
        self.entrance = Entrance(plain(weights["input_norm"]).float(), self._qkv)
        self._post_attention_norm = plain(weights["post_attention_norm"]).float()
        self._mlp_entrance = Entrance(plain(weights["pre_mlp_norm"]).float(), self._mlp)
        self._post_mlp_norm = plain(weights["post_mlp_norm"]).float()
        self._experts_entrance = Entrance(plain(weights["pre_experts_norm"]).float(), self._experts)
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

    def attend(
        self, x: Operand, rope: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], view: AttentionView
    ) -> Tensor:
        """Write the rows' keys and values and attend: x [R, M], normed for `entrance`, to [R, H * D].

        `rope`: cos, sin [R, D]; `cached`: the layer's keys and values [pages, PAGE, K, D].
        """
        heads = self._heads(x)
        return self._ops.attend(heads, self._qk_norm, *rope, self._eps, *cached, view, self.config.turned)

    def write(
        self, x: Operand, rope: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], view: AttentionView
    ) -> None:
        """Only write the rows' keys and values."""
        self._ops.qkv_norm_rope_write(self._heads(x), self._qk_norm, *rope, self._eps, *cached, view.where)

    def _heads(self, x: Operand) -> Tensor:
        """The projected q, k and, on sliding layers, v: x [R, M] to [R, heads, D]."""
        heads: Tensor = self._ops.linear(x, self._qkv).unflatten(1, (-1, self.config.head_dim))
        return heads

    def finish(self, x: Tensor, attended: Tensor, modes: Tensor, following: Entrance) -> tuple[Tensor, Operand]:
        """The layer's output [R, M], and the same normed for what follows, from its input x and the attention's
        result."""
        ops, eps = self._ops, self._eps
        h, mlp_input, experts_input, router_input = ops.join_attention(
            x,
            ops.linear(attended, self._out),
            self._post_attention_norm,
            self._mlp_entrance,
            self._experts_entrance,
            self._router_norm,
            eps,
        )

        def routed() -> tuple[Tensor, Tensor]:
            shares, chosen = ops.route(router_input, self._router, self._expert_scale, self._experts.active)
            return ops.experts(experts_input, chosen, self._experts), shares

        dense, (parts, shares) = ops.overlap(lambda: ops.gated_mlp(mlp_input, self._mlp), routed)
        return ops.join_layer(
            h,
            dense,
            parts,
            shares,
            self._post_mlp_norm,
            self._post_experts_norm,
            self._post_ffn_norm,
            self.scalars,
            modes,
            following,
            eps,
        )


class Rope:
    """RoPE of one head size, base and number of columns turned in each half: cos and sin of any positions."""

    def __init__(self, head_dim: int, theta: float, turned: int, device: torch.device, dtype: torch.dtype) -> None:
        exponents = torch.arange(0, 2 * turned, 2, dtype=torch.float32, device=device) / head_dim
        self._frequencies = torch.zeros(head_dim // 2, device=device)  # 0 = not turned
        self._frequencies[:turned] = 1.0 / (theta**exponents)
        self._dtype = dtype

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [R, D] of positions int32 [R]; the first half of sin is negated (see `rope`)."""
        angles = positions[:, None].float() * self._frequencies  # [R, D / 2], float32 as in transformers
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).to(self._dtype), torch.cat((-sin, sin), dim=-1).to(self._dtype)
