"""How much of the GPU's memory is in use, asked for at most once a second.

Knows torch and no request. Invariant: where there is no GPU there is no figure, rather than one that means nothing.
"""

from __future__ import annotations

import time

import torch

from engine.interface import DeviceMemory

# The driver answers in some tens of microseconds, which after every step would be too much.
_GOOD_FOR_SECONDS = 1.0


class MemoryGauge:
    """Reads one device's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._read_at = 0.0
        self._memory: DeviceMemory | None = None

    def read(self) -> DeviceMemory | None:
        """Bytes in use and in all; None for a CPU."""
        now = time.monotonic()
        if self._device.type == "cuda" and (self._memory is None or now - self._read_at >= _GOOD_FOR_SECONDS):
            free, total = torch.cuda.mem_get_info(self._device)
            self._memory, self._read_at = DeviceMemory(used=total - free, total=total), now
        return self._memory
