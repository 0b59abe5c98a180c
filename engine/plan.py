"""One pass over the model, planned: which rows it has, where they stand, what they see and where they write.

Rows are first those of the chunks to commit, then those of the canvases. Everything a pass must be told travels to the
device as one buffer of int32, which on a GPU is the same memory for all passes of one layout: so a captured pass
can be replayed with another plan. Knows positions and pages; no layers.

Invariant: a canvas sees its slot's whole prefix, a chunk committed in the same pass included, and itself; a soft token
sees what stands before it and all of its image, within which no chunk ends. Rows that only fill up (`row_align`,
`buckets`) see nothing and are stored nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.images import ImageRun, runs
from engine.kernels.views import NOWHERE, AttentionView, Segment
from engine.kv_cache import KINDS, KVCache
from engine.pages import PAGE

# Layers in which an image's tokens see all of it, as transformers' DiffusionGemma masks them: in all. (Its Gemma 4 does
# so in sliding layers only.)
SEEING_IMAGES = KINDS
COMMIT, CANVAS = 0, 1  # a row's mode: which of a layer's two scalars it takes
SLIDING = KINDS.index("sliding")  # layers that see no further back than the window
Ints = npt.NDArray[np.int32]
IN_A_PAGE: Ints = np.arange(PAGE, dtype=np.int32)


@dataclass(frozen=True)
class PassLayout:
    """What decides the shapes of a pass: plans of one layout differ in numbers only."""

    commit_rows: int  # rows to commit, filled up
    commits: int  # slots they belong to
    canvases: int
    width: int  # page numbers in a row of a page table

    @property
    def segments(self) -> int:
        return self.commits + self.canvases


@dataclass(frozen=True)
class PassPlan:
    """Shapes: R rows, of which the first `layout.commit_rows` are committed; n canvases."""

    layout: PassLayout
    commits: tuple[tuple[KVCache, int], ...]  # how many positions each slot gains
    ids: Tensor  # int32 [layout.commit_rows], to commit
    slots: Tensor  # int32 [n], the canvases'
    positions: Tensor  # int32 [R]
    modes: Tensor  # int32 [R], COMMIT or CANVAS
    views: dict[str, AttentionView]  # by kind of layer
    images: tuple[ImageRun, ...] = ()  # rows to commit that images stand in

    def advance(self) -> None:
        """Count the committed rows: after the pass that wrote them."""
        for cache, count in self.commits:
            cache.advance(count)


class Planner:
    """Makes the plans of one model on one device.

    `row_align`: every slot's rows begin at a multiple of it. `buckets`: ascending numbers of rows that commits are
    filled up to, so that few layouts occur; none = only to `row_align`. `width`: page numbers in every page table;
    None = as many as a pass needs.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        *,
        row_align: int = 1,
        buckets: Sequence[int] = (),
        width: int | None = None,
    ) -> None:
        self._canvas_length = config.canvas_length
        self._behind = config.sliding_window - 1  # positions that a row of a sliding layer sees before itself
        self._device = device
        self._align = row_align
        self._buckets = tuple(buckets)
        self._width = width
        self._buffers: dict[PassLayout, _Buffer] = {}

    def plan(
        self, commits: Sequence[tuple[Sequence[int], KVCache]], canvases: Sequence[tuple[int, KVCache]]
    ) -> PassPlan:
        """Plan to commit ids to some slots and to denoise the canvases (slot number, cache) of others, or of the same:
        a slot's canvas then follows its chunk. Reserves their pages. The ids are those of the books, see `images`.

        Raises ValueError, with nothing reserved, if ids do not fit a slot's capacity.
        """
        for ids, cache in commits:
            if cache.length + len(ids) > cache.capacity:
                raise ValueError(f"{cache.length} + {len(ids)} positions exceed the capacity of {cache.capacity}")
        pieces = self._pieces(commits, [cache for _, cache in canvases])
        for piece in pieces:
            piece.cache.reserve(piece.end - piece.cache.length)
        layout = PassLayout(
            commit_rows=sum(piece.rows for piece in pieces if not piece.canvas),
            commits=len(commits),
            canvases=len(canvases),
            width=self._width or max(piece.cache.pages[kind].end for piece in pieces for kind in KINDS),
        )
        buffer = self._buffer(layout)
        host = buffer.writable()
        host.slots[:] = [slot for slot, _ in canvases]
        segments = self._fill(host, pieces)
        buffer.send()
        return PassPlan(
            layout=layout,
            commits=tuple((cache, len(ids)) for ids, cache in commits),
            ids=buffer.ids,
            slots=buffer.slots,
            positions=buffer.positions,
            modes=buffer.modes,
            views={kind: AttentionView(segments, *numbers) for kind, numbers in buffer.views.items()},
            images=_rows_of_images(pieces),
        )

    def _pieces(self, commits: Sequence[tuple[Sequence[int], KVCache]], canvases: Sequence[KVCache]) -> list[_Piece]:
        pieces = [
            _Piece(cache, cache.length, len(ids), self._filled(len(ids)), False, ids, tuple(runs(ids)))
            for ids, cache in commits
        ]
        begins = {piece.cache: piece.end for piece in pieces}
        rows = sum(piece.rows for piece in pieces)
        if pieces and (fill := next((bucket for bucket in self._buckets if bucket >= rows), rows) - rows):
            pieces[-1].rows += fill
        length, filled = self._canvas_length, self._filled(self._canvas_length)
        return pieces + [_Piece(cache, begins.get(cache, cache.length), length, filled, True) for cache in canvases]

    def _filled(self, count: int) -> int:
        return -(-count // self._align) * self._align

    def _fill(self, host: _Host, pieces: Sequence[_Piece]) -> tuple[Segment, ...]:
        """Write all but slots and modes; return the segments."""
        host.tables[:] = -1
        for kind, tables in zip(KINDS, host.tables, strict=True):
            for table, piece in zip(tables, pieces, strict=True):
                held = piece.cache.pages[kind]
                table[held.first : held.end] = held.pages
        begins = host.tables * PAGE  # where pages lie
        segments, first = [], 0
        for index, piece in enumerate(pieces):
            rows, filler = slice(first, first + piece.count), slice(first + piece.count, first + piece.rows)
            host.segment[first : filler.stop] = index
            positions = np.arange(piece.start, piece.end, dtype=np.int32)
            host.positions[rows] = positions
            if piece.canvas:
                host.high[:, rows] = piece.end
                # it sees what the row before it could see and one more: window - 1 positions
                host.low[SLIDING, rows] = max(piece.start - self._behind, 0)
            else:
                host.high[:, rows] = positions + 1
                host.low[SLIDING, rows] = np.maximum(positions - self._behind, 0)
                host.ids[rows] = [max(0, each) for each in piece.ids] if piece.images else piece.ids
            for run in piece.images:
                for kind in SEEING_IMAGES:
                    host.high[KINDS.index(kind), first + run.begin : first + run.end] = piece.start + run.end
            page, offset = divmod(piece.start, PAGE)
            places = (begins[:, index, page : -(-piece.end // PAGE), None] + IN_A_PAGE).reshape(len(KINDS), -1)
            host.where[:, rows] = places[:, offset : offset + piece.count]
            if piece.rows > piece.count:
                host.ids[filler] = host.positions[filler] = host.low[:, filler] = host.high[:, filler] = 0
                host.where[:, filler] = NOWHERE
            segments.append(Segment(first, piece.count, uniform=piece.canvas, start=piece.start))
            first = filler.stop
        return tuple(segments)

    def _buffer(self, layout: PassLayout) -> _Buffer:
        """On a GPU, the layout's own; on a CPU a fresh one, because there nothing is replayed."""
        if self._device.type != "cuda":
            return self._made(layout)
        if layout not in self._buffers:
            self._buffers[layout] = self._made(layout)
        return self._buffers[layout]

    def _made(self, layout: PassLayout) -> _Buffer:
        rows = layout.commit_rows + layout.canvases * self._filled(self._canvas_length)
        return _Buffer(layout, rows, self._device)


@dataclass
class _Piece:
    """`count` rows of one slot from position `start` on, filled up to `rows`."""

    cache: KVCache
    start: int
    count: int
    rows: int
    canvas: bool
    ids: Sequence[int] = ()  # to commit, those of the books
    images: tuple[ImageRun, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.count


def _rows_of_images(pieces: Sequence[_Piece]) -> tuple[ImageRun, ...]:
    """Where images stand among the rows of a pass."""
    found, first = [], 0
    for piece in pieces:
        found += [replace(run, begin=first + run.begin, end=first + run.end) for run in piece.images]
        first += piece.rows
    return tuple(found)


@dataclass(frozen=True)
class _Host:
    """A plan's numbers in the host's memory. Shapes: K kinds, R rows, G segments, W page numbers, n canvases."""

    ids: Ints  # [layout.commit_rows]
    slots: Ints  # [n]
    positions: Ints  # [R]
    modes: Ints  # [R]
    segment: Ints  # [R]
    low: Ints  # [K, R]
    high: Ints  # [K, R]
    where: Ints  # [K, R]
    tables: Ints  # [K, G, W]


class _Buffer:
    """One plan's numbers, on the host and on the device. Modes are the layout's: written here, once."""

    def __init__(self, layout: PassLayout, rows: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._memory = torch.zeros(sum(_sizes(layout, rows)), dtype=torch.int32, pin_memory=on_gpu)
        self._host = _Host(**{name: part.numpy() for name, part in _parts(self._memory, layout, rows).items()})
        self._host.modes[layout.commit_rows :] = CANVAS
        self._target = torch.empty_like(self._memory, device=device) if on_gpu else self._memory
        self._sent = torch.cuda.Event() if on_gpu else None
        parts = _parts(self._target, layout, rows)
        self.ids, self.slots, self.positions, self.modes = (
            parts[name] for name in ("ids", "slots", "positions", "modes")
        )
        by_kind = zip(KINDS, parts["low"], parts["high"], parts["tables"], parts["where"], strict=True)
        # what an AttentionView has beside its segments
        self.views = {kind: (low, high, parts["segment"], table, where) for kind, low, high, table, where in by_kind}

    def writable(self) -> _Host:
        """The host's side, once the device has taken what was sent last."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._host

    def send(self) -> None:
        if self._sent is not None:
            self._target.copy_(self._memory, non_blocking=True)
            self._sent.record()


def _sizes(layout: PassLayout, rows: int) -> list[int]:
    """Numbers in the parts of a buffer: those by row, page tables, ids and slots."""
    kinds = len(KINDS)
    tables = kinds * _aligned(layout.segments * layout.width)
    return [(3 + 3 * kinds) * _aligned(rows), tables, _aligned(layout.commit_rows), _aligned(layout.canvases)]


def _parts(memory: Tensor, layout: PassLayout, rows: int) -> dict[str, Tensor]:
    """Views of a buffer by name, shapes as in `_Host`."""
    kinds, held = len(KINDS), layout.segments * layout.width
    by_row, tables, ids, slots = memory.split(_sizes(layout, rows))
    lines = by_row.view(3 * kinds + 3, -1)[:, :rows].split((kinds, kinds, kinds, 1, 1, 1))
    low, high, where, positions, modes, segment = lines
    return {
        "ids": ids[: layout.commit_rows],
        "slots": slots[: layout.canvases],
        "positions": positions[0],
        "modes": modes[0],
        "segment": segment[0],
        "low": low,
        "high": high,
        "where": where,
        "tables": tables.view(kinds, -1)[:, :held].view(kinds, layout.segments, layout.width),
    }


def _aligned(count: int) -> int:
    """So many numbers or a few more, which take a multiple of 16 bytes: kernels are compiled for aligned pointers."""
    return -(-count // 4) * 4
