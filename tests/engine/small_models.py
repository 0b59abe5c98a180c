"""Small random DiffusionGemma checkpoints, written by transformers itself.

Weights are random everywhere, norms, router scales and layer scalars included (commit's differ from denoise's), so
that nothing a forward pass could forget is trivially one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from engine.checkpoint import load_checkpoint
from engine.kernels.reference import REFERENCE, Ops
from engine.kv_cache import KVCache, KVPool
from engine.model.gemma4 import DiffusionGemma
from engine.pages import PAGE
from engine.plan import Planner

CPU = torch.device("cpu")
GENERATION = {
    "max_denoising_steps": 48,
    "t_min": 0.4,
    "t_max": 0.8,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "max_new_tokens": 256,
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 16,
    "patch_size": 2,
    "position_embedding_size": 8,
    "standardize": True,
}


def small_config(
    kinds: Sequence[str] = ("sliding", "sliding", "full", "sliding", "full"),
    *,
    full_kv_heads: int = 1,
    full_head_dim: int = 32,
    canvas_length: int = 8,
    **text: Any,
) -> DiffusionGemmaConfig:
    """A config of `kinds` layers; `text` overrides keys of text_config."""
    full = {
        str(index): {"head_dim": full_head_dim, "num_key_value_heads": full_kv_heads}
        for index, kind in enumerate(kinds)
        if kind == "full"
    }
    defaults = {
        "vocab_size": 160,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "per_layer_config": full,
        "max_position_embeddings": 512,
        "sliding_window": 12,
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "use_bidirectional_attention": "vision",
    }
    return DiffusionGemmaConfig(
        text_config=defaults | text,
        vision_config=dict(VISION),
        canvas_length=canvas_length,
        boi_token_id=3,
        eoi_token_id=4,
        image_token_id=5,
    )


def random_model(config: DiffusionGemmaConfig, seed: int = 0) -> DiffusionGemmaForBlockDiffusion:
    """transformers' model, float32, with every weight random."""
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if name.startswith(("model.encoder.vision_tower", "model.encoder.embed_vision")):
                continue
            if name.endswith(("inv_freq", "embed_scale")):
                continue  # derived from the config
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.copy_(0.5 + 0.1 * noise)  # as in trained models: attention of scale 1 would be a hard choice
            elif "scalar" in name or "scale" in name or "norm" in name:
                weight.copy_(1 + 0.25 * noise)
            elif "embed_tokens" in name:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return model


def save(model: DiffusionGemmaForBlockDiffusion, folder: Path, **options: Any) -> Path:
    """Write a complete checkpoint folder; `options` go to save_pretrained (max_shard_size, ...)."""
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    return folder


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A small random checkpoint in the default config."""
    return save(random_model(small_config(), seed), folder)


def load_model(
    folder: Path,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    *,
    slots: int = 4,
    capacity: int = 256,
    chunk: int = 64,
    ops: Ops = REFERENCE,
    buckets: Sequence[int] = (),
) -> DiffusionGemma:
    """Our model of a checkpoint folder, with memory for `slots` of `capacity` positions."""
    checkpoint = load_checkpoint(folder, device, dtype, progress=False)
    pool = KVPool(checkpoint.config, slots, capacity, device, dtype, chunk=chunk)
    width = -(-(capacity + chunk + checkpoint.config.canvas_length) // PAGE) if buckets else None
    planner = Planner(checkpoint.config, device, row_align=ops.row_align, buckets=buckets, width=width)
    return DiffusionGemma(checkpoint.config, checkpoint.tensors, ops, pool, planner)


def fresh_slots(model: DiffusionGemma, count: int) -> list[KVCache]:
    """So many of the model's slots, all of them emptied first."""
    for cache in model.pool.slots:
        cache.reset()
    return list(model.pool.slots[:count])


def random_ids(count: int, vocab_size: int, seed: int, device: torch.device = CPU) -> Tensor:
    """int64 [count], none of them a special id of `small_config`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, vocab_size, (count,), generator=generator).to(device)
