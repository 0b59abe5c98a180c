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
Ints = npt.NDArray[np.int32]


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
        self._window = config.sliding_window
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
            piece.cache.reserve(piece.start + piece.count - piece.cache.length)
        layout = PassLayout(
            commit_rows=sum(piece.rows for piece in pieces if not piece.canvas),
            commits=len(commits),
            canvases=len(canvases),
            width=self._width or max(piece.cache.pages[kind].end for piece in pieces for kind in KINDS),
        )
        buffer = self._buffer(layout)
        host = buffer.writable()
        at = 0
        for ids, piece in zip((ids for ids, _ in commits), pieces, strict=False):
            host.ids[at : at + piece.rows] = 0
            host.ids[at : at + piece.count] = [max(0, each) for each in ids] if piece.images else ids
            at += piece.rows
        host.slots[:] = [slot for slot, _ in canvases]
        segments = self._fill(host, pieces)
        buffer.send()
        on_device = buffer.on_device
        return PassPlan(
            layout=layout,
            commits=tuple((cache, len(ids)) for ids, cache in commits),
            ids=on_device["ids"],
            slots=on_device["slots"],
            positions=on_device["positions"],
            modes=on_device["modes"],
            views={
                kind: AttentionView(
                    segments=segments,
                    low=on_device[f"low {kind}"],
                    high=on_device[f"high {kind}"],
                    segment=on_device["segment"],
                    table=on_device[f"table {kind}"].view(layout.segments, layout.width),
                    where=on_device[f"where {kind}"],
                )
                for kind in KINDS
            },
            images=_rows_of_images(pieces),
        )

    def _pieces(self, commits: Sequence[tuple[Sequence[int], KVCache]], canvases: Sequence[KVCache]) -> list[_Piece]:
        coming = {id(cache): len(ids) for ids, cache in commits}
        pieces = [
            _Piece(cache, cache.length, len(ids), self._filled(len(ids)), False, tuple(runs(ids)))
            for ids, cache in commits
        ]
        rows = sum(piece.rows for piece in pieces)
        if pieces and (fill := next((bucket for bucket in self._buckets if bucket >= rows), rows) - rows):
            pieces[-1].rows += fill
        length = self._canvas_length
        return pieces + [
            _Piece(cache, cache.length + coming.get(id(cache), 0), length, self._filled(length), True)
            for cache in canvases
        ]

    def _filled(self, count: int) -> int:
        return -(-count // self._align) * self._align

    def _fill(self, host: _Host, pieces: Sequence[_Piece]) -> tuple[Segment, ...]:
        """Write rows and page tables; return the segments."""
        host.all_rows[:] = 0
        for kind in KINDS:
            host.where[kind][:] = NOWHERE
        segments, first = [], 0
        for index, piece in enumerate(pieces):
            rows, whole = slice(first, first + piece.count), slice(first, first + piece.rows)
            end = piece.start + piece.count
            positions = np.arange(piece.start, end, dtype=np.int32)
            host.positions[rows] = positions
            host.modes[whole] = CANVAS if piece.canvas else COMMIT
            host.segment[whole] = index
            for kind in KINDS:
                host.high[kind][rows] = end if piece.canvas else positions + 1
            for run in piece.images:
                for kind in SEEING_IMAGES:
                    host.high[kind][first + run.begin : first + run.end] = piece.start + run.end
            # a canvas position sees what the row before the canvas could see and one more: window - 1 positions
            behind = piece.start if piece.canvas else positions
            host.low["sliding"][rows] = np.maximum(behind - (self._window - 1), 0)
            for kind in KINDS:
                held = piece.cache.pages[kind]
                table = host.table[kind][index]
                table[:] = -1
                table[held.first : held.end] = held.pages
                host.where[kind][rows] = table[positions // PAGE] * PAGE + positions % PAGE
            segments.append(Segment(first, piece.count, uniform=piece.canvas, start=piece.start))
            first += piece.rows
        return tuple(segments)

    def _buffer(self, layout: PassLayout) -> _Buffer:
        """On a GPU, the layout's own; on a CPU a fresh one, because there nothing is replayed."""
        if self._device.type != "cuda":
            return _Buffer(layout, self._canvas_rows(layout), self._device)
        if layout not in self._buffers:
            self._buffers[layout] = _Buffer(layout, self._canvas_rows(layout), self._device)
        return self._buffers[layout]

    def _canvas_rows(self, layout: PassLayout) -> int:
        return layout.canvases * self._filled(self._canvas_length)


@dataclass
class _Piece:
    """`count` rows of one slot from position `start` on, filled up to `rows`."""

    cache: KVCache
    start: int
    count: int
    rows: int
    canvas: bool
    images: tuple[ImageRun, ...] = ()


def _rows_of_images(pieces: Sequence[_Piece]) -> tuple[ImageRun, ...]:
    """Where images stand among the rows of a pass."""
    found, first = [], 0
    for piece in pieces:
        found += [replace(run, begin=first + run.begin, end=first + run.end) for run in piece.images]
        first += piece.rows
    return tuple(found)


class _Host:
    """Views of a plan's buffer in the host's memory."""

    def __init__(self, parts: dict[str, Ints], layout: PassLayout) -> None:
        self.ids, self.slots = parts["ids"], parts["slots"]
        self.positions, self.modes = parts["positions"], parts["modes"]
        self.segment = parts["segment"]
        self.high = {kind: parts[f"high {kind}"] for kind in KINDS}
        self.low = {kind: parts[f"low {kind}"] for kind in KINDS}
        self.where = {kind: parts[f"where {kind}"] for kind in KINDS}
        self.table = {kind: parts[f"table {kind}"].reshape(layout.segments, layout.width) for kind in KINDS}
        self.all_rows = parts["rows"]  # positions to low, in one piece


class _Buffer:
    """One plan's numbers, on the host and on the device."""

    def __init__(self, layout: PassLayout, canvas_rows: int, device: torch.device) -> None:
        rows = layout.commit_rows + canvas_rows
        by_row = ("positions", "modes", "segment", *(f"{bound} {kind}" for bound in ("low", "high") for kind in KINDS))
        sizes = dict.fromkeys(by_row, rows)
        sizes |= {f"where {kind}": rows for kind in KINDS}
        sizes |= {f"table {kind}": layout.segments * layout.width for kind in KINDS}
        sizes |= {"ids": layout.commit_rows, "slots": layout.canvases}
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = total
            total += -(-size // 4) * 4  # 16 bytes: kernels are compiled for aligned pointers
        on_gpu = device.type == "cuda"
        self._memory = torch.zeros(total, dtype=torch.int32, pin_memory=on_gpu)
        numbers: Ints = self._memory.numpy()
        views = {name: numbers[start : start + sizes[name]] for name, start in starts.items()}
        self._host = _Host(views | {"rows": numbers[: starts[f"where {KINDS[0]}"]]}, layout)
        self._target = torch.empty_like(self._memory, device=device) if on_gpu else self._memory
        self._sent = torch.cuda.Event() if on_gpu else None
        self.on_device = {name: self._target[start : start + sizes[name]] for name, start in starts.items()}

    def writable(self) -> _Host:
        """The host's side, once the device has taken what was sent last."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._host

    def send(self) -> None:
        if self._sent is not None:
            self._target.copy_(self._memory, non_blocking=True)
            self._sent.record()
