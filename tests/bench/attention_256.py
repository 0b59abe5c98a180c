"""An experiment: attention of 256 columns behind a window for Hopper in Gluon, against the engine's.

    python -m tests.bench.attention_256              # errors and times, on an H100 or H200
    python -m tests.bench.attention_256 --compile    # registers and shared memory, without one

The kernels are in `attention_256_kernels`. They run in a process of their own, which is ended when it says nothing for
LIMIT_S; all but the variant that hung is then begun again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import attention as usual
from engine.kernels.ahead_of_time import compile_case
from engine.kernels.choosing import GraphTimer
from engine.kernels.views import AttentionView, Segment
from engine.pages import PAGE
from tests.bench.attention_256_kernels import COLUMNS, GROUP, KV_HEADS, VARIANTS, Variant, attention, case_of

WINDOW = 1024
LAUNCHES = 10  # in one captured graph
START_S, LIMIT_S = 60, 20  # without a word


def canvas(prefix: int, rows: int = 256) -> Segment:
    return Segment(0, rows, True, prefix)


def prompt(rows: int, prefix: int) -> Segment:
    return Segment(0, rows, False, prefix)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What is timed. Where its segments begin follows from their order."""

    title: str
    segments: tuple[Segment, ...]
    steep: float = 1.0  # how far a row's scores are apart; at 1 hardly any tile but the first moves the best


PASSES = (
    *(Pass(title=f"canvas behind {prefix}", segments=(canvas(prefix),)) for prefix in (0, 512, 1023, 8192, 32768)),
    Pass(title="canvas behind 8192, steep", segments=(canvas(8192),), steep=12.0),
    Pass(title="4 canvases behind 512", segments=(canvas(512),) * 4),
    Pass(title="prompt of 2048 behind 4096", segments=(prompt(2048, 4096),)),
    Pass(title="prompt of 256 behind 1000, canvas behind 512", segments=(prompt(256, 1000), canvas(512))),
    Pass(title="prompt of 100 behind 1023", segments=(prompt(100, 1023),), steep=4.0),
    Pass(title="prompt of 70 and one of 1, canvas of 40", segments=(prompt(70, 0), prompt(1, 0), canvas(0, rows=40))),
)


def inputs(work: Pass, device: str) -> tuple[Tensor, Tensor, Tensor, AttentionView]:
    """Random rows, every segment of a slot whose pages lie anywhere: queries, keys, values, view."""
    draw = torch.Generator(device).manual_seed(0)
    totals = [each.start + each.count for each in work.segments]
    width = max(-(-total // PAGE) for total in totals)
    table = torch.randperm(len(totals) * width, generator=draw, device=device).int().view(-1, width)
    segments, low, high = [], [], []
    for each, total in zip(work.segments, totals, strict=True):
        segments.append(replace(each, first=sum(map(len, low))))
        position = each.start + torch.arange(each.count)
        behind = torch.full_like(position, each.start) if each.uniform else position
        fill = -each.count % usual.ROW_ALIGN
        low.append(F.pad((behind - (WINDOW - 1)).clamp(min=0), (0, fill)))
        high.append(F.pad(torch.full_like(position, total) if each.uniform else position + 1, (0, fill)))
        # what no row may look at
        table[len(low) - 1, : int(low[-1][0]) // PAGE] = -1
        table[len(low) - 1, -(-total // PAGE) :] = -1
    of_rows = torch.cat([torch.full_like(part, index) for index, part in enumerate(low)])
    view = AttentionView(
        segments=tuple(segments),
        low=torch.cat(low).int().to(device),
        high=torch.cat(high).int().to(device),
        segment=of_rows.int().to(device),
        table=table,
        where=of_rows.int().to(device),
    )

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=draw).bfloat16()

    stored = (table.numel(), PAGE, KV_HEADS, COLUMNS)
    queries = noise(len(of_rows), KV_HEADS * GROUP, COLUMNS) * (work.steep * COLUMNS**-0.5)
    return queries, noise(*stored), noise(*stored), view


def exact(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """In float32, with all scores of a segment at once; rows that fill up are nought."""
    out = torch.zeros_like(queries, dtype=torch.float32)
    for segment, table in zip(view.segments, view.table, strict=True):
        rows = slice(segment.first, segment.first + segment.count)
        low, high = view.low[rows], view.high[rows]
        begin, end = int(low[0]) // PAGE, -(-int(high[-1]) // PAGE)
        pages = table[begin:end].long()
        key, value = (x[pages].flatten(0, 1).float().repeat_interleave(GROUP, 1) for x in (keys, values))
        scores = torch.einsum("rhd,phd->hrp", queries[rows].float(), key)
        position = begin * PAGE + torch.arange(key.shape[0], device=key.device)
        seen = (position >= low[:, None]) & (position < high[:, None])
        out[rows] = torch.einsum("hrp,phd->rhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)
    return out.flatten(1)


def apart(result: Tensor, expected: Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def measure(variants: Sequence[Variant], link: Connection) -> None:
    """Tell of every pass what the engine and the variants take, in microseconds, and how far from exact they are; and
    of a variant before it runs."""
    time = GraphTimer()
    for work in PASSES:
        given = inputs(work, "cuda")
        truth = exact(*given)
        taken, result = time([partial(usual.attention, *given)] * LAUNCHES)
        link.send((work.title, "engine", taken, apart(result, truth)))
        for variant in variants:
            link.send(variant)
            taken, result = time([partial(attention, variant, *given)] * LAUNCHES)
            link.send((work.title, variant.name, taken, apart(result, truth)))
    link.send(None)


def measured() -> tuple[dict[str, dict[str, tuple[float, float]]], list[str]]:
    """All of it, by pass and variant, in a process of its own; and what failed or was ended after LIMIT_S. What is left
    then begins again."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    failed: list[str] = []
    left = list(VARIANTS)
    spawn = multiprocessing.get_context("spawn")
    while left:
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=measure, args=(left, theirs), daemon=True)
        process.start()
        theirs.close()
        running: Variant | None = None
        try:
            while mine.poll(LIMIT_S if found else START_S):
                told = mine.recv()
                if told is None:
                    return found, failed
                if isinstance(told, Variant):
                    running = told
                else:
                    found.setdefault(told[0], {})[told[1]] = told[2:]
        except EOFError:  # it said why on stderr
            pass
        process.kill()
        process.join()
        if running is None:
            return found, [*failed, "engine"]
        failed.append(running.name)
        left.remove(running)
    return found, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compile", action="store_true", help="for sm_90, and run nothing")
    if parser.parse_args().compile:
        for variant in VARIANTS:
            needs = compile_case(case_of(variant), 90)
            print(f"{variant.name}: {needs.registers} registers, {needs.spilled} bytes spilled, {needs.shared} shared")
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("attention_256: needs a GPU of capability 9.0", file=sys.stderr)
        return 2
    found, failed = measured()
    for title, of_pass in found.items():
        print(title)
        for name, (taken, error) in of_pass.items():
            print(f"    {name:<24} {taken:8.1f} us   {error:.1e} from exact")
    print(json.dumps({"bench": "attention_256", "passes": found, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
