"""One canvas from open to done: the denoising loop of the model, in its order.

    canvas = noise
    repeat: logits = denoise(canvas, soft) / T;  done?;  draw;  accept;  re-noise the rest;  soft = embed(logits)

Knows the model's pass and the sampler; nothing of requests, queues or eos ids. What is committed in the same pass only
passes through.

Invariant: only a canvas that converged is ever "done". One that runs out of passes is re-drawn once with other noise
and then given up ("unconverged"): committed, such a canvas would ruin everything after it. Logits that are not
finite give it up at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine import sampler
from engine.config import GenerationDefaults
from engine.interface import Sampling
from engine.kv_cache import KVCache
from engine.rng import CanvasNoise, canvas_noise

ATTEMPTS = 2  # the first draw and one re-draw

CanvasState = Literal["open", "done", "unconverged", "non-finite"]


class Model(Protocol):
    """The two operations of the model that the loop needs."""

    def run(
        self,
        commits: Sequence[tuple[Tensor, KVCache]],
        canvas: Tensor | None,
        soft: Tensor | None,
        caches: Sequence[KVCache],
    ) -> Tensor | None: ...

    def soft_embedding(self, logits: Tensor) -> Tensor: ...


@dataclass
class Canvas:
    """One canvas being denoised. Change it through `Denoiser` only."""

    index: int  # 0-based number within the reply
    sampling: Sampling
    noise: CanvasNoise
    ids: Tensor  # int64 [C], input of the next pass
    attempt: int = 0
    passes: int = 0  # of this attempt
    steps: int = 0  # passes of all attempts
    soft: Tensor | None = None  # [C, M], self-conditioning; None before the first pass
    best: Tensor | None = None  # int64 [C], argmax of the last pass: the result once state is "done"
    unchanged: int = 0  # passes in a row that left `best` as it was
    state: CanvasState = "open"

    @property
    def just_redrawn(self) -> bool:
        """True between the pass that used up the first attempt and the next one."""
        return self.attempt > 0 and self.passes == 0


class Denoiser:
    """Opens canvases and moves them on, one denoise pass at a time."""

    def __init__(
        self,
        model: Model,
        schedule: GenerationDefaults,
        *,
        canvas_length: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._schedule = schedule
        self._canvas_length = canvas_length
        self._vocab_size = vocab_size
        self._device = device
        passes = range(1, schedule.max_denoising_steps + 1)
        self._temperatures = tuple(sampler.temperature_at(step, schedule) for step in passes)

    def open(self, sampling: Sampling, index: int) -> Canvas:
        """A fresh canvas of noise: number `index` of its reply."""
        noise = self._noise(sampling, index, attempt=0)
        return Canvas(index=index, sampling=sampling, noise=noise, ids=noise.ids[0])

    def step(
        self, canvases: Sequence[Canvas], caches: Sequence[KVCache], commits: Sequence[tuple[Tensor, KVCache]] = ()
    ) -> None:
        """One pass over all `canvases` (open ones), each on its own prefix in `caches`; `commits` share the pass.

        A slot may have a canvas here and a chunk among the commits, which then belongs to its prefix.
        """
        if not canvases:
            self._model.run(commits, None, None, [])
            return
        ids = torch.stack([canvas.ids for canvas in canvases])  # [S, C]
        logits = self._model.run(commits, ids, self._stack_soft(canvases), caches)  # [S, C, V]
        assert logits is not None, "there were canvases"
        for canvas, rows in zip(canvases, logits, strict=True):
            self._advance(canvas, rows)

    def _advance(self, canvas: Canvas, logits: Tensor) -> None:
        """What follows a pass for one canvas; `logits` is float32 [C, V]."""
        canvas.passes += 1
        canvas.steps += 1
        scaled = logits / self._temperatures[canvas.passes - 1]
        stats = sampler.row_statistics(scaled)
        verdict = sampler.judge(stats, canvas.best, self._schedule.confidence_threshold)
        canvas.best = stats.best
        canvas.unchanged = canvas.unchanged + 1 if verdict.unchanged else 0
        if not verdict.finite:
            canvas.state = "non-finite"
        elif verdict.confident and canvas.unchanged >= self._schedule.stability_threshold:
            canvas.state = "done"
        elif canvas.passes < self._schedule.max_denoising_steps:
            drawn = sampler.draw(scaled, stats, canvas.noise.uniforms[canvas.passes], canvas.sampling)
            accepted = sampler.accept(stats.entropy, self._schedule.entropy_bound)
            canvas.ids = torch.where(accepted, drawn, canvas.noise.ids[canvas.passes])
            canvas.soft = self._model.soft_embedding(scaled[None])[0]
        elif canvas.attempt + 1 < ATTEMPTS:
            self._redraw(canvas)
        else:
            canvas.state = "unconverged"

    def _redraw(self, canvas: Canvas) -> None:
        canvas.attempt += 1
        canvas.noise = self._noise(canvas.sampling, canvas.index, canvas.attempt)
        canvas.ids = canvas.noise.ids[0]
        canvas.passes = canvas.unchanged = 0
        canvas.soft = canvas.best = None

    def _noise(self, sampling: Sampling, index: int, attempt: int) -> CanvasNoise:
        return canvas_noise(
            sampling.seed,
            canvas=index,
            attempt=attempt,
            passes=self._schedule.max_denoising_steps,
            canvas_length=self._canvas_length,
            vocab_size=self._vocab_size,
            device=self._device,
        )

    @staticmethod
    def _stack_soft(canvases: Sequence[Canvas]) -> Tensor | None:
        """Self-conditioning [S, C, M]: zero for a canvas on its first pass, None when all are."""
        started = next((canvas.soft for canvas in canvases if canvas.soft is not None), None)
        if started is None:
            return None
        zero = torch.zeros_like(started)
        return torch.stack([zero if canvas.soft is None else canvas.soft for canvas in canvases])
