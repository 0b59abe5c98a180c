"""DiffusionGemma: one stack of layers, run in two modes over the same weights.

Rows to commit are causal, and only their keys and values are of use. Rows of a canvas see all of it, and their keys
and values lie behind the committed positions, to be overwritten. They differ in the input embedding, in what they see,
in the layers' scalars and in the output; everything else is the same, so both go through one pass that reads the
weights once: at every layer a new canvas needs only that layer's keys and values of what is committed with it. Knows
no requests, no schedule and no sampling.

Invariant: a slot's logits do not depend on the other slots, nor on whether a commit shared their pass.

Shapes: S slots, C canvas, T tokens, R rows, M hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import LayerConfig, ModelConfig
from engine.kernels.reference import Ops
from engine.kernels.reference_output import Draw, Reading
from engine.kernels.weights import Weight, plain
from engine.kv_cache import KVCache, KVPool
from engine.model.layers import Layer, Rope
from engine.plan import PassPlan, plan_pass


class DiffusionGemma:
    """The model on one device, in float32 or bfloat16, with the memory for its keys and values."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight], ops: Ops, pool: KVPool) -> None:
        """`weights` as in `Checkpoint.tensors`; the embedding's device and dtype are the model's."""
        self.config = config
        self._ops = ops
        self.pool = pool
        self._embedding = plain(weights["embedding"])
        # rounded to the weights' dtype first, as transformers does
        self._embedding_scale = torch.tensor(config.hidden_size**0.5).to(self.dtype).item()
        self._norm = plain(weights["norm"]).float()
        self._soft_norm = plain(weights["self_conditioning.pre_norm"]).float()
        self._soft_gate_up, self._soft_down = weights["self_conditioning.gate_up"], weights["self_conditioning.down"]
        self._layers = [
            Layer(config, layer, _under(weights, f"layers.{index}."), ops) for index, layer in enumerate(config.layers)
        ]
        # the weight of the norm that follows each layer
        self._next_norms = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        self._ropes = {key: Rope(*key, self.device, self.dtype) for key in map(_rope_key, config.layers)}

    @property
    def softcap(self) -> float:
        """The bound of the logits' absolute value."""
        return self.config.final_softcap

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @torch.inference_mode()
    def run(
        self,
        commits: Sequence[tuple[Tensor, KVCache]],
        canvas: Tensor | None,
        probabilities: Tensor | None,
        caches: Sequence[KVCache],
    ) -> Tensor | None:
        """One pass: commit ids (int64 [T], T >= 1) to some slots and denoise the canvases of others, or of the same.

        canvas int64 [S, C], or None to commit only; probabilities [S, C, V] of the step before, zeros for a canvas'
        first step, None if it is the first of all; caches: the canvases' slots. Returns the head's logits [S, C, V] in
        the model's dtype, neither softcapped nor divided by a temperature: `read` does that. Raises ValueError, with
        the slots as they were, if ids do not fit a slot's capacity.
        """
        for ids, cache in commits:
            if cache.length + ids.shape[0] > cache.capacity:
                raise ValueError(f"{cache.length} + {ids.shape[0]} positions exceed the capacity of {cache.capacity}")
        plan = plan_pass(
            [(cache, ids.shape[0]) for ids, cache in commits],
            caches,
            canvas_length=self.config.canvas_length,
            window=self.config.sliding_window,
            device=self.device,
        )
        rows = [self._embed(ids) for ids, _ in commits]
        if canvas is not None:
            rows.append(self._self_condition(self._embed(canvas), probabilities).flatten(0, 1))
        hidden = self._stack(torch.cat(rows), plan)
        for ids, cache in commits:
            cache.advance(ids.shape[0])
        if canvas is None:
            return None
        return self._ops.linear(hidden, self._embedding).view(*canvas.shape, -1)

    @torch.inference_mode()
    def read(self, logits: Tensor, draw: Draw) -> Reading:
        """What the sampler needs of logits [R, V] from `run`."""
        return self._ops.read_logits(logits, self.config.final_softcap, draw)

    def commit(self, ids: Tensor, cache: KVCache) -> None:
        """Append ids (int64 [T], any T >= 0) to a slot, in chunks, so that memory does not grow with T squared."""
        if cache.length + ids.shape[0] > cache.capacity:
            raise ValueError(f"{cache.length} + {ids.shape[0]} positions exceed the capacity of {cache.capacity}")
        for chunk in ids.split(self.pool.chunk) if ids.shape[0] else ():
            self.run([(chunk, cache)], None, None, [])

    def denoise(self, canvas: Tensor, probabilities: Tensor | None, caches: Sequence[KVCache]) -> Tensor:
        """`run` without anything to commit."""
        logits = self.run([], canvas, probabilities, caches)
        assert logits is not None, "there was a canvas"
        return logits

    def _stack(self, x: Tensor, plan: PassPlan) -> Tensor:
        """All layers over the rows x [R, M]; the final norm of the canvases' rows [S * C, M]."""
        rope = {key: table.rows(plan.positions) for key, table in self._ropes.items()}
        normed = self._ops.rms_norm(x, self._layers[0].input_norm, self.config.rms_norm_eps)
        only_commits = plan.commit_rows == x.shape[0]
        for index, layer in enumerate(self._layers):
            cached = self.pool.keys[index], self.pool.values[index]
            view = plan.views[layer.config.kind]
            turns = rope[_rope_key(layer.config)]
            if only_commits and index + 1 == len(self._layers):
                layer.write(normed, turns, cached, view)  # what follows the last keys and values is read by nobody
                break
            attended = layer.attend(normed, turns, cached, view)
            x, normed = layer.finish(x, attended, plan.modes, self._next_norms[index])
        return normed[plan.commit_rows :]

    def _embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._embedding) * self._embedding_scale

    def _self_condition(self, x: Tensor, probabilities: Tensor | None) -> Tensor:
        """x [S, C, M] -> [S, C, M]. The outer norm applies on the first step too; of zeros the MLP is zero."""
        ops, eps = self._ops, self.config.rms_norm_eps
        if probabilities is not None:
            soft = ops.soft_embedding(probabilities.flatten(0, 1), self._embedding, self._embedding_scale)
            conditioned = ops.gated_mlp(ops.rms_norm(soft, self._soft_norm, eps), self._soft_gate_up, self._soft_down)
            x = x + conditioned.view_as(x)
        return ops.rms_norm(x, None, eps)


def _rope_key(layer: LayerConfig) -> tuple[int, float, float]:
    return layer.head_dim, layer.rope_theta, layer.rope_partial


def _under(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
