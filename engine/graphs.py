"""CUDA graphs: the only file that knows of them.

A pass is hundreds of small launches, which Python makes more slowly than a fast chip runs them; captured once, they
are replayed by one call. Knows no model: whoever calls `run` promises that equal keys mean equal shapes and equal
addresses.

Invariant: without this file (`run` calling its function) everything computes the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

from engine.kernels.launching import only_compiling

logger = logging.getLogger(__name__)


class Graphs:
    """Captured functions by key. All share one memory pool, so nothing a function returns or leaves behind in memory of
    its own outlives the next: results must be written into tensors made outside."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        """Raises ValueError for graphs on a device that has none."""
        if enabled and device.type != "cuda":
            raise ValueError(f"CUDA graphs on {device}")
        self._enabled = enabled
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._tried: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle() if enabled else None
        # What a pass puts on streams of their own (`Ops.overlap`) fills gaps; what it waits for goes first. A graph's
        # kernels keep the priority of the stream they were captured on.
        self._stream = torch.cuda.Stream(device, priority=-1) if enabled else None

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do `work`: the first time of a key as it is, which compiles kernels and sets libraries up, the second time
        while capturing it, from then on by replaying. Times when kernels are only compiled do not count: none of them
        has been loaded then."""
        if not self._enabled or only_compiling():
            work()
            return
        graph = self._graphs.get(key)
        if graph is None and key not in self._tried:
            self._tried.add(key)
            work()
            return
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # what other threads do meanwhile does not concern this capture
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                work()
            self._graphs[key] = graph
            logger.debug("captured %s", key)
        graph.replay()
