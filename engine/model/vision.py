"""Images to embeddings: transformers' vision tower, and the projection of what it finds to the text model.

Runs once an image, before the pass that commits it, never in the denoising loop; a few of the last images' embeddings
are kept, for prompts that are committed anew. Knows patches, nothing of prompts or pages.

Invariant: what an image comes to does not depend on other images: each goes through the tower alone.

Shapes: P patches, N soft tokens = P / pooling squared, M hidden of the text model.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import VisionConfig
from engine.interface import ImagePatches
from engine.kernels.weights import Weight, plain

KEPT = 8  # images, of 1.6 MB each in the published model


class VisionTower:
    """The tower on the weights' device, in their dtype."""

    def __init__(self, config: VisionConfig, weights: Mapping[str, Weight]) -> None:
        """`weights`: those of `tensor_names.vision_table` by our names."""
        self.config = config
        self._projection = plain(weights["vision.projection"])
        self._eps = config.rms_norm_eps
        prefix = "vision.tower."
        tower = {name.removeprefix(prefix): plain(each) for name, each in weights.items() if name.startswith(prefix)}
        self._tower = _tower(config, tower, self._projection.device)
        self._found: OrderedDict[int, Tensor] = OrderedDict()  # by the images' numbers, the last used last

    @torch.inference_mode()
    def look(self, images: Sequence[ImagePatches]) -> None:
        """Have the embeddings of these images at hand for the next pass."""
        for image in images:
            if image.number not in self._found:
                self._found[image.number] = self._embed(image)
            self._found.move_to_end(image.number)
        while len(self._found) > max(KEPT, len(images)):  # so that none of these goes
            self._found.popitem(last=False)

    def embeddings(self, number: int) -> Tensor:
        """[N, M] of an image that was looked at, by its number."""
        return self._found[number]

    def _embed(self, image: ImagePatches) -> Tensor:
        device, count = self._projection.device, image.rows * image.columns
        pixels = torch.from_numpy(np.frombuffer(image.pixels, dtype=np.float32).reshape(1, count, -1).copy())
        down, right = torch.meshgrid(torch.arange(image.rows), torch.arange(image.columns), indexing="ij")
        places = torch.stack((right, down), dim=-1).view(1, count, 2)
        found: Tensor = self._tower(
            pixel_values=pixels.to(device), pixel_position_ids=places.to(device)
        ).last_hidden_state  # [N, hidden of the tower]: padding is stripped, and of several images they are in a row
        normed = F.rms_norm(found.float(), (found.shape[-1],), None, self._eps).to(found.dtype)
        return F.linear(normed, self._projection)


def _tower(config: VisionConfig, weights: Mapping[str, Tensor], device: torch.device) -> Any:
    """transformers' module (untyped there) around our tensors: no second copy."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel  # deferred: slow to import

    settings = Gemma4VisionConfig.from_dict(json.loads(config.document))
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        tower = Gemma4VisionModel(settings)
    tower.load_state_dict(dict(weights), strict=True, assign=True)
    # not stored but computed, which on meta came to nothing
    tower.encoder.rotary_emb = type(tower.encoder.rotary_emb)(settings).to(device)
    return tower.eval().requires_grad_(False)
