"""Canvases from open to done: the denoising loop of the model, in its order.

    canvas = noise
    repeat: logits = denoise(canvas, soft) / T;  done?;  draw;  accept;  re-noise the rest;  soft = embed(logits)

The state of every slot's canvas lives on the device, and a pass updates it there: the host reads one small tensor a
pass. Knows the model's pass and the sampler; nothing of requests, queues or eos ids. What is committed in the same pass
only passes through.

Invariant: only a canvas that converged is ever "done". One that runs out of passes is re-drawn once with other noise
and then given up ("unconverged"): committed, such a canvas would ruin everything after it. Logits that are not
finite give it up at once.

Shapes: S slots, n canvases of a pass, C canvas, P passes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine import sampler
from engine.config import GenerationDefaults
from engine.interface import Sampling
from engine.kernels.reference_output import Draw, Reading
from engine.kv_cache import KVCache
from engine.rng import canvas_noise

ATTEMPTS = 2  # the first draw and one re-draw

CanvasState = Literal["open", "done", "unconverged", "non-finite"]


class Model(Protocol):
    """What the loop needs of the model."""

    def run(
        self,
        commits: Sequence[tuple[Tensor, KVCache]],
        canvas: Tensor | None,
        probabilities: Tensor | None,
        caches: Sequence[KVCache],
    ) -> Tensor | None: ...

    def read(self, logits: Tensor, draw: Draw) -> Reading: ...


@dataclass
class Canvas:
    """The host's side of one canvas being denoised. Change it through `Denoiser` only."""

    slot: int
    index: int  # 0-based number within the reply
    sampling: Sampling
    attempt: int = 0
    passes: int = 0  # of this attempt
    steps: int = 0  # passes of all attempts
    state: CanvasState = "open"
    result: tuple[int, ...] = field(default=())  # the argmax, once state is "done"

    @property
    def just_redrawn(self) -> bool:
        """True between the pass that used up the first attempt and the next one."""
        return self.attempt > 0 and self.passes == 0

    @property
    def shaped(self) -> bool:
        """Whether the request asks for another draw than the model's own."""
        return (self.sampling.temperature, self.sampling.top_k, self.sampling.top_p) != (1.0, 0, 1.0)


class Denoiser:
    """Opens canvases and moves them on, one denoise pass at a time."""

    def __init__(
        self,
        model: Model,
        schedule: GenerationDefaults,
        *,
        slots: int,
        canvas_length: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._schedule = schedule
        self._canvas_length = canvas_length
        self._vocab_size = vocab_size
        self._device = device
        passes = schedule.max_denoising_steps
        self._temperatures = torch.tensor(
            [sampler.temperature_at(step, schedule) for step in range(1, passes + 1)], device=device
        )
        shape = (slots, canvas_length)

        def state(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        self._ids = state(*shape)  # input of the next pass
        self._best = state(*shape)  # argmax of the last pass; -1 before the first
        self._passes, self._unchanged = state(slots), state(slots)
        self._noise_ids = state(slots, passes + 1, canvas_length)
        self._uniforms = state(slots, passes + 1, canvas_length, dtype=torch.float32)
        self._request_temperature, self._top_p = (state(slots, dtype=torch.float32) for _ in range(2))
        self._top_k = state(slots, dtype=torch.int32)
        self._probabilities: Tensor | None = None  # [S, C, V] of the last pass, 0 before the first; as logits' dtype

    def open(self, slot: int, sampling: Sampling, index: int) -> Canvas:
        """A fresh canvas of noise in a slot: number `index` of its reply."""
        canvas = Canvas(slot=slot, index=index, sampling=sampling)
        self._request_temperature[slot] = sampling.temperature
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = min(sampling.top_k, self._vocab_size)
        self._start(canvas)
        return canvas

    def step(
        self, canvases: Sequence[Canvas], caches: Sequence[KVCache], commits: Sequence[tuple[Tensor, KVCache]] = ()
    ) -> None:
        """One pass over all `canvases` (open ones), each on its own prefix in `caches`; `commits` share the pass.

        A slot may have a canvas here and a chunk among the commits, which then belongs to its prefix.
        """
        if not canvases:
            self._model.run(commits, None, None, [])
            return
        active = torch.tensor([canvas.slot for canvas in canvases], device=self._device)
        soft = self._probabilities if any(canvas.passes for canvas in canvases) else None
        logits = self._model.run(commits, self._ids[active], None if soft is None else soft[active], caches)
        assert logits is not None, "there were canvases"
        verdict = self._update(logits, active, shaped=any(canvas.shaped for canvas in canvases))
        status = torch.stack((verdict.done, verdict.finite)).tolist()  # the one thing the host waits for
        for canvas, done, finite in zip(canvases, *status, strict=True):
            self._advance(canvas, done=done, finite=finite)

    def argmax(self, canvas: Canvas) -> tuple[int, ...]:
        """The likeliest id of every position after the last pass: the result, if the canvas is done."""
        return tuple(self._best[canvas.slot].tolist())

    def _update(self, logits: Tensor, active: Tensor, *, shaped: bool) -> sampler.Verdict:
        """What follows a pass, on the device. logits [n, C, V]; active int64 [n], the canvases' slots."""
        passes = self._passes[active]

        def rows(values: Tensor) -> Tensor:
            return values.repeat_interleave(self._canvas_length)

        draw = Draw(
            temperature=rows(self._temperatures[passes]),
            request_temperature=rows(self._request_temperature[active]),
            top_k=rows(self._top_k[active]),
            top_p=rows(self._top_p[active]),
            uniforms=self._uniforms[active, passes + 1].flatten(),
            shaped=shaped,
        )
        reading = self._model.read(logits.flatten(0, 1), draw)
        by_canvas = (len(active), self._canvas_length)
        best, entropy = reading.best.view(by_canvas), reading.entropy.view(by_canvas)
        verdict = sampler.judge(best, entropy, self._best[active], self._unchanged[active], self._schedule)
        kept = sampler.accept(entropy, self._schedule.entropy_bound)
        self._ids[active] = torch.where(kept, reading.drawn.view(by_canvas), self._noise_ids[active, passes + 1])
        self._best[active] = best
        self._unchanged[active] = verdict.unchanged
        self._passes[active] = passes + 1
        if self._probabilities is None:
            sizes = (self._ids.shape[0], *logits.shape[1:])
            self._probabilities = torch.zeros(sizes, dtype=reading.probabilities.dtype, device=self._device)
        self._probabilities[active] = reading.probabilities.view_as(logits)
        return verdict

    def _advance(self, canvas: Canvas, *, done: bool, finite: bool) -> None:
        """The host's side of the same."""
        canvas.passes += 1
        canvas.steps += 1
        if not finite:
            canvas.state = "non-finite"
        elif done:
            canvas.state = "done"
            canvas.result = self.argmax(canvas)
        elif canvas.passes == self._schedule.max_denoising_steps:
            if canvas.attempt + 1 == ATTEMPTS:
                canvas.state = "unconverged"
                return
            canvas.attempt += 1
            canvas.passes = 0
            self._start(canvas)

    def _start(self, canvas: Canvas) -> None:
        """Fill the slot with the noise of the canvas's attempt."""
        slot = canvas.slot
        noise = canvas_noise(
            canvas.sampling.seed,
            canvas=canvas.index,
            attempt=canvas.attempt,
            passes=self._schedule.max_denoising_steps,
            canvas_length=self._canvas_length,
            vocab_size=self._vocab_size,
            device=self._device,
        )
        self._noise_ids[slot], self._uniforms[slot] = noise.ids, noise.uniforms
        self._ids[slot] = noise.ids[0]
        self._best[slot] = -1
        self._passes[slot] = self._unchanged[slot] = 0
        if self._probabilities is not None:
            self._probabilities[slot] = 0
