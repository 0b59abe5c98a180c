"""Where the time of one pass goes: kernels on a GPU, operators on a CPU.

Knows torch's profiler and a function to call. Invariant: times are those of the kernels themselves, so their sum is how
long the device was busy, and what is missing to the pass's wall clock is gaps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity

from engine.measure.clock import Clock
from engine.measure.figure import Detail

LONGEST_NAME = 96


def profile(device: torch.device, run: Callable[[], object]) -> list[dict[str, Detail]]:
    """Rows of name, calls, milliseconds and share of one call of `run`, longest first; the last two rows are all of
    them together and the call's wall clock (longer than usual: it is being watched)."""
    gpu = device.type == "cuda"
    clock = Clock(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as watched:
        wall = clock.lap(run)
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for event in watched.events() or ():
        if gpu and event.device_type.name == "CUDA":
            spent[event.name].append(event.self_device_time_total / 1000)
        elif not gpu and event.device_type.name == "CPU":
            spent[event.name].append(event.self_cpu_time_total / 1000)
    busy = sum(map(sum, spent.values()))
    rows = [_row(name[:LONGEST_NAME], len(times), sum(times), busy) for name, times in spent.items()]
    rows.sort(key=lambda row: -float(row["milliseconds"] or 0))
    calls = sum(map(len, spent.values()))
    return [*rows, _row("all of these", calls, busy, busy), _row("wall clock, watched", 1, wall, busy)]


def _row(name: str, calls: int, milliseconds: float, busy: float) -> dict[str, Detail]:
    return {
        "name": name,
        "calls": calls,
        "milliseconds": milliseconds,
        "share": milliseconds / busy if busy else None,
    }
