"""Time on a device: wall clock with the device idle on both sides, and the device's own time.

Knows devices and functions, nothing of models. Invariant: work queued before a lap is never counted in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

HEAD_START = 20_000_000  # clock ticks, about ten milliseconds: longer than the host needs to queue a captured pass


class Clock:
    """Times functions on one device, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done everything it was given."""
        if self._gpu:
            torch.cuda.synchronize(self._device)

    def lap(self, run: Callable[[], object]) -> float:
        """Wall clock of one call of `run`, to the end of what it queued."""
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return 1000 * (time.perf_counter() - began)

    def laps(
        self,
        run: Callable[[], object],
        *,
        most: int,
        seconds: float,
        least: int = 1,
        prepare: Callable[[], object] = lambda: None,
    ) -> list[float]:
        """Several laps: `most`, or as many as begin within `seconds`, but `least`. `prepare` runs before each."""
        ends = time.perf_counter() + seconds
        laps: list[float] = []
        while len(laps) < most and (len(laps) < least or time.perf_counter() < ends):
            prepare()
            laps.append(self.lap(run))
        return laps

    def device(
        self,
        run: Callable[[], object],
        *,
        most: int,
        seconds: float,
        prepare: Callable[[], object] = lambda: None,
    ) -> float | None:
        """The device's own time for one call of `run`, the median of some; None on a CPU.

        The device is kept busy until the host has queued the work, so the host's time does not count, unless it is
        longer than that or `run` waits for the device in between.
        """
        if not self._gpu:
            return None
        ends = time.perf_counter() + seconds
        times: list[float] = []
        while len(times) < most and (not times or time.perf_counter() < ends):
            prepare()
            self.wait()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(HEAD_START)
            start.record()
            run()
            end.record()
            self.wait()
            times.append(start.elapsed_time(end))
        return typical(times)


def typical(laps: Sequence[float]) -> float:
    """The median."""
    return median(laps)
