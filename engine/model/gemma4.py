"""DiffusionGemma: one stack of layers, run in two modes over the same weights.

`commit` is causal and appends keys and values; nobody reads its output. `denoise` is bidirectional over a canvas,
reads committed keys and values and writes none. They differ in the input embedding, the cache, the mask, the
layers' scalars and the output, and all five are visible here. Knows no requests, no schedule and no sampling.

Invariant: `denoise` leaves every cache as it was, and a slot's logits do not depend on the other slots.

Shapes: S slots, C canvas, T tokens, M hidden, H heads, K kv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import LayerConfig, ModelConfig
from engine.kernels.reference import Ops
from engine.kernels.weights import Weight, nbytes, plain, shape
from engine.kv_cache import KVCache
from engine.model.layers import Layer, RopeTable

Rope = dict[RopeTable, tuple[Tensor, Tensor]]  # this pass's rows of each table


class DiffusionGemma:
    """The model on one device, in float32 or bfloat16."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight], ops: Ops) -> None:
        """`weights` as in `Checkpoint.tensors`; the embedding's device and dtype are the model's."""
        self.config = config
        self._ops = ops
        self._weights = weights
        self._embedding = plain(weights["embedding"])
        # rounded to the weights' dtype first, as transformers does
        self._embedding_scale = torch.tensor(config.hidden_size**0.5).to(self.dtype).item()
        self._norm = plain(weights["norm"]).float()
        self._soft_norm = plain(weights["self_conditioning.pre_norm"]).float()
        self._soft_gate_up, self._soft_down = weights["self_conditioning.gate_up"], weights["self_conditioning.down"]
        tables: dict[tuple[int, float, float], RopeTable] = {}
        self._layers: list[Layer] = []
        self._tables: list[RopeTable] = []  # one a layer, most of them shared
        for index, layer in enumerate(config.layers):
            self._layers.append(Layer(config, layer, _under(weights, f"layers.{index}."), ops))
            self._tables.append(tables.setdefault(_rope_key(layer), self._rope_table(layer)))

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape(tensor)) for tensor in self._weights.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take."""
        return sum(nbytes(tensor) for tensor in self._weights.values())

    @torch.inference_mode()
    def commit(self, ids: Tensor, cache: KVCache) -> None:
        """Append the positions of `ids` (int64 [T], any T >= 0) to the cache.

        Long inputs go in chunks, so memory does not grow with T squared. Raises ValueError, with the cache as it
        was, if they do not fit its capacity.
        """
        if cache.length + ids.shape[0] > cache.capacity:
            raise ValueError(f"{cache.length} + {ids.shape[0]} positions exceed the capacity of {cache.capacity}")
        for start in range(0, ids.shape[0], cache.chunk):
            self._commit_chunk(ids[start : start + cache.chunk], cache)

    def _commit_chunk(self, ids: Tensor, cache: KVCache) -> None:
        count = ids.shape[0]
        cache.make_room(count)
        rope = {table: table.rows(cache.length, count) for table in set(self._tables)}
        x = self._embed(ids)  # [T, M]
        for index, (layer, table) in enumerate(zip(self._layers, self._tables, strict=True)):
            queries, keys, values = layer.project(x, *rope[table])
            seen_keys, seen_values = cache.write(index, keys, values)
            if index + 1 < len(self._layers):  # what follows the last layer's keys and values is read by nobody
                attended = self._ops.attention_commit(queries, seen_keys, seen_values, layer.window)
                x = layer.finish(x, attended, layer.commit_scalar)
        cache.advance(count)

    @torch.inference_mode()
    def denoise(self, canvas: Tensor, soft: Tensor | None, caches: Sequence[KVCache]) -> Tensor:
        """Logits float32 [S, C, V], softcapped, not divided by the temperature.

        canvas int64 [S, C]; soft [S, C, M] from `soft_embedding`, None = zeros (a canvas' first step);
        caches: one a slot, which are only read.
        """
        slots, length = canvas.shape
        rope = self._canvas_rope(length, caches)
        x = self._self_condition(self._embed(canvas), soft).view(slots * length, -1)  # [S * C, M]
        for index, (layer, table) in enumerate(zip(self._layers, self._tables, strict=True)):
            queries, keys, values = (_by_slot(rows, slots) for rows in layer.project(x, *rope[table]))
            prefixes = [cache.prefix(index) for cache in caches]
            attended = self._ops.attention_denoise(queries, keys, values, prefixes)  # [S, C, H * D]
            x = layer.finish(x, attended.view(slots * length, -1), layer.denoise_scalar)
        x = self._ops.rms_norm(x, self._norm, self.config.rms_norm_eps)
        return self._ops.logits(x, self._embedding, self.config.final_softcap).view(slots, length, -1)

    @torch.inference_mode()
    def soft_embedding(self, logits: Tensor) -> Tensor:
        """Self-conditioning [S, C, M] for the next step. logits float32 [S, C, V], divided by the temperature."""
        return self._ops.soft_embedding(logits, self._embedding, self._embedding_scale)

    def _embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._embedding) * self._embedding_scale

    def _self_condition(self, x: Tensor, soft: Tensor | None) -> Tensor:
        """x, soft [S, C, M] -> [S, C, M]. The outer norm applies on the first step too; of zeros the MLP is zero."""
        ops, eps = self._ops, self.config.rms_norm_eps
        if soft is not None:
            x = x + ops.gated_mlp(ops.rms_norm(soft, self._soft_norm, eps), self._soft_gate_up, self._soft_down)
        return ops.rms_norm(x, None, eps)

    def _canvas_rope(self, length: int, caches: Sequence[KVCache]) -> Rope:
        """cos and sin [S * C, D] of canvases that follow their slots' prefixes."""
        rope: Rope = {}
        for table in set(self._tables):
            rows = [table.rows(cache.length, length) for cache in caches]
            rope[table] = (
                rows[0] if len(rows) == 1 else (torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]))
            )
        return rope

    def _rope_table(self, layer: LayerConfig) -> RopeTable:
        return RopeTable(*_rope_key(layer), self.device, self.dtype)


def _rope_key(layer: LayerConfig) -> tuple[int, float, float]:
    return layer.head_dim, layer.rope_theta, layer.rope_partial


def _under(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _by_slot(rows: Tensor, slots: int) -> Tensor:
    """[S * C, N, D] -> [S, C, N, D]."""
    return rows.reshape(slots, -1, *rows.shape[1:])
