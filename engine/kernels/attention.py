"""Attention of a pass's rows over keys and values in pages, for both kinds of layer and both kinds of rows.

Online softmax over tiles of positions, so memory does not grow with the prefix. Heads that share a key head are rows
of one tile: a program reads keys and values once for all of them. The positions of a block of rows are divided into
SPLITS, because a canvas alone has too few blocks for a large chip; a second kernel joins the splits' results.

Knows views, no model. Invariant: what a row gets depends on its own low, high and pages only: positions are divided by
the block's own, never by what else is in the pass. (One split would do for a prompt's many rows, but would sum in
another order: a reply's bits would then depend on its company.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import SHARED_LIMIT, chip_of
from engine.kernels.launching import launch
from engine.kernels.tiles import dot, rounded
from engine.kernels.views import AttentionView
from engine.pages import PAGE

LOG2_E = tl.constexpr(1.4426950408889634)
SPLITS = 2
ROW_ALIGN = 64  # a segment begins at a multiple of this, so no block of rows holds rows of two


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """BM rows (positions times heads of a key head) by BN positions, of which PAGE is a multiple."""

    BM: int
    BN: int
    warps: int
    stages: int


@triton.jit
def attention_kernel(
    queries, keys, values, low, high, segment, table, parts, sums, rows, width, heads,
    kv_heads: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program a block of BM // GROUP rows, a key head, and a split.

    parts float32 [SPLITS, R, H, D], already divided by the split's own sum, and sums float32 [SPLITS, R, H], the
    logarithm (base 2) of that sum; -inf where the split has nothing for the row.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    first = block * (BM // GROUP)
    lanes = tl.arange(0, BM)
    row = first + lanes // GROUP
    live = row < rows
    row = tl.where(live, row, first)
    begin = tl.load(low + row)
    end = tl.where(live, tl.load(high + row), 0)
    place = row.to(tl.int64) * heads + head * GROUP + lanes % GROUP  # of [R, H]
    columns = tl.arange(0, D)
    query = tl.load(queries + place[:, None] * D + columns[None, :])

    start = tl.min(tl.where(end > begin, begin, 2147483647), 0) // BN * BN
    stop = tl.max(end, 0)
    tiles = tl.maximum((stop - start + BN - 1) // BN, 0)
    from_tile = tiles * split // SPLITS
    to_tile = tiles * (split + 1) // SPLITS
    pages = table + tl.load(segment + first).to(tl.int64) * width

    best = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for tile in range(from_tile, to_tile):
        base = start + tile * BN
        page = tl.load(pages + base // PAGE).to(tl.int64)
        stored = (page * PAGE + base % PAGE + tl.arange(0, BN)) * kv_heads + head
        key = tl.load(keys + stored[None, :] * D + columns[:, None])
        value = tl.load(values + stored[:, None] * D + columns[None, :])
        scores = dot(query, key, tl.zeros((BM, BN), tl.float32)) * LOG2_E
        position = base + tl.arange(0, BN)[None, :]
        scores = tl.where((position >= begin[:, None]) & (position < end[:, None]), scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        calm = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        odds = tl.exp2(scores - calm[:, None])
        shrink = tl.exp2(best - calm)
        total = total * shrink + tl.sum(odds, 1)
        acc = dot(rounded(odds, value.dtype), value, acc * shrink[:, None])
        best = higher
    divisor = tl.where(total == 0.0, 1.0, total)
    result = acc / divisor[:, None]
    place += split * rows.to(tl.int64) * heads
    tl.store(parts + place[:, None] * D + columns[None, :], result, mask=live[:, None])
    tl.store(sums + place, tl.where(total == 0.0, float("-inf"), best + tl.log2(divisor)), mask=live)


@triton.jit
def join_kernel(parts, sums, out, count, D: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr):
    """out[i] = sum over s of share[s, i] * parts[s, i]; a row that saw nothing is zero. count = R * H."""
    place = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = place < count
    columns = tl.arange(0, D)
    best = tl.full((BM,), float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        best = tl.maximum(best, tl.load(sums + split * count + place, mask=live, other=float("-inf")))
    best = tl.where(best == float("-inf"), 0.0, best)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for split in tl.static_range(SPLITS):
        share = tl.exp2(tl.load(sums + split * count + place, mask=live, other=float("-inf")) - best)
        at = (split * count + place)[:, None] * D + columns[None, :]
        acc += share[:, None] * tl.load(parts + at, mask=live[:, None], other=0.0)
        total += share
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + place[:, None] * D + columns[None, :], rounded(acc, out.dtype.element_ty), mask=live[:, None])


def tiling(head_dim: int, group: int, itemsize: int, chip: int) -> Tiling:
    """Tile sizes for a head size, `group` query heads a key head, and a chip such as 90.

    The queries' tile and those of keys and values must fit the chip's shared memory, and the float32 sums [BM, columns]
    the registers: 64 rows of 512 take all that eight warps have.
    """
    width = head_dim * itemsize
    roomy = SHARED_LIMIT[chip] > 160_000
    if width <= 256:
        found = Tiling(BM=64, BN=64, warps=4, stages=2)
    elif width <= 512:  # 256 columns of bfloat16
        found = Tiling(BM=64, BN=64 if roomy else 32, warps=4, stages=2)
    elif roomy:
        found = Tiling(BM=64, BN=32, warps=8, stages=2)
    else:
        found = Tiling(BM=32, BN=16, warps=4, stages=2)
    return replace(found, BM=max(found.BM, 16, group), BN=min(found.BN, PAGE))


def attention(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """As `reference.attention`; all contiguous. ValueError if a segment does not begin at a multiple of ROW_ALIGN."""
    rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    require_aligned(view)
    tile = tiling(head_dim, group, queries.element_size(), chip_of(queries.device))
    out = torch.empty_like(queries)
    parts, sums = parts_of(out, SPLITS)
    launch(attention_kernel, (triton.cdiv(rows, tile.BM // group), kv_heads, SPLITS))(
        queries, keys, values, view.low, view.high, view.segment, view.table, parts, sums, rows,
        view.table.shape[1], heads,
        kv_heads=kv_heads, GROUP=group, D=head_dim, PAGE=PAGE, BM=tile.BM, BN=tile.BN, SPLITS=SPLITS,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    join(parts, sums, out, SPLITS)
    return out.flatten(1)


def require_aligned(view: AttentionView) -> None:
    """ValueError if a segment does not begin at a multiple of ROW_ALIGN."""
    if any(segment.first % ROW_ALIGN for segment in view.segments):
        raise ValueError(f"segments must begin at multiples of {ROW_ALIGN}: {view.segments}")


def parts_of(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Memory for what each split makes of out [R, H, D]: parts float32 [splits, R, H, D] and sums float32
    [splits, R, H]. One split needs none, and gets `out`."""
    if splits == 1:
        return out, out
    parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
    return parts, parts.new_empty(parts.shape[:-1])


def join(parts: Tensor, sums: Tensor, out: Tensor, splits: int) -> None:
    """Write `out` from `parts_of` it; nothing to do for one split, which has written it."""
    if splits > 1:
        head_dim = out.shape[-1]
        count, bm = out.numel() // head_dim, max(1, JOIN_ELEMENTS // head_dim)
        launch(join_kernel, (triton.cdiv(count, bm),))(
            parts, sums, out, count, D=head_dim, SPLITS=splits, BM=bm, num_warps=4
        )


JOIN_ELEMENTS = 2048  # of one program: 16 a thread


def cases() -> list[KernelCase]:
    """At the model's shapes: 16 heads, 8 key heads of 256 and 2 of 512; the tile depends on the chip."""
    found: dict[str, KernelCase] = {}
    for head_dim, kv_heads in ((256, 8), (512, 2)):
        group = 16 // kv_heads
        for chip in SHARED_LIMIT:
            tile = tiling(head_dim, group, 2, chip)
            name = f"attention[{head_dim},{tile.BM}x{tile.BN}]"
            same = found.get(name)
            chips = tuple(dict.fromkeys((*(same.chips if same else ()), chip)))
            found[name] = KernelCase(
                name=name,
                kernel=attention_kernel,
                signature=dict.fromkeys(("queries", "keys", "values"), "*bf16:16")
                | dict.fromkeys(("low", "high", "segment", "table"), "*i32:16")
                | {"parts": "*fp32:16", "sums": "*fp32:16"}
                | {"rows": "i32:16", "width": "i32", "heads": "i32:16"},
                constants={
                    "kv_heads": kv_heads, "GROUP": group, "D": head_dim, "PAGE": PAGE,
                    "BM": tile.BM, "BN": tile.BN, "SPLITS": SPLITS,
                },
                num_warps=tile.warps,
                num_stages=tile.stages,
                chips=chips,
            )  # fmt: skip
        found[f"join{head_dim}"] = KernelCase(
            name=f"attention_join[{head_dim}]",
            kernel=join_kernel,
            signature={"parts": "*fp32:16", "sums": "*fp32:16", "out": "*bf16:16", "count": "i32:16"},
            constants={"D": head_dim, "SPLITS": SPLITS, "BM": max(1, JOIN_ELEMENTS // head_dim)},
            num_warps=4,
            num_stages=3,
        )
    return list(found.values())
