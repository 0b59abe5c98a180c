"""Times the expert kernels in many tilings at full size: `python -m tests.bench.tune_experts --json PATH`. Needs a GPU.

What it finds goes into `engine.kernels.grouped` by hand or, for weights in fragments, into `experts_hopper`, with an
entry in LOG.md. Kernels are compiled first, in many processes, into Triton's cache; then each is timed alone, as a
captured pass runs it, over the weights of one layer, which no cache holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from engine.kernels import experts_hopper, grouped
from engine.kernels.choosing import GraphTimer
from engine.kernels.experts import routed
from engine.kernels.experts_hopper import launch_fragments
from engine.kernels.fragments import arranged
from engine.kernels.grouped import FORMATS, Rows, Tiling, launch_gated, launch_matmul, stored
from engine.kernels.operands import FRAGMENTS, taken
from engine.kernels.rounding import round_rows
from engine.kernels.routing import schedule
from engine.kernels.tiles import ordered
from engine.kernels.weights import Fp8Weight, FragmentWeight, Int4Weight, Nvfp4Weight, Weight, nbytes

HIDDEN, WIDTH, ACTIVE = 2816, 704, 8
LAUNCHES = 10  # in one captured graph
FRAGMENT_FORMATS = ("nvfp4-fragments", "int4-fragments")  # Hopper's
Launch = Callable[[Tiling], None]


def weight(form: str, experts: int, out: int, width: int) -> Weight:
    """Random bytes of a format, on the GPU."""
    if form in FRAGMENT_FORMATS:
        found = weight(form.removesuffix("-fragments"), experts, out, width)
        assert isinstance(found, Nvfp4Weight | Int4Weight)
        return arranged(found)
    shape = (experts, out, width)

    def bytes_of(*sizes: int) -> torch.Tensor:
        return torch.randint(0, 120, sizes, dtype=torch.uint8, device="cuda")

    rows = torch.full((experts, out), 1e-3, device="cuda")
    match form:
        case "plain":
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * width**-0.5
        case "fp8" | "e4m3":
            return Fp8Weight(bytes_of(*shape).view(torch.float8_e4m3fn), rows)
        case "nvfp4":
            scale = bytes_of(experts, out, width // 16).view(torch.float8_e4m3fn)
            return Nvfp4Weight(bytes_of(experts, out, width // 2), scale, rows)
        case _:
            scale = torch.rand(experts, out, width // 32, device="cuda").bfloat16() / 100
            return Int4Weight(bytes_of(experts, out, width // 2), scale)


def tilings(form: str, bm: int, gated: bool) -> Iterator[Tiling]:
    """What is worth trying: decoded weights want four warps, and a cap on registers where it makes room for one more
    program. Of a kernel for fragments only stages and the cap are free."""
    if form in FRAGMENT_FORMATS:
        for stages, cap in itertools.product((2, 3, 4, 6), (None, 96, 128, 168)):
            yield Tiling(BM=bm, BN=64, BK=64, warps=4, stages=stages, registers=cap)
        return
    decoded = form not in ("plain", "e4m3")
    caps = (None, 128 if bm == 32 else 168) if decoded else (None,)
    for bn, bk, warps, stages, cap in itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4, 5, 6, 8), caps):
        stage = (2 if gated else 1) * bn * bk * grouped.BITS[form] // 8 + bm * bk * (1 if form == "e4m3" else 2)
        if (
            (form != "e4m3" and (HIDDEN if gated else WIDTH) % bk)
            or (decoded and warps == 8)
            or stage * stages > 200_000
        ):
            continue
        yield Tiling(BM=bm, BN=bn, BK=bk, warps=warps, stages=stages, registers=cap)


def launcher(form: str, gated: bool, experts: int, rows: int, bm: int) -> tuple[Launch, int]:
    """A function that launches one kernel with a tiling, and the bytes of weights it reads."""
    matrix = weight(form, experts, 2 * WIDTH if gated else HIDDEN, HIDDEN if gated else WIDTH)
    chosen = torch.stack([torch.randperm(experts)[: min(ACTIVE, experts)] for _ in range(rows)]).cuda()
    active = chosen.shape[1]
    tiles = routed(schedule(chosen, experts, bm))
    width = HIDDEN if gated else WIDTH
    x = torch.randn(rows if gated else rows * active, width, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(rows * active, WIDTH if gated else HIDDEN, dtype=torch.bfloat16, device="cuda")
    if isinstance(matrix, FragmentWeight):
        return partial(_launch_fragments, matrix, taken(x, FRAGMENTS), tiles, out, gated, active), nbytes(matrix)
    flat = stored(matrix, eight_bit=form == "e4m3")
    eight = round_rows(x) if form == "e4m3" else None
    given = {bk: eight or ordered(x, form, bk) for bk in (64, 128) if eight or width % bk == 0}

    def launch(tile: Tiling) -> None:
        with mock.patch.object(grouped, "tiling", lambda *_, **__: tile):
            if gated:
                order = "plain" if form == "e4m3" else form
                launch_gated(given[tile.BK], flat, tiles, out, bm, active=active, following=order, block=64)
            else:
                launch_matmul(given[tile.BK], flat, tiles, out, bm)

    return launch, nbytes(matrix)


def _launch_fragments(
    matrix: FragmentWeight, x: torch.Tensor, tiles: Rows, out: torch.Tensor, gated: bool, active: int, tile: Tiling
) -> None:
    with mock.patch.dict(experts_hopper.TILINGS, {(matrix.form, gated, tile.BM): (tile.stages, tile.registers)}):
        launch_fragments(x, matrix, tiles, out, tile.BM, gated=gated, active=active)


def compile_one(task: tuple[str, bool, int, Tiling]) -> str | None:
    form, gated, bm, tile = task
    try:
        launch, _ = launcher(form, gated, 2, 32, bm)
        launch(tile)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--format", nargs="+", default=list(FORMATS), choices=FORMATS + FRAGMENT_FORMATS)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--bm", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_experts: needs an NVIDIA GPU", file=sys.stderr)
        return 2
    tasks = [
        (form, gated, given.bm, tile)
        for form in given.format
        for gated in (True, False)
        for tile in tilings(form, given.bm, gated)
    ]
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        failed = dict(zip(tasks, pool.map(compile_one, tasks, chunksize=1), strict=True))
    time, found = GraphTimer(), []
    for (form, gated), group in itertools.groupby(tasks, key=lambda task: task[:2]):
        launch, size = launcher(form, gated, 128, given.rows, given.bm)
        rows = []
        for task in group:
            if failed[task]:
                rows.append({"tile": vars(task[3]), "error": failed[task]})
                continue
            ms = time([partial(launch, task[3])] * LAUNCHES)[0] / 1000
            rows.append({"tile": vars(task[3]), "ms": round(ms, 4), "gb_per_s": round(size / ms / 1e6)})
        rows.sort(key=lambda row: row.get("ms", 1e9))
        found.append({"format": form, "kernel": "gated" if gated else "matmul", "mb": size / 1e6, "tilings": rows})
        print(form, found[-1]["kernel"], f"{size / 1e6:.0f} MB")
        for row in rows[:6] + rows[-2:]:
            print("   ", row, flush=True)
    if given.json:
        given.json.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
