"""DiffusionGemma for training: commit and denoise of several canvases in one pass, dense experts, autograd.

The same mathematics as `engine/model`, arranged for throughput: one row of the batch is a few clean sequences followed
by their noisy canvases, and masks say who sees whom, so every canvas of a reply trains at once. All experts are
computed and the ones not routed to are multiplied by zero, which at this size is faster than gathering. Knows no text
and no engine. Parameter names are the checkpoint's, so `export` is a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.demo.dataset import Batch


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo model. Layers are sliding except every `pattern`-th, which is full."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 8
    pattern: int = 4
    heads: int = 4
    head_dim: int = 64
    kv_heads: int = 2
    full_head_dim: int = 128
    full_kv_heads: int = 1
    mlp: int = 512
    experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    canvas: int = 64
    window: int = 128
    max_positions: int = 4096

    def full(self, layer: int) -> bool:
        return (layer + 1) % self.pattern == 0


class RMSNorm(nn.Module):
    def __init__(self, dim: int, weight: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, 1e-6)


class _Lookup(torch.autograd.Function):
    """Rows of an embedding. PyTorch's own gradient sorts the ids and may wait for the device, which ends a capture."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        sums = torch.zeros(ctx.shape, dtype=gradient.dtype, device=gradient.device)
        return sums.index_add_(0, ids.flatten(), gradient.flatten(0, -2)), None


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, s: Shape, full: bool) -> None:
        super().__init__()
        self.heads = s.heads
        self.dim = s.full_head_dim if full else s.head_dim
        self.kv = s.full_kv_heads if full else s.kv_heads
        self.q_proj = _linear(s.hidden, s.heads * self.dim)
        self.k_proj = _linear(s.hidden, self.kv * self.dim)
        self.v_proj = None if full else _linear(s.hidden, self.kv * self.dim)
        self.o_proj = _linear(s.heads * self.dim, s.hidden)
        self.q_norm, self.k_norm = RMSNorm(self.dim), RMSNorm(self.dim)
        self.v_norm = RMSNorm(self.dim, weight=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        b, r, _ = x.shape
        q = self.q_proj(x).view(b, r, self.heads, self.dim)
        k = self.k_proj(x).view(b, r, self.kv, self.dim)
        v = k if self.v_proj is None else self.v_proj(x).view(b, r, self.kv, self.dim)
        q, k, v = _rope(self.q_norm(q), cos, sin), _rope(self.k_norm(k), cos, sin), self.v_norm(v)
        q, k, v = (t.to(x.dtype if not torch.is_autocast_enabled(x.device.type) else torch.bfloat16) for t in (q, k, v))
        groups = self.heads // self.kv
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=1.0
        )
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(b, r, -1))
        return projected


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-b, a), dim=-1) * sin[:, :, None]


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = _linear(hidden, width), _linear(hidden, width)
        self.down_proj = _linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class SelfConditioning(MLP):
    def __init__(self, s: Shape) -> None:
        super().__init__(s.hidden, s.mlp)
        self.pre_norm = RMSNorm(s.hidden)
        self.post_norm = RMSNorm(s.hidden, weight=False)

    def condition(self, embedded: Tensor, soft: Tensor) -> Tensor:
        out: Tensor = self.post_norm(embedded + self.forward(self.pre_norm(soft)))
        return out


class Router(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.norm = RMSNorm(s.hidden, weight=False)
        self.proj = _linear(s.hidden, s.experts)
        self.scale = nn.Parameter(torch.ones(s.hidden))
        self.per_expert_scale = nn.Parameter(torch.ones(s.experts))
        self.top_k = s.top_k

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [..., E], zero where not routed, and a load-balance loss."""
        x = self.norm(residual) * self.scale * residual.shape[-1] ** -0.5
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x, self.proj.weight).softmax(-1)
        top, index = p.topk(self.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True) * self.per_expert_scale[index]
        weights = torch.zeros_like(p).scatter(-1, index, top)
        load = (weights > 0).float().flatten(0, -2).mean(0)
        return weights, (load * p.flatten(0, -2).mean(0)).sum() * p.shape[-1] / self.top_k


class Experts(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(s.experts, 2 * s.expert_width, s.hidden))
        self.down_proj = nn.Parameter(torch.empty(s.experts, s.hidden, s.expert_width))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        e, two, m = self.gate_up_proj.shape
        gate, up = F.linear(x, self.gate_up_proj.reshape(e * two, m)).unflatten(-1, (e, 2, two // 2)).unbind(-2)
        act = F.gelu(gate, approximate="tanh") * up * weights[..., None].to(up.dtype)
        return F.linear(act.flatten(-2), self.down_proj.permute(1, 0, 2).reshape(m, -1))


class Layer(nn.Module):
    def __init__(self, s: Shape, full: bool) -> None:
        super().__init__()
        self.self_attn = Attention(s, full)
        self.mlp, self.router, self.experts = MLP(s.hidden, s.mlp), Router(s), Experts(s)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s.hidden), RMSNorm(s.hidden)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(s.hidden), RMSNorm(s.hidden)
        self.pre_feedforward_layernorm_2 = RMSNorm(s.hidden)
        self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = RMSNorm(s.hidden), RMSNorm(s.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, mask))
        weights, balance = self.router(h)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        routed = self.post_feedforward_layernorm_2(self.experts(self.pre_feedforward_layernorm_2(h), weights))
        return h + self.post_feedforward_layernorm(dense + routed), balance


@dataclass(frozen=True)
class Geometry:
    """Masks [B, 1, R, R] and rotations (cos, sin) [B, R, D] of a batch, for full layers (True) and sliding ones."""

    masks: dict[bool, Tensor]
    turns: dict[bool, tuple[Tensor, Tensor]]


class TrainingModel(nn.Module):
    """`forward` takes clean ids [B, L], canvases [B, N, C] and the geometry of their batch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, shape.full(i)) for i in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        self.self_conditioning = SelfConditioning(shape)
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        """From scratch: unit-RMS residual stream, sublayers at (2 layers)^-1/2, attention scores of unit scale."""
        s = self.shape
        for name, p in self.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.fill_(p.shape[0] ** -0.25)
            elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                p.fill_((2 * s.layers) ** -0.5)
            elif name == "embed_tokens.weight":
                p.normal_(0, s.hidden**-0.5)
            elif name.endswith("router.proj.weight"):
                p.normal_(0, 1.0)
            elif p.ndim >= 2:
                p.normal_(0, p.shape[-1] ** -0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, float32 [..., M]."""
        rows: Tensor = _Lookup.apply(self.embed_tokens.weight, ids)  # type: ignore[no-untyped-call]
        return rows

    def rotations(self, positions: Tensor, full: bool) -> tuple[Tensor, Tensor]:
        """cos and sin [B, R, D]: all of a sliding head's dimensions turn, a quarter of a full head's."""
        s = self.shape
        dim, theta, turning = (s.full_head_dim, 1e6, 0.25) if full else (s.head_dim, 1e4, 1.0)
        i = torch.arange(dim // 2, device=positions.device)
        freq = torch.where(i < int(turning * dim // 2), theta ** (-2 * i.float() / dim), 0.0)
        angle = positions[..., None].float() * freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Who sees whom, [B, 1, R, R] for full and sliding layers: 0 or -inf; R = L + N * C."""
        s = self.shape
        start = batch.start.repeat_interleave(s.canvas, dim=1)[..., None]
        owner = batch.canvas_owner.repeat_interleave(s.canvas, dim=1)[..., None]
        same = batch.owner[:, :, None] == batch.owner[:, None, :]
        behind = batch.place[:, :, None] - batch.place[:, None, :]
        place, prompts = batch.place[:, None, :], batch.owner[:, None, :] == owner
        number = torch.arange(batch.start.shape[1], device=start.device).repeat_interleave(s.canvas)
        own = (number[:, None] == number[None, :]).expand(len(start), -1, -1)
        blind = torch.zeros_like(prompts).transpose(1, 2)
        out = []
        for window in (1 << 30, s.window):
            causal = same & (behind >= 0) & (behind < window)
            prefix = prompts & (place < start) & (place >= start - (window - 1))
            seen = torch.cat((torch.cat((causal, blind), 2), torch.cat((prefix, own), 2)), 1)[:, None]
            dtype = torch.bfloat16 if seen.is_cuda else torch.float32
            out.append(torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf))
        return out[0], out[1]

    def geometry(self, batch: Batch) -> Geometry:
        """What every pass over the batch needs and no pass changes."""
        s = self.shape
        inside = torch.arange(s.canvas, device=batch.start.device)
        offsets = (batch.start[..., None] + inside).flatten(1)
        positions = torch.cat((batch.place, offsets), dim=1)
        full, sliding = self.masks(batch)
        return Geometry(
            masks={True: full, False: sliding}, turns={each: self.rotations(positions, each) for each in (True, False)}
        )

    def forward(
        self, clean: Tensor, canvas: Tensor, geometry: Geometry, soft: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states of the clean tokens [B, L, M] and of the canvases [B, N*C, M], and the balance loss."""
        s, length = self.shape, clean.shape[1]
        scale = s.hidden**0.5
        embedded = self.embed(canvas.flatten(1)) * scale
        noisy = self.self_conditioning.condition(embedded, torch.zeros_like(embedded) if soft is None else soft)
        x = torch.cat((self.embed(clean) * scale, noisy), dim=1)
        balance = x.new_zeros(())
        for i, layer in enumerate(self.layers):
            full = s.full(i)
            x, extra = layer(x, *geometry.turns[full], geometry.masks[full])
            balance = balance + extra
        x = self.norm(x)
        return x[:, :length], x[:, length:], balance / s.layers

    def logits(self, hidden: Tensor) -> Tensor:
        """Tied head and softcap, float32."""
        capped: Tensor = 30 * torch.tanh(F.linear(hidden, self.embed_tokens.weight).float() / 30)
        return capped

    def soft_embedding(self, logits: Tensor) -> Tensor:
        """Expected embedding under temperature-divided logits."""
        dtype = torch.bfloat16 if logits.is_cuda else logits.dtype
        expected: Tensor = logits.softmax(-1).to(dtype) @ self.embed_tokens.weight.to(dtype)
        scaled: Tensor = expected.float() * self.shape.hidden**0.5
        return scaled


def restore(model: TrainingModel, *folders: Path) -> None:
    """Take over the weights that `export` wrote into a folder, or the mean of those in several."""
    from safetensors.torch import load_file

    stored = [
        {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}
        for folder in folders
    ]
    names = [(name, "model.decoder." + name) for name in model.state_dict()]
    model.load_state_dict({name: torch.stack([each[long].float() for each in stored]).mean(0) for name, long in names})


def export(model: TrainingModel, folder: Path) -> None:
    """Write an ordinary transformers checkpoint in bf16. The vision tower the class wants is tiny and random."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

    s = model.shape
    text = DiffusionGemmaTextConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.mlp, moe_intermediate_size=s.expert_width,
        num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        global_head_dim=s.full_head_dim, num_global_key_value_heads=s.full_kv_heads, num_experts=s.experts,
        top_k_experts=s.top_k, sliding_window=s.window, max_position_embeddings=s.max_positions,
        use_bidirectional_attention="vision",
        layer_types=["full_attention" if s.full(i) else "sliding_attention" for i in range(s.layers)],
    )  # fmt: skip
    vision = Gemma4VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, global_head_dim=16, patch_size=16, position_embedding_size=64, pooling_kernel_size=3,
        default_output_length=16, standardize=True,
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=vision, boi_token_id=53, eoi_token_id=54, image_token_id=55,
        canvas_length=s.canvas, tie_word_embeddings=True,
    )  # fmt: skip
    config.eos_token_id = [1, 106]
    torch.default_generator.manual_seed(0)  # the vision tower's numbers; a GPU's generator goes on as it was
    oracle = DiffusionGemmaForBlockDiffusion(config)
    trained = {"model.decoder." + k: v.cpu() for k, v in model.state_dict().items()}
    missing, unexpected = oracle.load_state_dict(trained, strict=False)
    lost = [k for k in missing if k.startswith("model.decoder.") and not k.endswith("layer_scalar")]
    if unexpected or lost:
        raise RuntimeError(f"names do not match the checkpoint's: missing {lost}, unexpected {unexpected}")
    oracle.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=256, max_denoising_steps=48, t_min=0.4, t_max=0.8, stability_threshold=1,
        confidence_threshold=0.005, sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        pad_token_id=1, bos_token_id=2, eos_token_id=[1, 106, 50],
    )  # fmt: skip
    oracle.to(torch.bfloat16).save_pretrained(folder, max_shard_size="14MB")
