"""Draws from rows with a top_k, a top_p or a min_p, without sorting the vocabulary.

What a filter keeps is what has at most some gap to the best, so a filter is a search for that gap: by bisection over
its bits, which order like the gaps, of how many ids or how much of the odds lie within it. For most rows the few
hundred likeliest ids are enough. `shortlist_kernel` finds the groups of ids that hold them, from every group's peak;
`short_kernel` has them all in registers, searches there and draws. A row whose filters keep more than that (a top_p of
0.95 over hundreds of ids) is left to `long_kernel`, which reads the row again for every three bits. Rows without a
filter cost a program that looks and returns. top_k comes first, top_p is a share of what that leaves, then min_p.

Invariant: a shortlist is complete: every id whose gap is at most the list's limit is in it. So both ways keep the same
ids, but for the rounding of their sums; which is taken depends on the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.launching import launch
from engine.kernels.output_tiles import LOWEST, exp2, filtered, first_above, heights, last, rate_of
from engine.kernels.reference_output import Draw

GROUPS = 512  # of the shortlist: at least as many of the likeliest ids, if no two peaks are equal
SEARCH_WARPS = 16
LIST_WARPS = 32  # all peaks of a row, 16,384 of the model's vocabulary, are in registers at once
PROBES = 8  # gaps tried in one reading of a row: three bits and a bit
EVERYTHING = tl.constexpr(0x7F800000)  # bits of infinity: a limit that every gap is within


@dataclass(frozen=True, kw_only=True)
class Found:
    """What reading the logits has left for the filters."""

    facts: Tensor  # float32 [3, R]: the greatest height, one over the sum of odds, the sum of odds at the draw's heat
    peaks: Tensor  # float32 [R, G]: each group's greatest height
    tile: int  # ids of a tile
    group: int  # ids of a group


@triton.jit
def _least(bits, weights, need, enough):
    """The least limit whose weights sum to `need`; bits int32 [N], weights [N] are 0 or more; `enough` is one that is
    enough."""
    low = 0
    for _ in range(31):
        middle = low + (enough - low) // 2
        reached = tl.sum(tl.where(bits <= middle, weights, 0.0), 0) >= need
        enough = tl.where(reached, middle, enough)
        low = tl.where(reached, low, tl.minimum(middle + 1, enough))
    return enough


@triton.jit
def shortlist_kernel(
    request_temperature, top_k, top_p, min_p, facts, peaks, listed, limits, vocab, groups,
    GROUPS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The widest limit that at most GROUPS groups come within, and those. listed int32 [R, GROUPS], ascending, -1 after
    the last; limits int32 [R], -1 if more groups than that are level with the best."""
    row = tl.program_id(0)
    if filtered(top_k, top_p, min_p, request_temperature, row, vocab):
        lanes = tl.arange(0, G)
        peak = tl.load(peaks + row.to(tl.int64) * groups + lanes, mask=lanes < groups, other=LOWEST)
        gap = tl.maximum(tl.load(facts + row) - peak, 0.0)
        bits = tl.where(lanes < groups, gap.to(tl.int32, bitcast=True), 0x7FFFFFFF)
        low = -1
        high = EVERYTHING
        for _ in range(32):
            middle = low + (high - low + 1) // 2
            fits = tl.sum((bits <= middle).to(tl.int32), 0) <= GROUPS
            low = tl.where(fits, middle, low)
            high = tl.where(fits, high, tl.maximum(middle - 1, low))
        tl.store(limits + row, low)
        within = bits <= low
        place = tl.cumsum(within.to(tl.int32), 0)
        tl.store(listed + row * GROUPS + place - 1, lanes, mask=within & (place <= GROUPS))
        rest = tl.arange(0, GROUPS)
        tl.store(listed + row * GROUPS + rest, tl.full((GROUPS,), -1, tl.int32), mask=rest >= tl.max(place, 0))


@triton.jit
def short_kernel(
    logits, bias, temperature, request_temperature, top_k, top_p, min_p, uniforms, facts, listed, limits, drawn, left,
    vocab, canvas, softcap, rows,
    BIASED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Draws what can be drawn from the shortlist. left int32 [R]: 1 for a row whose filters keep more than it holds."""
    row = tl.program_id(0)
    if filtered(top_k, top_p, min_p, request_temperature, row, vocab):
        lanes = tl.arange(0, GROUPS * GROUP)
        group = tl.load(listed + row * GROUPS + lanes // GROUP)
        ids = tl.where(group < 0, vocab, group * GROUP + lanes % GROUP)
        height = heights(
            logits + row.to(tl.int64) * vocab, bias + row // canvas * vocab, ids, vocab, softcap, BIASED, False
        )
        limit = tl.load(limits + row)
        rate = rate_of(tl.load(temperature + row) * tl.load(request_temperature + row))
        gap = tl.maximum(tl.load(facts + row) - height, 0.0)
        bits = gap.to(tl.int32, bitcast=True)
        live = (ids < vocab) & (bits <= limit)
        odds = tl.where(live, exp2(-gap * rate), 0.0)
        decided = limit >= EVERYTHING

        k, total = tl.load(top_k + row), tl.load(facts + 2 * rows + row)
        count = live.to(tl.float32)
        k_decides = (k > 0) & (k < vocab) & (tl.sum(count, 0) >= k)
        if k_decides:
            limit = _least(bits, count, k, limit)
            total = tl.sum(tl.where(bits <= limit, odds, 0.0), 0)
        k_lies_beyond = (k > 0) & (k < vocab) & (tl.sum(count, 0) < k)

        share = tl.load(top_p + row)
        p_decides = (share < 1) & (limit >= 0) & (tl.sum(tl.where(bits <= limit, odds, 0.0), 0) >= share * total)
        p_decides = tl.where(k_lies_beyond, False, p_decides)  # `total` is not known
        if p_decides:
            limit = _least(bits, odds, share * total, limit)

        least = tl.load(min_p + row)
        # the likeliest id that is not listed would be too unlikely, whatever the others keep
        m_decides = exp2(-tl.maximum(limit, 0).to(tl.float32, bitcast=True) * rate) < least
        m_decides = tl.where(k_lies_beyond & (share < 1), False, m_decides)
        decided = decided | k_decides | p_decides | m_decides
        if decided:
            odds = tl.where((bits <= limit) & (odds >= least), odds, 0.0)
            running = tl.cumsum(odds, 0)
            target = tl.load(uniforms + row) * last(running, lanes, GROUPS * GROUP)
            place, _ = first_above(odds, running, target, lanes, GROUPS * GROUP)
            found = tl.sum(tl.where(lanes == place, ids, 0), 0)
            tl.store(drawn + row, tl.minimum(found, vocab - 1).to(tl.int64))
        tl.store(left + row, 1 - decided.to(tl.int32))
    else:
        tl.store(left + row, 0)


@triton.jit
def _row_odds(logits, bias, ids, vocab, softcap, top, rate, BIASED: tl.constexpr, EVEN: tl.constexpr):
    """Bits of the gaps of ids of a row, and their odds, 0 beyond the vocabulary."""
    gap = tl.maximum(top - heights(logits, bias, ids, vocab, softcap, BIASED, EVEN), 0.0)
    return gap.to(tl.int32, bitcast=True), exp2(-gap * rate)


@triton.jit
def _least_of_row(
    logits, bias, vocab, softcap, top, rate, need, low, enough,
    COUNT: tl.constexpr, BIASED: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """As `_least`, of a whole row: PROBES limits at once, evenly between `low` and `enough`. COUNT: weights are 1.

    Logits in bfloat16 have few different gaps, so both ends are also moved to gaps that there are.
    """
    probe = tl.arange(0, PROBES)
    while low < enough:
        step = (enough - low + PROBES) // (PROBES + 1)
        limits = tl.minimum(low + (probe + 1) * step - 1, enough - 1)[:, None]
        sums = tl.zeros((PROBES, N), tl.float32)
        lowest = tl.full((1, N), EVERYTHING, tl.int32)
        highest = tl.full((1, N), -1, tl.int32)
        for first in range(0, vocab, N):
            ids = first + tl.arange(0, N)[None, :]
            bits, odds = _row_odds(logits, bias, ids, vocab, softcap, top, rate, BIASED, EVEN)
            if COUNT:
                odds = (ids < vocab).to(tl.float32)
            sums += tl.where(bits <= limits, odds, 0.0)
            lowest = tl.minimum(lowest, tl.where(bits >= low, bits, EVERYTHING))
            highest = tl.maximum(highest, tl.where(bits <= enough, bits, -1))
        short = tl.sum((tl.sum(sums, 1) < need).to(tl.int32), 0)  # how many probes, the lower ones, are not enough
        high = tl.where(short < PROBES, tl.minimum(low + (short + 1) * step - 1, enough), enough)
        low = tl.maximum(tl.minimum(low + short * step, high), tl.min(tl.min(lowest, 1), 0))
        enough = tl.minimum(high, tl.max(tl.max(highest, 1), 0))
    return enough


@triton.jit
def _widest(share, total, vocab, rate):
    """Bits of a gap within which there is certainly `share` of the odds, which sum to `total`: were all ids just beyond
    it, they would have half of what may be left out."""
    gap = tl.log2(2.0 * vocab / ((1.0 - share) * total)) / rate
    return tl.maximum(gap, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def long_kernel(
    logits, bias, temperature, request_temperature, top_k, top_p, min_p, uniforms, facts, limits, left, drawn,
    vocab, canvas, softcap, rows, count,
    BIASED: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, T: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """Draws what `short_kernel` left, a row a program, by reading the row several times."""
    row = tl.program_id(0)
    if tl.load(left + row) != 0:
        logits += row.to(tl.int64) * vocab
        bias += row // canvas * vocab
        top, total = tl.load(facts + row), tl.load(facts + 2 * rows + row)
        rate = rate_of(tl.load(temperature + row) * tl.load(request_temperature + row))
        tiles, places = tl.arange(0, T), tl.arange(0, N)
        limit = EVERYTHING
        low = tl.load(limits + row) + 1  # the shortlist was not enough
        k, share, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        if (k > 0) & (k < vocab):
            limit = _least_of_row(
                logits, bias, vocab, softcap, top, rate, k.to(tl.float32), low, limit, True, BIASED, EVEN, N, PROBES
            )
            kept = tl.zeros((N,), tl.float32)
            for tile in range(count):
                bits, odds = _row_odds(logits, bias, tile * N + places, vocab, softcap, top, rate, BIASED, EVEN)
                kept += tl.where(bits <= limit, odds, 0.0)
            total = tl.sum(kept, 0)
            low = tl.minimum(low, 0)  # a share of these may be found in the shortlist
        if share < 1:
            limit = tl.minimum(limit, _widest(share, total, vocab, rate))
            limit = _least_of_row(
                logits, bias, vocab, softcap, top, rate, share * total, low, limit, False, BIASED, EVEN, N, PROBES
            )
        sums = tl.zeros((T,), tl.float32)
        for tile in range(count):
            bits, odds = _row_odds(logits, bias, tile * N + places, vocab, softcap, top, rate, BIASED, EVEN)
            odds = tl.where((bits <= limit) & (odds >= least), odds, 0.0)
            sums = tl.where(tiles == tile, tl.sum(odds, 0), sums)
        running = tl.cumsum(sums, 0)
        target = tl.load(uniforms + row) * last(running, tiles, T)
        tile, before = first_above(sums, running, target, tiles, T)
        bits, odds = _row_odds(logits, bias, tile * N + places, vocab, softcap, top, rate, BIASED, EVEN)
        odds = tl.where((bits <= limit) & (odds >= least), odds, 0.0)
        place, before = first_above(odds, tl.cumsum(odds, 0), target - before, places, N)
        tl.store(drawn + row, tl.minimum(tile * N + place, vocab - 1).to(tl.int64))


def bias_of(draw: Draw, logits: Tensor) -> tuple[Tensor, int]:
    """The bias (any tensor where there is none) and the rows that share one of its rows."""
    if draw.bias is None:
        return logits, logits.shape[0]
    return draw.bias, logits.shape[0] // draw.bias.shape[0]


def draw_filtered(logits: Tensor, softcap: float, draw: Draw, found: Found, drawn: Tensor) -> None:
    """Store the ids of the rows with a filter in drawn, int64 [R]."""
    rows, vocab = logits.shape
    groups, count = found.peaks.shape[1], triton.cdiv(vocab, found.tile)
    listed = drawn.new_empty(rows, GROUPS, dtype=torch.int32)
    limits, left = (drawn.new_empty(rows, dtype=torch.int32) for _ in range(2))
    bias, canvas = bias_of(draw, logits)
    filters = (draw.request_temperature, draw.top_k, draw.top_p, draw.min_p)
    launch(shortlist_kernel, (rows,))(
        *filters, found.facts, found.peaks, listed, limits, vocab, groups,
        GROUPS=GROUPS, G=triton.next_power_of_2(groups), num_warps=LIST_WARPS,
    )  # fmt: skip
    biased = draw.bias is not None
    launch(short_kernel, (rows,))(
        logits, bias, draw.temperature, *filters, draw.uniforms, found.facts, listed, limits, drawn, left,
        vocab, canvas, softcap, rows,
        BIASED=biased, GROUPS=GROUPS, GROUP=found.group, num_warps=SEARCH_WARPS,
    )  # fmt: skip
    launch(long_kernel, (rows,))(
        logits, bias, draw.temperature, *filters, draw.uniforms, found.facts, limits, left, drawn,
        vocab, canvas, softcap, rows, count,
        BIASED=biased, EVEN=vocab % found.tile == 0, N=found.tile, T=triton.next_power_of_2(count), PROBES=PROBES,
        num_warps=SEARCH_WARPS,
    )  # fmt: skip


ARGUMENTS = {
    "logits": "*bf16:16", "probabilities": "*bf16:16", "bias": "*fp32:16", "temperature": "*fp32:16",
    "request_temperature": "*fp32:16", "top_k": "*i32:16", "top_p": "*fp32:16", "min_p": "*fp32:16",
    "uniforms": "*fp32:16", "tiles": "*fp32:16", "facts": "*fp32:16", "peaks": "*fp32:16", "entropy": "*fp32:16",
    "listed": "*i32:16", "limits": "*i32:16", "left": "*i32:16", "best": "*i64:16", "drawn": "*i64:16",
    "vocab": "i32:16", "canvas": "i32:16", "softcap": "fp32", "rows": "i32:16", "count": "i32:16", "groups": "i32:16",
}  # fmt: skip


def case(name: str, kernel: Any, constants: dict[str, Any], num_warps: int) -> KernelCase:
    """One of the output side's."""
    signature = {argument: ARGUMENTS[argument] for argument in kernel.arg_names if argument not in constants}
    return KernelCase(
        name=name, kernel=kernel, signature=signature, constants=constants, num_warps=num_warps, num_stages=3
    )


def filter_cases(label: str, count: int, tile: int, group: int, *, biased: bool) -> list[KernelCase]:
    """For a vocabulary of `count` tiles, for which `short_kernel` does not care."""
    long = {"BIASED": biased, "EVEN": True, "N": tile, "T": count, "PROBES": PROBES}
    found = [case(f"output_long[{label}]", long_kernel, long, SEARCH_WARPS)]
    if not biased:
        listing = {"GROUPS": GROUPS, "G": count * tile // group}
        found.append(case(f"output_shortlist[{label}]", shortlist_kernel, listing, LIST_WARPS))
    return found


def short_cases(group: int) -> list[KernelCase]:
    """Of `short_kernel`."""
    return [
        case(
            f"output_short[{'bias' if biased else 'no bias'}]",
            short_kernel,
            {"BIASED": biased, "GROUPS": GROUPS, "GROUP": group},
            SEARCH_WARPS,
        )
        for biased in (False, True)
    ]
