"""The output side: what is read off the logits of a pass, and the embedding that goes back in.

Logits are read twice, by programs of one tile of one row, and probabilities written once. The first reading leaves
four numbers a tile; from these a program a row finds the entropy and the tiles that hold the best id and the drawn one,
and looks the two up; the second reading writes the probabilities. Rows with a top_k, top_p or min_p are drawn by
`output_filters` instead. Knows rows and how each is drawn; no canvases, no schedule.

Invariant: a row's results depend on nothing but the row: no atomics, every sum in an order that only the vocabulary's
size decides. The host reads nothing, and no shape depends on data: all can be captured in a CUDA graph.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.launching import launch
from engine.kernels.output_filters import Found, bias_of, case, draw_filtered, filter_cases, short_cases
from engine.kernels.output_tiles import LOWEST, exp2, filtered, first_above, heights, last, lifted, load_logits, rate_of
from engine.kernels.reference_output import Draw, Reading
from engine.kernels.tiles import rounded

TILE = 4096  # ids at most: 8 KB of a row, 32 a thread; 64 tiles of the model's vocabulary
READ_WARPS = 4  # 32 ids a thread, among which sums are cheap
WARPS = 8  # 16 ids a thread: few enough registers that a multiprocessor is full of threads
GROUP = 16  # ids whose greatest height the filters are told


def tile_size(vocab: int) -> int:
    """Ids a program reads: about a sixteenth of a small vocabulary, so that a small model too fills the chip."""
    return min(TILE, max(128, int(triton.next_power_of_2(vocab)) // 16))


@triton.jit
def tile_kernel(
    logits, bias, temperature, request_temperature, top_k, top_p, min_p, tiles, peaks,
    vocab, canvas, softcap, rows,
    BIASED: tl.constexpr, SHAPED: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """First reading. tiles float32 [4, R, T]: greatest height h; sum of odds to h, NaN if a logit is not finite; sum of
    gap to h times odds; sum of odds at the draw's temperature. peaks [R, T * N / GROUP]: the greatest height of every
    GROUP ids, for rows with a filter."""
    tile, row, count = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    ids = tile * N + tl.arange(0, N)
    wide = row.to(tl.int64)
    logit = load_logits(logits + wide * vocab, ids, vocab, EVEN)
    height = lifted(logit, bias + row // canvas * vocab, ids, vocab, softcap, BIASED, EVEN)
    best = tl.max(height, 0)
    gap = best - height
    odds = exp2(-gap * rate_of(tl.load(temperature + row)))
    total = tl.sum(odds + logit * 0.0, 0)
    place = row * count + tile
    tl.store(tiles + place, best)
    tl.store(tiles + rows * count + place, total)
    tl.store(tiles + 2 * rows * count + place, tl.sum(gap * odds, 0))
    if SHAPED:
        other = tl.load(request_temperature + row)
        if (other != 1) & (other > 0):
            total = tl.sum(exp2(-gap * rate_of(tl.load(temperature + row) * other)), 0)
        tl.store(tiles + 3 * rows * count + place, total)
        if filtered(top_k, top_p, min_p, request_temperature, row, vocab):
            group = wide * count * (N // GROUP) + tile * (N // GROUP) + tl.arange(0, N // GROUP)
            tl.store(peaks + group, tl.max(tl.reshape(height, (N // GROUP, GROUP)), 1))


@triton.jit
def row_kernel(
    logits, bias, temperature, request_temperature, top_k, top_p, min_p, uniforms, tiles, facts, best, entropy, drawn,
    vocab, canvas, softcap, rows, count,
    BIASED: tl.constexpr, SHAPED: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """What the tiles of a row say together; then the best id is looked up in its tile, and the drawn one.

    facts float32 [3, R]: the greatest height, one over the sum of odds, the sum of odds at the draw's temperature.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab
    bias += row // canvas * vocab
    tiles += row * count
    lanes = tl.arange(0, T)
    live = lanes < count
    peak = tl.load(tiles + lanes, mask=live, other=LOWEST)
    total = tl.load(tiles + rows * count + lanes, mask=live, other=0.0)
    moment = tl.load(tiles + 2 * rows * count + lanes, mask=live, other=0.0)
    top = tl.max(peak, 0)
    gap = top - peak
    heat = tl.load(temperature + row)
    weights = exp2(-gap * rate_of(heat)) * total
    odds = tl.sum(weights, 0)
    odds = tl.where(top > LOWEST, odds, float("nan"))  # every id is banned
    moments = tl.sum(exp2(-gap * rate_of(heat)) * (moment + gap * total), 0)
    tl.store(entropy + row, tl.log(odds) + moments / odds / heat)
    tl.store(facts + row, top)
    tl.store(facts + rows + row, 1.0 / odds)

    places = tl.arange(0, N)
    tile = tl.min(tl.where(peak == top, lanes, T), 0)
    tile = tl.where(tile < count, tile, 0)
    height = heights(logits, bias, tile * N + places, vocab, softcap, BIASED, EVEN)
    place = tl.min(tl.where(height == tl.max(height, 0), places, N), 0)
    found = tile * N + tl.where(place < N, place, 0)
    tl.store(best + row, found.to(tl.int64))

    if SHAPED:
        other = tl.load(request_temperature + row)
        if other == 0:
            tl.store(drawn + row, found.to(tl.int64))
            return
        heat *= other
        total = tl.load(tiles + 3 * rows * count + lanes, mask=live, other=0.0)
        weights = exp2(-gap * rate_of(heat)) * total
    running = tl.cumsum(weights, 0)
    all_odds = last(running, lanes, T)
    tl.store(facts + 2 * rows + row, all_odds)
    if SHAPED:
        if filtered(top_k, top_p, min_p, request_temperature, row, vocab):
            return
    target = tl.load(uniforms + row) * all_odds
    tile, before = first_above(weights, running, target, lanes, T)
    height = heights(logits, bias, tile * N + places, vocab, softcap, BIASED, EVEN)
    weights = exp2(-tl.maximum(top - height, 0.0) * rate_of(heat))
    place, _ = first_above(weights, tl.cumsum(weights, 0), target - before, places, N)
    tl.store(drawn + row, (tile * N + place).to(tl.int64))


@triton.jit
def write_kernel(
    logits, bias, temperature, facts, probabilities,
    vocab, canvas, softcap, rows,
    BIASED: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Second reading: probabilities [R, V]."""
    # what was read last is still in the cache: begin there
    tile, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    ids = tile * N + tl.arange(0, N)
    wide = row.to(tl.int64) * vocab
    height = heights(logits + wide, bias + row // canvas * vocab, ids, vocab, softcap, BIASED, EVEN)
    odds = exp2(-(tl.load(facts + row) - height) * rate_of(tl.load(temperature + row)))
    share = rounded(odds * tl.load(facts + rows + row), probabilities.dtype.element_ty)
    if EVEN:
        tl.store(probabilities + wide + ids, share, eviction_policy="evict_first")
    else:
        tl.store(probabilities + wide + ids, share, mask=ids < vocab, eviction_policy="evict_first")


def read_logits(logits: Tensor, softcap: float, draw: Draw) -> Reading:
    """As `reference_output.read_logits`; logits contiguous, bfloat16 or float32."""
    if not logits.is_contiguous():
        raise ValueError(f"logits {list(logits.shape)} must be contiguous, but have strides {logits.stride()}")
    if draw.bias is not None and (draw.bias.dtype != torch.float32 or not draw.bias.is_contiguous()):
        raise ValueError(f"the bias must be float32 and contiguous, not {draw.bias.dtype} of {draw.bias.stride()}")
    rows, vocab = logits.shape
    size = tile_size(vocab)
    count = triton.cdiv(vocab, size)
    new = logits.new_empty
    tiles, facts = new(4, rows, count, dtype=torch.float32), new(3, rows, dtype=torch.float32)
    peaks = new(rows if draw.shaped else 0, count * size // GROUP, dtype=torch.float32)
    best, drawn = (new(rows, dtype=torch.int64) for _ in range(2))
    entropy, probabilities = new(rows, dtype=torch.float32), torch.empty_like(logits)
    bias, canvas = bias_of(draw, logits)
    even, biased = vocab % size == 0, draw.bias is not None
    how = (draw.temperature, draw.request_temperature, draw.top_k, draw.top_p, draw.min_p)
    launch(tile_kernel, (count, rows))(
        logits, bias, *how, tiles, peaks, vocab, canvas, softcap, rows,
        BIASED=biased, SHAPED=draw.shaped, EVEN=even, N=size, GROUP=GROUP, num_warps=READ_WARPS,
    )  # fmt: skip
    launch(row_kernel, (rows,))(
        logits, bias, *how, draw.uniforms, tiles, facts, best, entropy, drawn, vocab, canvas, softcap, rows, count,
        BIASED=biased, SHAPED=draw.shaped, EVEN=even, N=size, T=triton.next_power_of_2(count), num_warps=WARPS,
    )  # fmt: skip
    if draw.shaped:
        draw_filtered(logits, softcap, draw, Found(facts=facts, peaks=peaks, tile=size, group=GROUP), drawn)
    launch(write_kernel, (count, rows))(
        logits, bias, draw.temperature, facts, probabilities, vocab, canvas, softcap, rows,
        BIASED=biased, EVEN=even, N=size, num_warps=WARPS,
    )  # fmt: skip
    return Reading(best=best, entropy=entropy, drawn=drawn, probabilities=probabilities)


def soft_embedding(probabilities: Tensor, embedding: Tensor, scale: float) -> Tensor:
    """As `reference_output.soft_embedding`: cuBLAS, which scales in its epilogue; on other dtypes than the embedding's,
    probabilities are converted first."""
    probabilities = probabilities.to(embedding.dtype)
    return torch.addmm(probabilities.new_zeros(()), probabilities, embedding, beta=0.0, alpha=scale)


def cases() -> list[KernelCase]:
    """At the model's vocabulary and the demo model's."""
    found = short_cases(GROUP)
    for vocab, biased in product((262144, 2048), (False, True)):
        size = tile_size(vocab)
        count = vocab // size
        tile = {"BIASED": biased, "EVEN": True, "N": size}
        row = tile | {"T": count}
        label = f"{vocab}{',bias' * biased}"
        for shaped in (False, True):
            how = {"SHAPED": shaped}
            named = label + ",shaped" * shaped
            found += [
                case(f"output_tile[{named}]", tile_kernel, tile | how | {"GROUP": GROUP}, READ_WARPS),
                case(f"output_row[{named}]", row_kernel, row | how, WARPS),
            ]
        found.append(case(f"output_write[{label}]", write_kernel, tile, WARPS))
        found += filter_cases(label, count, size, GROUP, biased=biased)
    return found
