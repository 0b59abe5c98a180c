"""Peak memory of a device, over what its weights take.

Knows devices, no models. Invariant: what is counted is what was taken from the device, not what was in use of it.
"""

from __future__ import annotations

import torch

from engine.measure.figure import Figure

GIB = 2**30


class Memory:
    """Counts from `begin` on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = device.type == "cuda"

    def begin(self) -> None:
        """Forget earlier peaks."""
        if self._gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def figure(self, weights: int, context: int) -> Figure:
        """Peak since `begin`, less `weights` bytes; on a CPU none, because nothing there counts a process's peaks."""
        title = f"memory over weights, context {context}"
        if not self._gpu:
            return Figure(key="memory", title=title, value=None, unit="GiB", note="counted on a GPU only")
        reserved = torch.cuda.max_memory_reserved(self._device)
        free, everything = torch.cuda.mem_get_info(self._device)
        detail = {
            "peak_bytes": reserved,
            "peak_in_use_bytes": torch.cuda.max_memory_allocated(self._device),
            "device_used_bytes": everything - free,  # with CUDA's own, and other programs'
        }
        return Figure(key="memory", title=title, value=(reserved - weights) / GIB, unit="GiB", detail=detail)
