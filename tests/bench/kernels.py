"""Times kernels alone at the model's shapes: `python -m tests.bench.kernels --json PATH --only attention`. Needs a GPU.

Every op is captured in a CUDA graph and replayed, so launches cost what they cost in the engine; then once more under
the profiler, for the share of each of its kernels. A group of ops is one function in GROUPS. What is read and written
is counted from shapes, each tensor once, and held against the bandwidth and the matrix rate measured here and now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import published_config
from engine.kernels import attention, attention_hopper_256, attention_hopper_512, output, soft_embedding
from engine.kernels.reference_output import Draw
from engine.kernels.views import AttentionView, Segment
from engine.measure.ceilings import measure_ceilings
from engine.measure.clock import Clock
from engine.pages import PAGE

ROWS, VOCAB, HIDDEN = 256, 262144, 2816
# what attention is timed on: rows of a slot, positions before them, and whether they are a canvas
PASSES: dict[str, tuple[tuple[int, int, bool], ...]] = {
    **{f"canvas behind {prefix}": ((ROWS, prefix, True),) for prefix in (0, 512, 8192, 32768)},
    "canvas committed, and the next": ((ROWS, 512, False), (ROWS, 768, True)),
    "4 canvases behind 512": ((ROWS, 512, True),) * 4,
    "prompt of 2048 behind 4096": ((2048, 4096, False),),
    "prompt of 100 behind 1023": ((100, 1023, False),),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One op on inputs that are there."""

    name: str
    run: Callable[[], object]
    bytes: int  # that it must read and write
    flops: int = 0  # of matrix units


def output_side(device: torch.device) -> Iterator[Work]:
    """Reading logits, in every variant and on rows that are sure or not, and the self-conditioning embedding."""
    flat = torch.randn(ROWS, VOCAB, device=device, dtype=torch.bfloat16)
    sure = flat * 2
    sure[torch.arange(ROWS), torch.randint(VOCAB, (ROWS,))] = 28.0
    bias = torch.zeros(1, VOCAB, device=device)
    reading = 3 * 2 * ROWS * VOCAB

    def draw(bias: Tensor | None = None, **how: float) -> Draw:
        def rows(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((ROWS,), value, device=device, dtype=dtype)

        return Draw(
            temperature=rows(0.6),
            request_temperature=rows(how.get("temperature", 1.0)),
            top_k=rows(how.get("top_k", 0), torch.int32),
            top_p=rows(how.get("top_p", 1.0)),
            min_p=rows(how.get("min_p", 0.0)),
            uniforms=torch.rand(ROWS, device=device),
            shaped=bool(how),
            bias=bias,
        )

    for sort, logits in (("sure", sure), ("flat", flat)):
        for name, how in {
            "": draw(),
            ", bias": draw(bias),
            ", temperature": draw(temperature=0.7),
            ", top_k 64, top_p 0.95": draw(temperature=0.7, top_k=64, top_p=0.95),
            ", top_p 0.95": draw(top_p=0.95),
            ", min_p 0.05": draw(min_p=0.05),
        }.items():
            extra = 0 if how.bias is None else bias.nbytes

            def run(logits: Tensor = logits, how: Draw = how) -> object:
                return output.read_logits(logits, 30.0, how)

            yield Work(name=f"read_logits, {sort}{name}", run=run, bytes=reading + extra)
    yield from embeddings(device)


def embeddings(device: torch.device) -> Iterator[Work]:
    """From all ids, and from those that matter: one a row, as many as the lists may hold, too many."""
    table = torch.randn(VOCAB, HIDDEN, device=device, dtype=torch.bfloat16)
    size = 2 * (ROWS * VOCAB + VOCAB * HIDDEN + ROWS * HIDDEN)
    for label, count in {"1 id": 1, "200 ids": min(200, VOCAB // 16), "1/8 of the ids": VOCAB // 8}.items():
        probabilities = torch.zeros(ROWS, VOCAB, device=device)
        for row in probabilities:
            row[torch.randperm(VOCAB, device=device)[:count]] = 1 / count
        rounded = probabilities.bfloat16()
        support = soft_embedding.find_support(rounded)
        ways: dict[str, Callable[[], object]] = {
            "matmul": lambda shares=rounded: output.soft_embedding(shares, table, HIDDEN**0.5),  # type: ignore[misc]
            "lists": lambda shares=rounded: soft_embedding.find_support(shares),  # type: ignore[misc]
            "chosen": lambda shares=rounded: soft_embedding.soft_embedding(shares, table, HIDDEN**0.5),  # type: ignore[misc]
        }
        listed = bool(support.lengths.sum() <= support.budget)
        short = 2 * ROWS * (VOCAB + count * HIDDEN)  # each row's embeddings, though several may read the same
        for way, run in ways.items():
            whole = way == "matmul" or (way == "chosen" and not listed)
            moved = size if whole else short if way == "chosen" else 2 * ROWS * VOCAB
            yield Work(
                name=f"soft_embedding, {label} a row, {way}",
                run=run,
                bytes=moved,
                flops=2 * ROWS * VOCAB * HIDDEN if whole else 0,
            )


def attention_side(device: torch.device) -> Iterator[Work]:
    """Both kinds of layers, by the usual kernel and by Hopper's own where one serves them. For the time of these alone,
    queries need not be folded, nor keys be values."""
    config = published_config()
    heads = config.num_heads
    for layer, (title, parts) in product((config.layers[0], config.layers[-1]), PASSES.items()):
        window = config.sliding_window if layer.kind == "sliding" else None
        view = behind(parts, window, device)
        queries = torch.randn(len(view.low), heads, layer.head_dim, device=device, dtype=torch.bfloat16)
        queries *= layer.head_dim**-0.5
        stored = (view.table.numel(), PAGE, layer.kv_heads, layer.head_dim)
        keys, values = (torch.randn(stored, device=device, dtype=torch.bfloat16) for _ in range(2))
        projected = queries.new_empty(len(view.low), heads + layer.kv_heads, layer.head_dim)
        ways = {"usual": attention.attention}
        if attention_hopper_512.serves(projected, projected[0], keys, layer.turned):
            ways["Hopper's"] = attention_hopper_512.attention
        elif attention_hopper_256.serves(projected, projected[0], keys):
            ways["Hopper's"] = attention_hopper_256.attention
        seen = int((view.high - view.low).sum())
        lowest = [int(view.low[segment.first]) for segment in view.segments]
        positions = sum(each.start + each.count - low for each, low in zip(view.segments, lowest, strict=True))
        position = 2 * layer.kv_heads * layer.head_dim * keys.element_size()
        for name, op in ways.items():
            yield Work(
                name=f"attention, {layer.kind}, {title}, {name}",
                run=partial(op, queries, keys, values, view),
                bytes=2 * queries.nbytes + positions * position,
                flops=4 * seen * heads * layer.head_dim,
            )


def behind(parts: Sequence[tuple[int, int, bool]], window: int | None, device: torch.device) -> AttentionView:
    """So many rows of a slot each, filled up, behind so many positions, of a canvas or not; pages lie anywhere."""
    width = max(-(-(prefix + rows) // PAGE) for rows, prefix, _ in parts)
    segments, low, high, of_rows = [], [], [], []
    for index, (rows, prefix, canvas) in enumerate(parts):
        segments.append(Segment(sum(map(len, low)), rows, canvas, prefix))
        position = prefix + torch.arange(rows)
        before = torch.full_like(position, prefix) if canvas else position
        end = torch.full_like(position, prefix + rows) if canvas else position + 1
        begin = torch.zeros_like(position) if window is None else (before - (window - 1)).clamp(min=0)
        fill = -rows % attention.ROW_ALIGN
        low.append(F.pad(begin, (0, fill)))
        high.append(F.pad(end, (0, fill)))
        of_rows.append(torch.full((rows + fill,), index))
    return AttentionView(
        segments=tuple(segments),
        low=torch.cat(low).int().to(device),
        high=torch.cat(high).int().to(device),
        segment=torch.cat(of_rows).int().to(device),
        table=torch.randperm(len(parts) * width).int().view(-1, width).to(device),
        where=torch.cat(of_rows).int().to(device),
    )


GROUPS: dict[str, Callable[[torch.device], Iterator[Work]]] = {"output": output_side, "attention": attention_side}


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a graph, compiled and warm."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def shares(graph: torch.cuda.CUDAGraph) -> dict[str, float]:
    """Milliseconds of each kernel of a replay."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 1000 for event in profile.key_averages() if event.device_time_total}


def measured(work: Work, clock: Clock, bandwidth: float, matrix_rate: float) -> dict[str, Any]:
    """One row of the table; bandwidth in bytes and matrix_rate in operations a second."""
    graph = captured(work.run)
    ms = clock.device(graph.replay, most=30, seconds=5.0)
    assert ms is not None, "there is a GPU"
    bound = 1000 * max(work.bytes / bandwidth, work.flops / matrix_rate)
    return {
        "name": work.name,
        "ms": ms,
        "mb": work.bytes / 1e6,
        "gb_per_s": work.bytes / ms / 1e6,
        "gflop": work.flops / 1e9,
        "bound_ms": bound,
        "share": bound / ms,
        "kernels_ms": shares(graph),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--json", type=Path, help="where all of it is written")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tests.bench.kernels: needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measure_ceilings(device)
    chip = ceilings.ceilings
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "ceilings": vars(ceilings), "ops": []}
    print(f"{found['device']}: {chip.bandwidth / 1e9:.0f} GB/s, {chip.matrix_rate / 1e12:.0f} TFLOPS")
    print(f"{'op':<44} {'ms':>8} {'MB':>7} {'GB/s':>6} {'bound':>8} {'share':>6}")
    clock = Clock(device)
    for group in given.only:
        for work in GROUPS[group](device):
            row = measured(work, clock, chip.bandwidth, chip.matrix_rate)
            found["ops"].append(row)
            figures = f"{row['ms']:>8.4f} {row['mb']:>7.0f} {row['gb_per_s']:>6.0f} {row['bound_ms']:>8.4f}"
            print(f"{row['name']:<44} {figures} {row['share']:>6.0%}")
            for kernel, ms in sorted(row["kernels_ms"].items(), key=lambda item: -item[1]):
                print(f"    {kernel[:60]:<40} {ms:>8.4f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
