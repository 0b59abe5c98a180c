"""An engine's own parts, worked by hand: commit, open a canvas, one pass. Nothing else here knows how they are called.

Random weights never converge, so a canvas gets as many passes as it is told, not as many as it needs. Knows no clock.

Invariant: a pass is exactly one that `DiffusionEngine.step` would run for the same slots, chunks and canvases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.denoise import Canvas
from engine.engine import DiffusionEngine
from engine.interface import EngineError, EngineInfo, EngineOptions, Sampling


class Rig:
    """One engine, and the canvas open in each of its slots."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        title: str,
        kernels: str,
        context: int,
        slots: int = 1,
    ) -> None:
        """Raises EngineError if there is no memory for the context."""
        options = EngineOptions(model=title, context_length=context)
        self._chunk = options.commit_chunk
        self.config = checkpoint.config
        self._engine = DiffusionEngine.from_checkpoint(checkpoint, options, kernels=kernels, slots=slots)
        parts = self._engine.parts
        self._model, self._denoiser, self._caches = parts.model, parts.denoiser, parts.caches
        self._canvases: list[Canvas | None] = [None] * slots
        self._opened = 0
        self._device = checkpoint.device
        self._random = torch.Generator().manual_seed(0)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def close(self) -> None:
        """Free all but the weights."""
        self._engine.close()
        del self._model, self._denoiser, self._caches

    def ids(self, count: int) -> Tensor:
        """Random ids, int64 [count], on the device."""
        drawn = torch.randint(self.info.vocab_size, (count,), generator=self._random)
        return drawn.to(self._device)

    def clear(self) -> None:
        """Forget every prefix and canvas."""
        for cache in self._caches:
            cache.reset()
        self._canvases = [None] * len(self._caches)

    def chunks(self, ids: Tensor) -> list[Tensor]:
        """A prompt as the engine commits it: pass by pass."""
        return list(ids.split(self._chunk))

    @torch.inference_mode()
    def commit(self, ids: Tensor, slot: int = 0) -> None:
        """Commit ids of any length in as many passes as the engine would take."""
        for chunk in self.chunks(ids):
            self._denoiser.step([], [], [(chunk, self._caches[slot])])

    @torch.inference_mode()
    def open(self, slots: Sequence[int] = (0,)) -> None:
        """A fresh canvas in each of these slots."""
        for slot in slots:
            self._opened += 1
            self._canvases[slot] = self._denoiser.open(slot, Sampling(seed=self._opened), 0)

    @torch.inference_mode()
    def step(self, slots: Sequence[int] = (0,), commit: tuple[Tensor, int] | None = None) -> None:
        """One denoise pass over the canvases of these slots; `commit`: a chunk and its slot, in the same pass.

        Raises EngineError if logits are not finite, or a canvas has had all its passes.
        """
        canvases = []
        for slot in slots:
            canvas = self._canvases[slot]
            assert canvas is not None, f"no canvas is open in slot {slot}"
            canvases.append(canvas)
        commits = [] if commit is None else [(commit[0], self._caches[commit[1]])]
        self._denoiser.step(canvases, [self._caches[slot] for slot in slots], commits)
        for canvas in canvases:
            if canvas.state != "open" or canvas.just_redrawn:
                state = "used up" if canvas.state == "open" else canvas.state
                raise EngineError(f"a canvas of random weights is {state} after {canvas.steps} passes")

    @torch.inference_mode()
    def result(self, slot: int = 0) -> tuple[int, ...]:
        """What would be sent if the canvas were done now."""
        canvas = self._canvases[slot]
        assert canvas is not None, f"no canvas is open in slot {slot}"
        return self._denoiser.argmax(canvas)
