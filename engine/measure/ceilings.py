"""What this machine's memory and matrix units reach: a copy, a sum and a large matrix product.

Knows no model. Invariant: what is taken as the bandwidth is the best of what was measured, so a share of it is never
flattered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.measure.clock import Clock
from engine.measure.roofline import Ceilings
from engine.options import available_memory

COPY_BYTES = 4 * 2**30  # far more than any cache; less only where memory is scarce
SIDE = 8192
REPEATS = 10
# A CPU is here for tests: caches matter little to them, seconds do.
CPU_COPY_BYTES = 2**26
CPU_SIDE = 512


@dataclass(frozen=True, kw_only=True)
class MeasuredCeilings:
    """GB/s (10**9 bytes) and TFLOPS."""

    copy: float  # bytes read plus bytes written, device to device
    read: float  # a sum over a tensor
    matrix: float  # bf16, SIDE cubed

    @property
    def ceilings(self) -> Ceilings:
        return Ceilings(bandwidth=1e9 * max(self.copy, self.read), matrix_rate=1e12 * self.matrix)


def measure_ceilings(device: torch.device) -> MeasuredCeilings:
    """Take a quarter of the memory that is free, at most COPY_BYTES, and give it back."""
    clock = Clock(device)
    copy, read = _memory(clock, device)
    matrix = _matrix(clock, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return MeasuredCeilings(copy=copy, read=read, matrix=matrix)


def _memory(clock: Clock, device: torch.device) -> tuple[float, float]:
    """GB/s of a copy and of a sum."""
    size = min(COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES, available_memory(device) // 4)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = _milliseconds(clock, lambda: target.copy_(source))
    read = _milliseconds(clock, source.sum)
    return 2 * size / copy / 1e6, size / read / 1e6


def _matrix(clock: Clock, device: torch.device) -> float:
    """TFLOPS of a product of two square matrices."""
    side = SIDE if device.type == "cuda" else CPU_SIDE
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / _milliseconds(clock, lambda: torch.mm(left, right, out=product)) / 1e9


def _milliseconds(clock: Clock, run: Callable[[], object]) -> float:
    """The shortest of some calls: a ceiling is what the chip can do, not what it does on average."""
    clock.laps(run, most=3, seconds=1.0)  # warm-up
    laps = clock.laps(run, most=REPEATS, seconds=2.0, least=3)
    device = clock.device(run, most=REPEATS, seconds=2.0)
    return min(laps) if device is None else min(device, *laps)
