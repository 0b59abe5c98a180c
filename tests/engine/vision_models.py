"""Small random DiffusionGemma checkpoints that take images, and images for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache

from engine.interface import GenerationRequest, ImagePatches, Sampling
from tests.engine.small_models import VISION, random_ids, random_model, save, small_config

IMAGE, BOI, EOI = 5, 3, 4  # of small_config
MOST_TOKENS = 9
TOWER = VISION | {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "position_embedding_size": 32,
}


def vision_model(seed: int = 0, **text: Any) -> DiffusionGemmaForBlockDiffusion:
    """A small model of a config with `text`."""
    return random_vision_model(small_config(**text), seed)


def random_vision_model(
    config: DiffusionGemmaConfig, seed: int = 0, tower: dict[str, Any] = TOWER
) -> DiffusionGemmaForBlockDiffusion:
    """transformers' model with every weight random, the vision tower's too."""
    config.vision_config = type(config.vision_config)(**{k: v for k, v in tower.items() if k != "model_type"})
    model = random_model(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    encoder = model.model.encoder
    with torch.no_grad():
        for name, weight in (*encoder.vision_tower.named_parameters(), *encoder.vision_tower.named_buffers()):
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("inv_freq"):
                continue
            one = "norm" in name or name == "std_scale"
            weight.copy_(1 + 0.25 * noise if one else noise * (0.3 if weight.ndim < 2 else weight.shape[-1] ** -0.5))
        projection = encoder.embed_vision.embedding_projection.weight
        projection.copy_(torch.randn(projection.shape, generator=generator) * projection.shape[-1] ** -0.5)
    return model


def save_vision(model: DiffusionGemmaForBlockDiffusion, folder: Path, most_tokens: int = MOST_TOKENS) -> Path:
    """A complete checkpoint folder that says it takes images."""
    settings = {"image_processor": {"max_soft_tokens": most_tokens, "patch_size": 2, "pooling_kernel_size": 3}}
    (save(model, folder) / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def image(seed: int, at: int = 0, columns: int = 9, rows: int = 6) -> ImagePatches:
    """A random image of so many patches, nine of them a token."""
    pixels = np.random.default_rng(seed).random((rows * columns, 12), dtype=np.float32)
    return ImagePatches(at=at, tokens=rows * columns // 9, columns=columns, rows=rows, pixels=pixels.tobytes())


def prompt_with(*parts: int | ImagePatches, vocab_size: int = 160) -> GenerationRequest:
    """A request whose prompt is made of random text (its length, negative: text of another seed) and of images."""
    ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, int):
            ids += random_ids(abs(part), vocab_size, seed=part % 1000).tolist()
            continue
        placed = ImagePatches(
            at=len(ids) + 1, tokens=part.tokens, columns=part.columns, rows=part.rows, pixels=part.pixels
        )
        images.append(placed)
        ids += [BOI, *[IMAGE] * part.tokens, EOI]
    return GenerationRequest(
        id="a", prompt_ids=tuple(ids), max_tokens=20, sampling=Sampling(seed=1), images=tuple(images)
    )


class VisionOracle:
    """transformers' model, committing as its `generate` does: with the masks made beforehand."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config())

    @torch.inference_mode()
    def commit(self, request: GenerationRequest) -> None:
        ids = torch.tensor(request.prompt_ids)[None]
        encoder = self.model.model.encoder
        most = MOST_TOKENS * 9
        pixels = torch.zeros(len(request.images), most, 12)
        places = torch.full((len(request.images), most, 2), -1)
        for index, each in enumerate(request.images):
            count = each.rows * each.columns
            pixels[index, :count] = torch.from_numpy(np.frombuffer(each.pixels, np.float32).copy()).view(count, 12)
            places[index, :count, 0] = torch.arange(count) % each.columns
            places[index, :count, 1] = torch.arange(count) // each.columns
        masks = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty(1, ids.shape[1], 0),
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            past_key_values=self.cache,
            position_ids=torch.arange(ids.shape[1])[None],
            mm_token_type_ids=(ids == IMAGE).int(),
        )
        encoder(
            input_ids=ids,
            pixel_values=pixels,
            image_position_ids=places,
            attention_mask=masks,
            past_key_values=self.cache,
        )

    @torch.inference_mode()
    def denoise(self, canvas: Tensor) -> Tensor:
        return self.model(past_key_values=self.cache, decoder_input_ids=canvas[None]).logits[0]
