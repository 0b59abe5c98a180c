"""An engine's own parts, worked by hand: commit, open a canvas, one pass. Nothing else here knows how they are called.

Random weights never converge, so a canvas gets as many passes as it is told: it is opened as a guided one, which ends
when its guide says so and is otherwise like any other. Knows no clock.

Invariant: a pass is exactly one that `DiffusionEngine.step` would run for the same slots, chunks and canvases.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from engine.canvas import Canvas
from engine.checkpoint import Checkpoint
from engine.engine import DiffusionEngine
from engine.interface import EngineError, EngineInfo, EngineOptions, GenerationRequest, Sampling, Schedule
from engine.options import choose_chunk, chunk_beside


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
        self._chunk = choose_chunk(options.commit_chunk, checkpoint.device)
        self._chunk_beside = chunk_beside(checkpoint.device, checkpoint.config.canvas_length, self._chunk)
        self.config = checkpoint.config
        self._engine = DiffusionEngine.from_checkpoint(checkpoint, options, kernels=kernels, slots=slots)
        parts = self._engine.parts
        self._model, self._denoiser, self._caches = parts.model, parts.denoiser, parts.caches
        self._canvases: list[Canvas | None] = [None] * slots
        self._opened = 0
        self._served: list[str] = []
        self._random = Random(0)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def warm_up(self) -> None:
        """What a server does before it says that it is ready."""
        self._engine.warm_up()

    def close(self) -> None:
        """Free all but the weights."""
        self._engine.close()
        del self._model, self._denoiser, self._caches

    def ids(self, count: int) -> tuple[int, ...]:
        """Random ids."""
        return tuple(self._random.randrange(self.info.vocab_size) for _ in range(count))

    def clear(self) -> None:
        """Forget every prefix and canvas."""
        for cache in self._caches:
            cache.reset()
        self._canvases = [None] * len(self._caches)

    def chunks(self, ids: Sequence[int], *, beside: bool = False) -> list[Sequence[int]]:
        """A prompt as the engine commits it, pass by pass; `beside`: while other slots denoise."""
        size = self._chunk_beside if beside else self._chunk
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    @torch.inference_mode()
    def commit(self, ids: Sequence[int], slot: int = 0) -> None:
        """Commit ids of any length in as many passes as the engine would take."""
        for chunk in self.chunks(ids):
            self._denoiser.step([], [], [(chunk, self._caches[slot])])

    @torch.inference_mode()
    def open(self, slots: Sequence[int] = (0,)) -> None:
        """A fresh canvas in each of these slots."""
        for slot in slots:
            self._opened += 1
            self._canvases[slot] = self._denoiser.open(slot, Sampling(seed=self._opened), 0, guided=True)

    @torch.inference_mode()
    def step(self, slots: Sequence[int] = (0,), commit: tuple[Sequence[int], int] | None = None) -> None:
        """One denoise pass over the canvases of these slots; `commit`: a chunk and its slot, in the same pass.

        Raises EngineError if logits are not finite.
        """
        canvases = []
        for slot in slots:
            canvas = self._canvases[slot]
            assert canvas is not None, f"no canvas is open in slot {slot}"
            canvases.append(canvas)
        commits = [] if commit is None else [(commit[0], self._caches[commit[1]])]
        self._denoiser.step(canvases, [self._caches[slot] for slot in slots], commits)
        for canvas in canvases:
            if canvas.state != "open":
                raise EngineError(f"logits of random weights are {canvas.state} after {canvas.steps} passes")

    def serve(self, ids: Sequence[int]) -> None:
        """Bring a request to its first denoise pass, through the engine's front door; `serving` runs the next ones."""
        self.clear()
        self.submit(ids)
        for _ in self.chunks(ids):
            self.serving()

    def submit(self, ids: Sequence[int]) -> None:
        """Queue a request of the engine."""
        self._opened += 1
        self._served.append(f"bench-{self._opened}")
        length = self.info.canvas_length
        self._engine.submit(
            GenerationRequest(
                id=self._served[-1],
                prompt_ids=tuple(ids),
                max_tokens=length,
                sampling=Sampling(seed=self._opened),
                # a random model with a tied head repeats its input, and is soon sure of it: it must not end
                schedule=Schedule(confidence_threshold=0.0),
            )
        )

    def serving(self) -> None:
        """One step of the engine. Raises EngineError if it ended the request."""
        for event in self._engine.step():
            raise EngineError(f"a request of random weights ended: {event}")

    def served(self) -> None:
        """End the engine's requests."""
        for request_id in self._served:
            self._engine.cancel(request_id)
        self._served.clear()
        self._engine.step()

    @torch.inference_mode()
    def result(self, slot: int = 0) -> tuple[int, ...]:
        """End the canvas; what would be sent."""
        canvas = self._canvases[slot]
        assert canvas is not None, f"no canvas is open in slot {slot}"
        self._denoiser.finish(canvas)
        return canvas.result
