"""The state of every slot's canvas on the device, and how an attempt at a canvas begins, in plain torch.

Knows slots, noise and the numbers that a pass reads; no model, no requests. Specification like `reference`.

Invariant: state lies at the same addresses for good, so that a captured pass finds it, and what lies next to each other
here is what one kernel (`noise`) writes and one copy to the host brings.

Shapes: S slots, C canvas, P passes at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rng import canvas_noise


class CanvasState:
    """All zeros before the first canvas, but for the pins: there are none."""

    def __init__(self, slots: int, canvas_length: int, passes: int, device: torch.device) -> None:
        def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *sizes, dtype=dtype, device=device)

        self.ids = zeros(canvas_length)  # int64 [S, C], input of the next pass
        self.pins = zeros(canvas_length) - 1  # int64 [S, C], the id a position is held at; -1 = free
        # What the host may ask after a pass lies together, 64 bits each, so that one copy brings it all.
        self.seen = zeros(4, canvas_length)  # int64 [S, 4, C]
        self.best = self.seen[:, 0]  # int64 [S, C], argmax of the last pass; -1 before the first
        self.entropy = self.seen.view(torch.float32)[:, 1, :canvas_length]  # [S, C], of the last pass
        self.kept = self.seen.view(torch.bool)[:, 2, :canvas_length]  # [S, C], accepted in the last pass
        self.finished = self.seen[:, 3, :2]  # int64 [S, 2]: the canvas is done; what was found is finite
        self.counts = zeros(3)  # int64 [S, 3]
        self.passes, self.unchanged, self.stability = self.counts.unbind(1)  # so far; in a row; to be reached
        self.floats = zeros(5, dtype=torch.float32)  # [S, 5]
        self.entropy_bound, self.confidence, self.request_temperature, self.top_p, self.min_p = self.floats.unbind(1)
        self.top_k = zeros(dtype=torch.int32)  # [S]
        self.temperatures = zeros(passes, dtype=torch.float32)  # [S, P], by pass
        self.noise_ids = zeros(passes + 1, canvas_length)  # int64 [S, 1 + P, C], as in `CanvasNoise`
        self.uniforms = zeros(passes + 1, canvas_length, dtype=torch.float32)  # [S, 1 + P, C], likewise


@dataclass(frozen=True, kw_only=True)
class CanvasStart:
    """What an attempt at a canvas begins with."""

    seed: int  # below 2**64
    canvas: int  # 0-based number within the reply
    attempt: int  # 0 = a canvas that opens: nothing is pinned yet
    vocab_size: int
    temperatures: Tensor  # float32 [passes], of every pass the schedule allows
    entropy_bound: float  # nats
    confidence: float  # nats
    stability: int  # passes
    request_temperature: float  # this and the next as in `Draw`
    top_k: int
    top_p: float
    min_p: float


def start_canvas(state: CanvasState, slot: int, start: CanvasStart) -> None:
    """Fill the slot's state: noise of the attempt wherever nothing is pinned, nothing found, no passes made.

    Left as they are: rows of noise and temperatures behind the attempt's last pass, `entropy` and `finished`, which
    say nothing before a pass; pins, unless the canvas opens.
    """
    passes = len(start.temperatures)
    noise = canvas_noise(
        start.seed,
        canvas=start.canvas,
        attempt=start.attempt,
        passes=passes,
        canvas_length=state.ids.shape[1],
        vocab_size=start.vocab_size,
        device=state.ids.device,
    )
    rows = slice(passes + 1)
    state.noise_ids[slot, rows], state.uniforms[slot, rows] = noise.ids, noise.uniforms
    if start.attempt == 0:
        state.pins[slot] = -1
        state.ids[slot] = noise.ids[0]
    else:
        state.ids[slot] = torch.where(state.pins[slot] < 0, noise.ids[0], state.pins[slot])
    state.best[slot] = -1
    state.kept[slot] = False
    state.passes[slot] = state.unchanged[slot] = 0
    state.stability[slot] = start.stability
    state.entropy_bound[slot] = start.entropy_bound
    state.confidence[slot] = start.confidence
    state.request_temperature[slot] = start.request_temperature
    state.top_p[slot] = start.top_p
    state.min_p[slot] = start.min_p
    state.top_k[slot] = start.top_k
    state.temperatures[slot, :passes] = start.temperatures
