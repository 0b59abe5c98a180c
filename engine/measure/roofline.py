"""What a pass must do at the least: bytes through memory and floating-point operations, from sizes alone.

Bytes are what no implementation can avoid: every weight that a pass needs once (the embedding a second time for
self-conditioning), the keys and values it sees once, those it writes once. Activations, logits and probabilities are
not counted: they could stay on the chip. Operations are two for each multiplication with a weight or a key that a
row needs; an expert counts for the rows that choose it. The time they need on a chip is the longer of bytes at its
bandwidth and operations at its matrix rate, as if both overlapped perfectly.

Knows no torch, no device and no clock. Invariant: a limit is never above what a perfect implementation takes.

Shapes: R rows, M hidden, V vocabulary, I MLP width, F expert width, E experts, A active experts, H heads, K kv heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import LayerConfig, ModelConfig
from engine.formats import DENSE, EXPERTS, Layout


@dataclass(frozen=True)
class Work:
    """Bytes that cross the memory bus, and floating-point operations."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Rows:
    """`count` rows of one slot from position `start` on: a chunk to commit, or a canvas."""

    start: int
    count: int
    canvas: bool
    slot: int = 0


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a chip can do: bytes a second through memory, operations a second in 16-bit matrix products."""

    bandwidth: float
    matrix_rate: float

    def seconds(self, work: Work) -> float:
        """The least time for `work`."""
        return max(work.bytes / self.bandwidth, work.flops / self.matrix_rate)


def step_rows(config: ModelConfig, prefix: int, *, slots: int = 1) -> list[Rows]:
    """A denoise pass over one canvas in each of so many slots, behind `prefix` committed positions each."""
    return [Rows(prefix, config.canvas_length, canvas=True, slot=slot) for slot in range(slots)]


def joined_rows(config: ModelConfig, prefix: int, count: int) -> list[Rows]:
    """`count` positions committed behind `prefix` others, and the first pass of the canvas that follows them."""
    return [
        Rows(prefix, count, canvas=False),
        Rows(prefix + count, config.canvas_length, canvas=True),
    ]


def pass_work(
    config: ModelConfig, layout: Layout, rows: Sequence[Rows], *, itemsize: int = 2, conditioned: bool = True
) -> dict[str, Work]:
    """The work of one pass, by part of the model. `itemsize`: bytes of the dtype of what is not quantised;
    `conditioned`: the canvases are not on their first pass."""
    count = sum(piece.count for piece in rows)
    canvas = sum(piece.count for piece in rows if piece.canvas)
    hidden, vocab = config.hidden_size, config.vocab_size
    parts = dict.fromkeys(("projections", "attention", "dense MLP", "experts", "router and norms"), Work())
    for name, spec in layout.weights.items():
        if not name.startswith("layers.") or not (canvas or needed_to_commit(name, config)):
            continue
        kind = name.rpartition(".")[2]
        if kind in EXPERTS:
            part = "experts"
            share = touched(config, count) / config.num_experts
            done = Work(
                spec.bytes(itemsize) * share, 2 * count * config.top_k_experts * spec.numel / config.num_experts
            )
        else:
            part = {"qkv": "projections", "out": "projections"}.get(
                kind, "dense MLP" if kind in DENSE else "router and norms"
            )
            done = Work(spec.bytes(itemsize), 2 * count * spec.numel if len(spec.shape) == 2 else 0)
        parts[part] += done
    for index, layer in enumerate(config.layers):
        written_only = not canvas and index + 1 == len(config.layers)
        parts["attention"] += _attention(config, layer, rows, itemsize, written_only=written_only)
    embedding = layout.weights["embedding"].bytes(itemsize)
    parts["embedding"] = Work(count * hidden * itemsize)
    if canvas:
        parts["head"] = Work(embedding + hidden * itemsize, 2 * canvas * vocab * hidden)
    if canvas and conditioned:
        mlp = [layout.weights[f"self_conditioning.{name}"] for name in ("gate_up", "down")]
        parts["self-conditioning"] = Work(
            embedding + sum(spec.bytes(itemsize) for spec in mlp),
            2 * canvas * (vocab * hidden + sum(spec.numel for spec in mlp)),
        )
    return parts


def needed_to_commit(name: str, config: ModelConfig) -> bool:
    """Whether a pass that only commits needs weight `name`: of the last layer it needs keys and values alone."""
    last = f"layers.{len(config.layers) - 1}."
    return not name.startswith(last) or name.removeprefix(last) in ("input_norm", "qkv", "q_norm", "k_norm")


def total(parts: dict[str, Work]) -> Work:
    """All parts together."""
    return sum(parts.values(), Work())


def touched(config: ModelConfig, rows: int) -> float:
    """Experts of a layer that `rows` rows need, if each chooses its own at random."""
    return config.num_experts * (1 - (1 - config.top_k_experts / config.num_experts) ** rows)


def _attention(
    config: ModelConfig, layer: LayerConfig, rows: Sequence[Rows], itemsize: int, *, written_only: bool
) -> Work:
    """Keys and values read and written, scores and weighted sums, of one layer."""
    reach = config.sliding_window - 1 if layer.kind == "sliding" else config.max_positions
    position = 2 * layer.kv_heads * layer.head_dim * itemsize
    written = sum(piece.count for piece in rows)
    if written_only:
        return Work(position * written)
    read = 0
    for slot in {piece.slot for piece in rows}:
        own = [piece for piece in rows if piece.slot == slot]
        committed = min(piece.start for piece in own)
        read += committed - max(0, min(piece.start - reach for piece in own))
    seen = sum(_seen(piece, reach) for piece in rows)
    return Work(position * (written + max(0, read)), 4 * seen * config.num_heads * layer.head_dim)


def _seen(piece: Rows, reach: int) -> int:
    """Pairs of a row and a position that it sees: `reach` positions behind it, or behind its canvas, and itself."""
    if piece.canvas:
        return piece.count * (min(piece.start, reach) + piece.count)
    within = max(0, min(piece.count, reach - piece.start))  # rows that still see everything before them
    rising = within * piece.start + within * (within + 1) // 2
    return rising + (piece.count - within) * (reach + 1)
