"""Where the time of one pass goes: kernels on a GPU, operators on a CPU.

Knows torch's profiler and a function to call. Invariant: times are those of the kernels themselves; how long the device
was busy counts what ran at the same time once, and what is missing to the pass's wall clock is gaps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity

from engine.measure.clock import Clock
from engine.measure.figure import Detail

LONGEST_NAME = 96
SUMS = ("all of these", "device busy", "wall clock, watched")  # the last rows of a profile


def profile(device: torch.device, run: Callable[[], object]) -> list[dict[str, Detail]]:
    """Rows of name, calls, milliseconds and share of one call of `run`, longest first; then SUMS: all of them together,
    how long the device was busy, and the call's wall clock (longer than usual: it is being watched)."""
    gpu = device.type == "cuda"
    clock = Clock(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as watched:
        wall = clock.lap(run)
    spent: defaultdict[str, list[float]] = defaultdict(list)
    spans: list[tuple[float, float]] = []
    for event in watched.events() or ():
        if event.device_type.name == ("CUDA" if gpu else "CPU"):
            spent[event.name].append((event.self_device_time_total if gpu else event.self_cpu_time_total) / 1000)
            spans.append((event.time_range.start / 1000, event.time_range.end / 1000))
    whole = sum(map(sum, spent.values()))
    rows = [_row(name[:LONGEST_NAME], len(times), sum(times), whole) for name, times in spent.items()]
    rows.sort(key=lambda row: -float(row["milliseconds"] or 0))
    calls = sum(map(len, spent.values()))
    return [
        *rows,
        *(_row(name, calls, time, whole) for name, time in zip(SUMS, (whole, union(spans), wall), strict=True)),
    ]


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length that some spans (start, end) cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _row(name: str, calls: int, milliseconds: float, busy: float) -> dict[str, Detail]:
    return {
        "name": name,
        "calls": calls,
        "milliseconds": milliseconds,
        "share": milliseconds / busy if busy else None,
    }
