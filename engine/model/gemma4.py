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
from engine.kernels.readers import Entrance, Mlp
from engine.kernels.reference import Ops
from engine.kernels.reference_canvas import CanvasStart, CanvasState
from engine.kernels.reference_output import Draw, Reading
from engine.kernels.weights import Weight, plain
from engine.kv_cache import KVCache, KVPool
from engine.model.layers import Layer, Rope
from engine.model.vision import VisionTower
from engine.plan import PassPlan, Planner


class DiffusionGemma:
    """The model on one device, in float32 or bfloat16, with the memory for its keys and values."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        ops: Ops,
        pool: KVPool,
        planner: Planner | None = None,
    ) -> None:
        """`weights` as in `Checkpoint.tensors`; the embedding's device and dtype are the model's. A `planner` of one's
        own must align rows as the ops want them."""
        self.config = config
        self._ops = ops
        self.pool = pool
        self._planner = planner or Planner(config, pool.device, row_align=ops.row_align)
        self._embedding = plain(weights["embedding"])
        self._logits: Tensor | None = None
        # rounded to the weights' dtype first, as transformers does
        self._embedding_scale = torch.tensor(config.hidden_size**0.5).to(self.dtype).item()
        self._soft_norm = plain(weights["self_conditioning.pre_norm"]).float()
        self._soft_mlp = Mlp(weights["self_conditioning.gate_up"], weights["self_conditioning.down"])
        self._layers = [
            Layer(config, layer, _under(weights, f"layers.{index}."), ops) for index, layer in enumerate(config.layers)
        ]
        # what follows each layer; behind the last, the head takes rows as they are
        self._following = [layer.entrance for layer in self._layers[1:]] + [Entrance(plain(weights["norm"]).float())]
        self.vision = VisionTower(config.vision, weights) if config.vision else None
        self._ropes = {key: Rope(*key, self.device, self.dtype) for key in map(_rope_key, config.layers)}

    @property
    def choices(self) -> tuple[str, ...]:
        """What the ops chose by measuring, a line each."""
        return self._ops.chosen

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

    def plan(
        self, commits: Sequence[tuple[Sequence[int], KVCache]], canvases: Sequence[tuple[int, KVCache]]
    ) -> PassPlan:
        """`Planner.plan` for this model."""
        return self._planner.plan(commits, canvases)

    @torch.inference_mode()
    def forward(self, plan: PassPlan, canvas: Tensor | None, soft: Tensor | None) -> Tensor | None:
        """One pass: commit the plan's ids and denoise its canvases.

        canvas int [n, C], or None to commit only; soft [n, C, M], what `embed_soft` made of the step before, zeros for
        a canvas' first step; None if it is the first of all. Returns the head's logits [n, C, V] in the model's dtype,
        neither softcapped nor divided by a temperature: `read` does that. The next pass overwrites them. The caches
        advance by `plan.advance()`.
        """
        rows = [self._embed_commits(plan)] if plan.layout.commit_rows else []
        if canvas is not None:
            rows.append(self._filled(self._self_condition(self.embed(canvas), soft)))
        hidden = self._stack(torch.cat(rows) if len(rows) > 1 else rows[0], plan)
        if canvas is None or hidden is None:
            return None
        count, length = canvas.shape
        hidden = hidden.view(count, -1, hidden.shape[-1])[:, :length]
        if self._logits is None or len(self._logits) < count:
            self._logits = hidden.new_empty(max(count, len(self.pool.slots)), length, len(self._embedding))
        logits = self._logits[:count]  # the same memory for every pass: 134 MB a canvas
        torch.mm(hidden.flatten(0, 1), self._embedding.t(), out=logits.view(count * length, -1))
        return logits

    @torch.inference_mode()
    def read(self, logits: Tensor, draw: Draw) -> Reading:
        """What the sampler needs of logits [R, V] from `forward`."""
        return self._ops.read_logits(logits, self.config.final_softcap, draw)

    @torch.inference_mode()
    def embed_soft(self, probabilities: Tensor) -> Tensor:
        """Self-conditioning's input: the expected embedding [R, M] under probabilities [R, V]."""
        return self._ops.soft_embedding(probabilities, self._embedding, self._embedding_scale)

    def start_canvas(self, state: CanvasState, slot: int, start: CanvasStart) -> None:
        """Fill a slot's state for an attempt at a canvas."""
        self._ops.start_canvas(state, slot, start)

    def run(
        self,
        commits: Sequence[tuple[Tensor, KVCache]],
        canvas: Tensor | None,
        soft: Tensor | None,
        caches: Sequence[KVCache],
    ) -> Tensor | None:
        """`plan`, `forward` and `advance` in one, for whoever has no slots: ids int [T], canvas [n, C], a cache each.
        The logits are a copy."""
        plan = self.plan([(ids.tolist(), cache) for ids, cache in commits], [(0, cache) for cache in caches])
        logits = self.forward(plan, canvas, soft)
        plan.advance()
        return None if logits is None else logits.clone()

    def commit(self, ids: Tensor, cache: KVCache) -> None:
        """Append ids (int [T], any T >= 0) to a slot, in chunks, so that memory does not grow with T squared."""
        if cache.length + ids.shape[0] > cache.capacity:
            raise ValueError(f"{cache.length} + {ids.shape[0]} positions exceed the capacity of {cache.capacity}")
        for chunk in ids.split(self.pool.chunk) if ids.shape[0] else ():
            self.run([(chunk, cache)], None, None, [])

    def denoise(self, canvas: Tensor, soft: Tensor | None, caches: Sequence[KVCache]) -> Tensor:
        """`run` without anything to commit."""
        logits = self.run([], canvas, soft, caches)
        assert logits is not None, "there was a canvas"
        return logits

    def _stack(self, x: Tensor, plan: PassPlan) -> Tensor | None:
        """All layers over the rows x [R, M]; the final norm of the canvases' rows [S * C, M], if there are any."""
        rope = {key: table.rows(plan.positions) for key, table in self._ropes.items()}
        normed = self._ops.rms_norm(x, self._layers[0].entrance.norm, self.config.rms_norm_eps)
        only_commits, commits, modes = not plan.layout.canvases, plan.layout.commit_rows, plan.modes
        for index, layer in enumerate(self._layers):
            last = index + 1 == len(self._layers)
            cached = self.pool.keys[index], self.pool.values[index]
            view = plan.views[layer.config.kind]
            turns = rope[_rope_key(layer.config)]
            # what follows the last keys and values of rows that are committed is read by nobody
            if last and only_commits:
                layer.write(normed, turns, cached, view)
                return None
            attended = layer.attend(normed, turns, cached, view)
            if last:
                x, attended, modes = x[commits:], attended[commits:], modes[commits:]
            x, normed = layer.finish(x, attended, modes, self._following[index])
        return normed

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of ids int [...], scaled: [..., M]."""
        return F.embedding(ids, self._embedding) * self._embedding_scale

    def _embed_commits(self, plan: PassPlan) -> Tensor:
        """Embeddings [T, M] of what the plan commits: of ids, and where images stand, of their soft tokens."""
        x = self.embed(plan.ids)
        for run in plan.images:
            assert self.vision is not None, "a model without a tower is given no images"
            found = self.vision.embeddings(run.number)[run.offset : run.offset + run.end - run.begin]
            x[run.begin : run.end] = found.to(x.dtype)
        return x

    def _self_condition(self, x: Tensor, soft: Tensor | None) -> Tensor:
        """x, soft [n, C, M] -> [n, C, M]. The outer norm applies on the first step too; of zeros the MLP is zero."""
        ops, eps = self._ops, self.config.rms_norm_eps
        if soft is not None:
            normed = ops.rms_norm(soft.flatten(0, 1), self._soft_norm, eps)
            x = x + ops.gated_mlp(normed, self._soft_mlp).view_as(x)
        return ops.rms_norm(x, None, eps)

    def _filled(self, x: Tensor) -> Tensor:
        """Rows [n * C', M] of canvases x [n, C, M], C' the next multiple of the ops' row_align."""
        fill = -x.shape[1] % self._ops.row_align
        return (F.pad(x, (0, 0, 0, fill)) if fill else x).flatten(0, 1)


def _rope_key(layer: LayerConfig) -> tuple[int, float, int]:
    return layer.head_dim, layer.rope_theta, layer.turned


def _under(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
