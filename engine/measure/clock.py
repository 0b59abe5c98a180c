"""Time on a device: wall clock with the device idle on both sides, and beside it the device's own time.

Knows devices and functions, nothing of models. Invariant: work queued before a lap is never counted in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Lap:
    """Milliseconds. `device`: between events on the GPU's stream; None on a CPU."""

    wall: float
    device: float | None


class Clock:
    """Times functions on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done everything it was given."""
        if self._gpu:
            torch.cuda.synchronize(self._device)

    def lap(self, run: Callable[[], object]) -> Lap:
        """One call of `run`, to the end of what it queued."""
        self.wait()
        if not self._gpu:
            began = time.perf_counter()
            run()
            return Lap(1000 * (time.perf_counter() - began), None)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began = time.perf_counter()
        start.record()
        run()
        end.record()
        self.wait()
        return Lap(1000 * (time.perf_counter() - began), start.elapsed_time(end))

    def laps(
        self,
        run: Callable[[], object],
        *,
        most: int,
        seconds: float,
        least: int = 1,
        prepare: Callable[[], object] = lambda: None,
    ) -> list[Lap]:
        """Several calls: `most`, or as many as begin within `seconds`, but `least`. `prepare` runs before each."""
        ends = time.perf_counter() + seconds
        laps: list[Lap] = []
        while len(laps) < most and (len(laps) < least or time.perf_counter() < ends):
            prepare()
            laps.append(self.lap(run))
        return laps


def wall(laps: Sequence[Lap]) -> float:
    """Median milliseconds of wall clock."""
    return median(lap.wall for lap in laps)


def device(laps: Sequence[Lap]) -> float | None:
    """Median milliseconds of the device; None on a CPU."""
    times = [lap.device for lap in laps if lap.device is not None]
    return median(times) if times else None
