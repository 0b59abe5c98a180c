"""The self-conditioning embedding where it needs few rows of the table: rows that are sure of their id need only some.

The dense product reads the whole embedding, the larger part of what a step reads beside the experts, and its
arithmetic is as much as the head's. `find_support` lists for each row the ids whose probabilities are all but
DROPPED of its mass; `add_support` sums their embeddings. If some row has no short list, or all lists together are too
long, `dense_kernel` computes the product instead: which of the two it is, is decided on the device, and the kernels of
the other return at once. So all of it can be captured in a CUDA graph. Knows no layers.

Invariant: what is left out is less than the rounding of the probabilities to bfloat16, at most DROPPED of a row's mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import SHARED_LIMIT, chip_of
from engine.kernels.launching import launch
from engine.kernels.output import tile_size
from engine.kernels.tiles import dot, rounded, widened

DROPPED = 2.0**-10  # of a row's mass; a probability near 1 is rounded by up to 2^-9
# A row lists the ids of at least the higher of these probabilities that leaves out no more than that.
HIGH_CUT, LOW_CUT = 2.0**-12, 2.0**-17
CAPACITY = 1024  # ids of a row's list
SHARE = 4  # the lists may have a fourth as many ids as the vocabulary: then they are read in a fourth of the time
FIND_WARPS, ADD_WARPS = 4, 4
LIST_LANES = 1024
COLUMNS, CHUNK = 256, 16  # of a program that adds: columns, and ids at once
SPLIT_ROWS = 256  # for which the ids are split so that every multiprocessor has a tile


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How the dense product is cut."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def dense_tile(chip: int) -> Tile:
    """As large as the chip's shared memory lets it be: what is read twice comes from its cache."""
    return Tile(BM=128, BN=128 if SHARED_LIMIT[chip] < 2**17 else 256, BK=64, warps=8, stages=4)


@dataclass(frozen=True, kw_only=True)
class Support:
    """The ids that matter, by row; only the first `lengths` of each are set."""

    ids: Tensor  # int32 [R, CAPACITY], ascending
    weights: Tensor  # float32 [R, CAPACITY], their probabilities
    lengths: Tensor  # int32 [R]; more than `budget` for a row that has too many
    budget: int  # the lists are used if their lengths sum to no more


@triton.jit
def count_kernel(probabilities, counts, masses, vocab, rows, HIGH: tl.constexpr, LOW: tl.constexpr, N: tl.constexpr):
    """Of a tile of a row: counts int32 [2, R, T], ids of at least HIGH, and of at least LOW; masses float32 [3, R, T],
    of all ids, of those below HIGH, of those below LOW."""
    tile, row, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    ids = tile * N + tl.arange(0, N)
    share = widened(tl.load(probabilities + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=0.0))
    place = row * tiles + tile
    step = rows * tiles
    both = (share >= HIGH).to(tl.int32) + ((share >= LOW).to(tl.int32) << 16)  # at most 4096 each: one sum for two
    both = tl.sum(both, 0)
    tl.store(counts + place, both & 0xFFFF)
    tl.store(counts + step + place, both >> 16)
    tl.store(masses + place, tl.sum(share, 0))
    tl.store(masses + step + place, tl.sum(tl.where(share >= HIGH, 0.0, share), 0))
    tl.store(masses + 2 * step + place, tl.sum(tl.where(share >= LOW, 0.0, share), 0))


@triton.jit
def cut_kernel(
    counts, masses, cuts, starts, lengths, rows, tiles, budget,
    HIGH: tl.constexpr, LOW: tl.constexpr, DROPPED: tl.constexpr, CAPACITY: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A program a row: cuts float32 [R]; lengths [R]; starts int32 [R, T], of each tile's ids in the row's list, -1 for
    a tile that has none to list."""
    row = tl.program_id(0)
    lanes = tl.arange(0, T)
    live = lanes < tiles
    place = row * tiles + lanes
    step = rows * tiles
    allowed = tl.sum(tl.load(masses + place, mask=live, other=0.0), 0) * DROPPED
    high = tl.sum(tl.load(masses + step + place, mask=live, other=0.0), 0) <= allowed
    low = tl.sum(tl.load(masses + 2 * step + place, mask=live, other=0.0), 0) <= allowed
    count = tl.load(counts + tl.where(high, 0, step) + place, mask=live, other=0)
    ends = tl.cumsum(count, 0)
    length = tl.sum(count, 0)
    fits = (high | low) & (length <= CAPACITY)  # NaN does not
    tl.store(starts + place, tl.where(count > 0, tl.where(fits, ends - count, -1), -1), mask=live)
    tl.store(cuts + row, tl.where(high, HIGH, LOW))
    tl.store(lengths + row, tl.where(fits, length, budget + 1))


@triton.jit
def list_kernel(
    probabilities, cuts, starts, ids, weights, vocab,
    CAPACITY: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Lists the ids of a tile of a row, if there are any: so few registers that many programs find none at a time."""
    tile, row = tl.program_id(0), tl.program_id(1)
    at = tl.load(starts + row * tl.num_programs(0) + tile)
    if at >= 0:
        cut = tl.load(cuts + row)
        at += row * CAPACITY
        for first in range(0, N, LANES):
            lanes = tile * N + first + tl.arange(0, LANES)
            share = widened(tl.load(probabilities + row.to(tl.int64) * vocab + lanes, mask=lanes < vocab, other=0.0))
            kept = (share >= cut).to(tl.int32)
            places = at + tl.cumsum(kept, 0) - 1
            tl.store(ids + places, lanes, mask=kept != 0)
            tl.store(weights + places, share, mask=kept != 0)
            at += tl.sum(kept, 0)


@triton.jit
def _listed(lengths, rows, budget, ROWS: tl.constexpr):
    """Whether the lists are to be used."""
    lanes = tl.arange(0, ROWS)
    return tl.sum(tl.load(lengths + lanes, mask=lanes < rows, other=0), 0) <= budget


@triton.jit
def add_kernel(
    ids, weights, lengths, embedding, out, rows, width, scale, budget,
    CAPACITY: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[row] = scale * sum of weights * embedding[ids], in float32 and in the ids' order, if the lists are used."""
    if _listed(lengths, rows, budget, ROWS):
        row = tl.program_id(1)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        live = columns < width
        length = tl.load(lengths + row)
        total = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, length, CHUNK):
            places = first + tl.arange(0, CHUNK)
            listed = places < length
            chosen = tl.load(ids + row * CAPACITY + places, mask=listed, other=0).to(tl.int64)
            weight = tl.load(weights + row * CAPACITY + places, mask=listed, other=0.0)
            pointers = embedding + chosen[:, None] * width + columns[None, :]
            values = tl.load(pointers, mask=listed[:, None] & live[None, :], other=0.0)
            total += tl.sum(widened(values) * weight[:, None], 0)
        tl.store(out + row.to(tl.int64) * width + columns, rounded(total * scale, out.dtype.element_ty), mask=live)


@triton.jit
def dense_kernel(
    probabilities, embedding, lengths, parts, rows, vocab, width, budget, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """parts[s] = the product over ids s * span to (s + 1) * span, float32 [S, R, M], unless the lists are used."""
    if not _listed(lengths, rows, budget, ROWS):
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        m = tl.program_id(1) * BM + tl.arange(0, BM)
        part = tl.program_id(2)
        left = probabilities + (m % rows).to(tl.int64)[:, None] * vocab  # beyond the last row: not stored
        right = embedding + (n % width)[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for first in range(part * span, tl.minimum((part + 1) * span, vocab), BK):
            k = first + tl.arange(0, BK)
            shares, values = left + k[None, :], right + k.to(tl.int64)[:, None] * width
            if EVEN:
                shares, values = tl.load(shares), tl.load(values)
            else:
                shares = tl.load(shares, mask=k[None, :] < vocab, other=0.0)
                values = tl.load(values, mask=k[:, None] < vocab, other=0.0)
            acc = dot(shares, values, acc)
        out = parts + (part * rows + m).to(tl.int64)[:, None] * width + n[None, :]
        tl.store(out, acc, mask=(m[:, None] < rows) & (n[None, :] < width))


@triton.jit
def part_kernel(parts, lengths, out, rows, width, scale, budget, splits, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """out = scale * the sum of parts, in their order, unless the lists are used."""
    if not _listed(lengths, rows, budget, ROWS):
        row = tl.program_id(1).to(tl.int64)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        live = columns < width
        total = tl.zeros((COLUMNS,), tl.float32)
        for part in range(splits):
            total += tl.load(parts + (part * rows + row) * width + columns, mask=live, other=0.0)
        tl.store(out + row * width + columns, rounded(total * scale, out.dtype.element_ty), mask=live)


def find_support(probabilities: Tensor) -> Support:
    """The ids that matter in probabilities [R, V]; contiguous, bfloat16 or float32."""
    rows, vocab = probabilities.shape
    size = tile_size(vocab)
    tiles = triton.cdiv(vocab, size)
    new = probabilities.new_empty
    counts, starts = (new(part, rows, tiles, dtype=torch.int32) for part in (2, 1))
    masses, cuts = new(3, rows, tiles, dtype=torch.float32), new(rows, dtype=torch.float32)
    support = Support(
        ids=new(rows, CAPACITY, dtype=torch.int32),
        weights=new(rows, CAPACITY, dtype=torch.float32),
        lengths=new(rows, dtype=torch.int32),
        budget=vocab // SHARE,
    )
    launch(count_kernel, (tiles, rows))(
        probabilities, counts, masses, vocab, rows, HIGH=HIGH_CUT, LOW=LOW_CUT, N=size, num_warps=FIND_WARPS
    )
    launch(cut_kernel, (rows,))(
        counts, masses, cuts, starts, support.lengths, rows, tiles, support.budget,
        HIGH=HIGH_CUT, LOW=LOW_CUT, DROPPED=DROPPED, CAPACITY=CAPACITY, T=triton.next_power_of_2(tiles), num_warps=1,
    )  # fmt: skip
    launch(list_kernel, (tiles, rows))(
        probabilities, cuts, starts, support.ids, support.weights, vocab,
        CAPACITY=CAPACITY, N=size, LANES=min(size, LIST_LANES), num_warps=FIND_WARPS,
    )  # fmt: skip
    return support


def add_support(support: Support, embedding: Tensor, scale: float, out: Tensor) -> None:
    """Store the expected embedding times scale in out [R, M], if the lists are used; embedding [V, M], contiguous."""
    rows, width = out.shape
    launch(add_kernel, (triton.cdiv(width, COLUMNS), rows))(
        support.ids, support.weights, support.lengths, embedding, out, rows, width, scale, support.budget,
        CAPACITY=CAPACITY, COLUMNS=COLUMNS, CHUNK=CHUNK, ROWS=triton.next_power_of_2(rows), num_warps=ADD_WARPS,
    )  # fmt: skip


def add_everything(probabilities: Tensor, support: Support, embedding: Tensor, scale: float, out: Tensor) -> None:
    """The same from all ids, if the lists are not used."""
    (rows, vocab), width = probabilities.shape, embedding.shape[1]
    tile = dense_tile(chip_of(out.device))
    columns = triton.cdiv(width, tile.BN)
    splits = max(1, _multiprocessors(out.device) // (columns * triton.cdiv(SPLIT_ROWS, tile.BM)))
    span = triton.cdiv(triton.cdiv(vocab, tile.BK), splits) * tile.BK
    parts = out.new_empty(splits, rows, width, dtype=torch.float32)
    lanes = triton.next_power_of_2(rows)
    launch(dense_kernel, (columns, triton.cdiv(rows, tile.BM), splits))(
        probabilities, embedding, support.lengths, parts, rows, vocab, width, support.budget, span,
        BM=tile.BM, BN=tile.BN, BK=tile.BK, EVEN=vocab % tile.BK == 0, ROWS=lanes,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    launch(part_kernel, (triton.cdiv(width, COLUMNS), rows))(
        parts, support.lengths, out, rows, width, scale, support.budget, splits,
        COLUMNS=COLUMNS, ROWS=lanes, num_warps=ADD_WARPS,
    )  # fmt: skip


def soft_embedding(probabilities: Tensor, embedding: Tensor, scale: float) -> Tensor:
    """As `reference_output.soft_embedding`, within the rounding of bfloat16. All contiguous, of one dtype.

    Which way it goes depends on all rows, so let them be of one canvas: then another's cannot matter.
    """
    if probabilities.dtype != embedding.dtype:
        raise ValueError(f"probabilities are {probabilities.dtype}, the embedding is {embedding.dtype}")
    out = embedding.new_empty(probabilities.shape[0], embedding.shape[1])
    support = find_support(probabilities)
    add_support(support, embedding, scale, out)
    add_everything(probabilities, support, embedding, scale, out)
    return out


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


ARGUMENTS = {
    "probabilities": "*bf16:16", "embedding": "*bf16:16", "out": "*bf16:16", "counts": "*i32:16", "masses": "*fp32:16",
    "cuts": "*fp32:16", "starts": "*i32:16", "ids": "*i32:16", "weights": "*fp32:16", "lengths": "*i32:16",
    "parts": "*fp32:16", "vocab": "i32:16", "rows": "i32:16", "width": "i32:16", "tiles": "i32:16", "budget": "i32:16",
    "span": "i32:16", "splits": "i32", "scale": "fp32",
}  # fmt: skip


def cases() -> list[KernelCase]:
    """At the model's shapes, one canvas at a time."""
    size, rows = tile_size(262144), 256
    cut = {"HIGH": HIGH_CUT, "LOW": LOW_CUT}
    listing = {"CAPACITY": CAPACITY}
    add = {"COLUMNS": COLUMNS, "ROWS": rows}
    tiles = {"T": 262144 // size, "DROPPED": DROPPED}

    def case(name: str, kernel: Any, constants: dict[str, Any], num_warps: int, **more: Any) -> KernelCase:
        signature = {argument: ARGUMENTS[argument] for argument in kernel.arg_names if argument not in constants}
        options = {"num_stages": 3} | more
        return KernelCase(
            name=f"soft_{name}", kernel=kernel, signature=signature, constants=constants, num_warps=num_warps, **options
        )

    found = [
        case("count", count_kernel, cut | {"N": size}, FIND_WARPS),
        case("cut", cut_kernel, cut | listing | tiles, 1),
        case("list", list_kernel, listing | {"N": size, "LANES": LIST_LANES}, FIND_WARPS),
        case("add", add_kernel, listing | add | {"CHUNK": CHUNK}, ADD_WARPS),
        case("parts", part_kernel, add, ADD_WARPS),
    ]
    for columns in (128, 256):
        chips = tuple(chip for chip in SHARED_LIMIT if dense_tile(chip).BN == columns)
        tile = dense_tile(chips[0])
        constants = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "EVEN": True, "ROWS": rows}
        name = f"dense[{tile.BM}x{tile.BN}x{tile.BK}]"
        found.append(case(name, dense_kernel, constants, tile.warps, num_stages=tile.stages, chips=chips))
    return found
