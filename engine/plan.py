"""One pass over the model, planned: which rows it has, where they stand, what they see and where they write.

Rows are first those of the chunks to commit, then those of the canvases. Knows positions and pages; no ids, no layers.

Invariant: a canvas sees its slot's whole prefix, a chunk committed in the same pass included, and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.views import AttentionView, Segment
from engine.kv_cache import KINDS, KVCache
from engine.pages import PAGE

COMMIT, CANVAS = 0, 1  # a row's mode: which of a layer's two scalars it takes


@dataclass(frozen=True)
class PassPlan:
    """Shapes: R rows, of which the first `commit_rows` are committed."""

    commit_rows: int
    positions: Tensor  # int64 [R]
    modes: Tensor  # int64 [R], COMMIT or CANVAS
    views: dict[str, AttentionView]  # by kind of layer


def plan_pass(
    commits: Sequence[tuple[KVCache, int]],
    canvases: Sequence[KVCache],
    *,
    canvas_length: int,
    window: int,
    device: torch.device,
) -> PassPlan:
    """Plan to commit so many positions of some slots and to denoise a canvas of others, and reserve their pages.

    A slot may be in both: its canvas then follows the chunk.
    """
    coming = {id(cache): count for cache, count in commits}
    rows = [_Rows(cache, cache.length, count, canvas=False) for cache, count in commits]
    rows += [_Rows(cache, cache.length + coming.get(id(cache), 0), canvas_length, canvas=True) for cache in canvases]
    for piece in rows:
        piece.cache.reserve(piece.start + piece.count - piece.cache.length)
    positions = torch.cat([torch.arange(piece.start, piece.start + piece.count) for piece in rows])
    modes = torch.cat([torch.full((piece.count,), CANVAS if piece.canvas else COMMIT) for piece in rows])
    return PassPlan(
        commit_rows=sum(count for _, count in commits),
        positions=positions.to(device),
        modes=modes.to(device),
        views={kind: _view(rows, kind, window, device) for kind in KINDS},
    )


@dataclass(frozen=True)
class _Rows:
    """`count` rows of one slot from position `start` on."""

    cache: KVCache
    start: int
    count: int
    canvas: bool


def _view(rows: Sequence[_Rows], kind: str, window: int, device: torch.device) -> AttentionView:
    tables, segments, low, high, where = [], [], [], [], []
    first = 0
    width = max(piece.cache.pages[kind].end for piece in rows)
    for piece in rows:
        held = piece.cache.pages[kind]
        table = torch.full((width,), -1, dtype=torch.int32)
        table[held.first : held.end] = torch.tensor(held.pages, dtype=torch.int32)
        positions = torch.arange(piece.start, piece.start + piece.count)
        # a canvas position sees what the row before the canvas could see and one more: window - 1 positions
        behind = torch.full_like(positions, piece.start) if piece.canvas else positions
        reach = window - 1 if kind == "sliding" else piece.start + piece.count
        low.append((behind - reach).clamp(min=0))
        high.append(torch.full_like(positions, piece.start + piece.count) if piece.canvas else positions + 1)
        where.append(table[positions // PAGE].long() * PAGE + positions % PAGE)
        tables.append(table)
        segments.append(Segment(first, piece.count, uniform=piece.canvas))
        first += piece.count
    return AttentionView(
        segments=tuple(segments),
        low=torch.cat(low).to(torch.int32).to(device),
        high=torch.cat(high).to(torch.int32).to(device),
        table=torch.stack(tables).to(device),
        where=torch.cat(where).to(device),
    )
