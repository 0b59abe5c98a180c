"""The host's side of a canvas: what the request wants of it and how far it is. No tensors.

Invariant: whatever decides which way a pass takes on the device is known here, without asking the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from engine.config import GenerationDefaults
from engine.interface import Sampling, Schedule

CanvasState = Literal["open", "done", "unconverged", "non-finite"]


@dataclass
class Canvas:
    """The host's side of one canvas being denoised. Change it through `Denoiser` only."""

    slot: int
    index: int  # 0-based number within the reply
    sampling: Sampling
    schedule: GenerationDefaults
    logprobs: int | None = None  # as in GenerationRequest
    guided: bool = False  # ended by `Denoiser.finish` only: neither by the stop rule nor by running out of passes
    pinned: bool = False  # some position is held
    settled: bool = False  # the last pass met the model's own stop rule
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
        sampling = self.sampling
        return (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) != (1.0, 0, 1.0, 0.0)

    @property
    def penalised(self) -> bool:
        """Whether ids that have occurred in the canvas cost something: not any more if it failed to converge so."""
        return self.attempt == 0 and self._penalises

    @property
    def biased(self) -> bool:
        """Whether the request adds something to the logits."""
        return self._penalises or bool(self.sampling.logit_bias)

    @property
    def _penalises(self) -> bool:
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)


@dataclass(frozen=True)
class Flags:
    """What the host knows of the canvases of a pass, so that the rare ways are taken only where they are asked for."""

    shaped: bool  # some row is drawn in another way
    pinned: bool  # some position is held
    biased: bool  # something is added to some logit
    penalised: bool  # and it depends on what the canvas holds

    @classmethod
    def of(cls, canvases: Sequence[Canvas]) -> Flags:
        return cls(
            shaped=any(canvas.shaped for canvas in canvases),
            pinned=any(canvas.pinned for canvas in canvases),
            biased=any(canvas.biased for canvas in canvases),
            penalised=any(canvas.penalised for canvas in canvases),
        )


def resolve(asked: Schedule, default: GenerationDefaults) -> GenerationDefaults:
    """The checkpoint's schedule with what a request wants otherwise."""
    return replace(default, **{name: value for name, value in asdict(asked).items() if value is not None})
