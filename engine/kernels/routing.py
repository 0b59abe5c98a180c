"""From the experts each row chose to the tiles of a grouped matmul, all on the device.

`schedule` sorts the choices by expert and cuts each expert's share into tiles of at most `tile` rows; `route` makes
the choices from the router's scores, a product too small for one program a tile of it: its columns are split among
programs, and whoever chooses adds up what they found. Knows nothing of quantised weights.

Invariant: every shape depends only on the number of rows, never on what was chosen, and the host reads nothing: both
can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.catalog import KernelCase
from engine.kernels.grouped import consecutive, launch_matmul, matmul_cases, rows_class, stored
from engine.kernels.launching import launch
from engine.kernels.tiles import rounded, widened

SCANS = (2048, 4096)  # choices read at once: the fewest passes whose choices still live in registers
SCAN_WARPS = 8
ROUTE_TILE = 32  # rows
ROUTE_PARTS = {256: 11, 512: 6, 1024: 4}  # by class of rows: about 90 programs and more; 2816 columns are 11 * 256
ROUTE_WARPS = 1  # a row of 128 scores is four numbers a lane: reductions without shared memory


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which rows each tile multiplies, and with which expert."""

    order: Tensor  # int32 [R * A]: the choice (row * A + place) at each sorted position
    expert: Tensor  # int32 [T]
    start: Tensor  # int32 [T]: the tile's first sorted position
    rows: Tensor  # int32 [T]: how many positions it has, 0 for a tile that is not needed
    tile: int


def tile_count(choices: int, experts: int, tile: int) -> int:
    """Tiles that are enough whatever was chosen."""
    return experts + choices // tile


@triton.jit
def schedule_kernel(chosen, order, expert, start, rows, choices, TILE: tl.constexpr, LANES: tl.constexpr):
    """One program an expert e. Its positions begin at the number of choices below e; its tiles at e + begin // TILE,
    which leaves at least as many as it needs before the next expert's and so needs no sum over experts."""
    me = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    below = tl.zeros((LANES,), tl.int32)
    mine = tl.zeros((LANES,), tl.int32)
    for first in range(0, choices, LANES):
        ids = tl.load(chosen + first + lanes, mask=first + lanes < choices, other=2147483647).to(tl.int32)
        below += (ids < me).to(tl.int32)
        mine += (ids == me).to(tl.int32)
    begin = tl.sum(below, 0)
    count = tl.sum(mine, 0)

    place = begin
    for first in range(0, choices, LANES):
        ids = tl.load(chosen + first + lanes, mask=first + lanes < choices, other=2147483647).to(tl.int32)
        found = (ids == me).to(tl.int32)
        tl.store(order + place + tl.cumsum(found, 0) - 1, first + lanes, mask=found != 0)
        place += tl.sum(found, 0)

    first_tile = me + begin // TILE
    tiles = me + 1 + (begin + count) // TILE - first_tile
    for at in range(0, tiles, LANES):
        index = at + lanes
        live = index < tiles
        tl.store(expert + first_tile + index, me + tl.zeros_like(index), mask=live)
        tl.store(start + first_tile + index, begin + index * TILE, mask=live)
        left = tl.minimum(tl.maximum(count - index * TILE, 0), TILE)
        tl.store(rows + first_tile + index, left, mask=live)


def schedule(chosen: Tensor, experts: int, tile: int) -> Schedule:
    """chosen int64 [R, A], contiguous, each in [0, experts); tile rows at most a tile. Stable: an expert's choices keep
    their order."""
    choices = chosen.numel()
    tiles = tile_count(choices, experts, tile)
    out = torch.empty(choices + 3 * tiles, dtype=torch.int32, device=chosen.device)
    order, expert, start, rows = out.split((choices, tiles, tiles, tiles))
    lanes = SCANS[0] if choices <= SCANS[0] else SCANS[1]
    launch(schedule_kernel, (experts,))(
        chosen, order, expert, start, rows, choices, TILE=tile, LANES=lanes, num_warps=SCAN_WARPS
    )
    return Schedule(order=order, expert=expert, start=start, rows=rows, tile=tile)


@triton.jit
def choose_kernel(
    scores, expert_scale, weights, chosen, rows, experts, PARTS: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """One program a row: softmax, the A best (of equal ones the first), renormalised and scaled. PARTS > 0: scores are
    the sum of float32 [PARTS, rows, experts], rounded to bfloat16 as one product's would be."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    places = tl.arange(0, PLACES)
    pointers = scores + row * experts + lanes
    if PARTS == 0:
        score = widened(tl.load(pointers, mask=lanes < experts, other=float("-inf")))
    else:
        score = tl.load(pointers, mask=lanes < experts, other=float("-inf"))
        for part in tl.static_range(1, PARTS):
            score += tl.load(pointers + part * rows * experts, mask=lanes < experts, other=0.0)
        score = widened(rounded(score, tl.bfloat16))
    odds = tl.exp(score - tl.max(score, 0))
    odds = tl.where(lanes < experts, odds / tl.sum(odds, 0), -1.0)
    best = tl.zeros((PLACES,), tl.float32)
    ids = tl.zeros((PLACES,), tl.int32)
    for place in tl.static_range(A):
        top = tl.max(odds, 0)
        at = tl.min(tl.where(odds == top, lanes, LANES - 1), 0)
        best = tl.where(places == place, top, best)
        ids = tl.where(places == place, at, ids)
        odds = tl.where(lanes == at, -1.0, odds)
    scale = tl.load(expert_scale + ids)
    out = row * A + places
    tl.store(weights + out, best / tl.sum(best, 0) * scale, mask=places < A)
    tl.store(chosen + out, ids.to(tl.int64), mask=places < A)


def choose(scores: Tensor, expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """scores [R, E], or float32 [parts, R, E] whose sum they are; expert_scale float32 [E] -> weights float32 [R, A],
    expert ids int64 [R, A], A = top_k.

    Of equal scores the lower id is chosen first.
    """
    *parts, rows, experts = scores.shape
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=scores.device)
    chosen = torch.empty(rows, top_k, dtype=torch.int64, device=scores.device)
    launch(choose_kernel, (rows,))(
        scores, expert_scale, weights, chosen, rows, experts,
        PARTS=parts[0] if parts else 0,
        A=top_k,
        LANES=triton.next_power_of_2(experts),
        PLACES=triton.next_power_of_2(top_k),
        num_warps=ROUTE_WARPS,
    )  # fmt: skip
    return weights, chosen


def route(x: Tensor, projection: Tensor, expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As `reference.route`; all contiguous."""
    if x.dtype != torch.bfloat16:  # float32 goes by the library, whose products keep all of its digits
        return choose(F.linear(x, projection), expert_scale, top_k)
    rows = x.shape[0]
    parts = x.new_empty(ROUTE_PARTS[rows_class(rows)], rows, projection.shape[0], dtype=torch.float32)
    launch_matmul(x, stored(projection), consecutive(x, ROUTE_TILE), parts, ROUTE_TILE)
    return choose(parts, expert_scale, top_k)


def cases() -> list[KernelCase]:
    """For 128 experts of which 8 are chosen."""
    tensors = {"chosen": "*i64:16", "order": "*i32:16", "expert": "*i32", "start": "*i32", "rows": "*i32"}
    found = [
        KernelCase(
            name=f"schedule[{tile}, {lanes} at once]",
            kernel=schedule_kernel,
            signature=tensors | {"choices": "i32:16"},
            constants={"TILE": tile, "LANES": lanes},
            num_warps=SCAN_WARPS,
            num_stages=3,
        )
        for tile, lanes in product((32, 64, 128), SCANS)
    ]
    found += matmul_cases("plain", 2816, (ROUTE_TILE,), gated=False, routed=False, split=True)
    for parts in (0, *ROUTE_PARTS.values()):
        found.append(
            KernelCase(
                name=f"choose[8 of 128, {parts} parts]",
                kernel=choose_kernel,
                signature={
                    "scores": "*fp32:16" if parts else "*bf16:16",
                    "expert_scale": "*fp32:16",
                    "weights": "*fp32:16",
                    "chosen": "*i64:16",
                    "rows": "i32:16",
                    "experts": "i32:16",
                },
                constants={"PARTS": parts, "A": 8, "LANES": 128, "PLACES": 8},
                num_warps=ROUTE_WARPS,
                num_stages=3,
            )
        )
    return found
