"""What start-up chooses by measuring on the very chip: which of several ways to do an op is fastest here.

The ways are those of `linears`, of `experts`, and of self-conditioning's embedding (`output`, `soft_embedding`). Each
is timed alone, over the weights of several layers, so that no cache holds them, and the first stays unless another is
faster by GAIN: what is as good as equal should not differ from start to start. A way that computes something else on
this chip than the first is never chosen. Putting rows in order is timed with each, although joins do it for nothing for
most: whatever is offered for a matrix wants the same of them, so it moves no comparison. Before any is timed all are
compiled, many at a time. Knows shapes and functions, no layers.

Invariant: what was chosen depends on shapes only, never on what is in the rows or beside them, and does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
import triton
from torch import Tensor

from engine.kernels import output, soft_embedding
from engine.kernels.chips import chip_of
from engine.kernels.experts import ExpertWay, Mixture, expert_ways, experts_by, mixture_of
from engine.kernels.grouped import CLASSES
from engine.kernels.launching import compiling
from engine.kernels.linears import (
    TILES,
    Product,
    Way,
    multiply,
    multiply_gated,
    order_of,
    prepare,
    product_of,
    ways,
)
from engine.kernels.readers import Experts
from engine.kernels.weights import Weight, plain, shape

GAIN = 0.03
WRONG = 0.1  # of a result's norm: 8-bit rows move it by a quarter of that, what is wrong by more than all of it
LAYERS = 12  # whose matrices are multiplied in turn: 12 of the smallest dense ones fill no cache of any chip
EXPERT_LAYERS = 2  # a layer's experts alone are 400 MB and more
LAPS = 5

T = TypeVar("T")
Run = Callable[[], Tensor]
# what a chip takes for one of some functions, run in turn, in microseconds; and what the first of them returns
Timer = Callable[[Sequence[Run]], tuple[float, Tensor]]


@dataclass(frozen=True)
class Choices:
    """What was chosen, for the ops; and what to tell of it."""

    linears: Mapping[Product, Way] = field(default_factory=dict)
    experts: Mapping[Mixture, ExpertWay] = field(default_factory=dict)
    sparse_rows: int | None = None  # rows whose soft embedding goes by `soft_embedding`
    told: tuple[str, ...] = ()


class GraphTimer:
    """Times functions as captured ones run: without what launching costs the host."""

    def __call__(self, runs: Sequence[Run]) -> tuple[float, Tensor]:
        result = runs[0]()  # compiles, and sets libraries up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        graph.replay()
        laps = []
        for _ in range(LAPS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            laps.append(begin.elapsed_time(end))
        return 1000 * min(laps) / len(runs), result


@torch.inference_mode()
def choose(
    weights: Mapping[str, Weight], *, active: int, canvas: int, scale: float, eight_bit: bool, time: Timer
) -> Choices:
    """Measure all ways to multiply by these weights; names as in `Checkpoint.tensors`. `active`: experts of a row;
    `canvas`: rows of one; `scale`: of the embedding; `eight_bit`: see `Checkpoint`."""
    embedding = plain(weights["embedding"])
    choose_by = partial(_choose, _layers(weights), embedding, active, canvas, scale, eight_bit)
    with compiling():
        choose_by(_untimed)  # what it chooses is the usual, and what it refuses is refused again, and told then
    choices = choose_by(time)
    if embedding.device.type == "cuda":
        torch.cuda.empty_cache()
    return choices


def _untimed(runs: Sequence[Run]) -> tuple[float, Tensor]:
    """A timer by which all are as good as the first. The other runs take the same kernels."""
    runs[0]()
    return 0.0, torch.zeros(())


def _choose(
    layers: Sequence[Mapping[str, Weight]],
    embedding: Tensor,
    active: int,
    canvas: int,
    scale: float,
    eight_bit: bool,
    time: Timer,
) -> Choices:
    """As `choose`, by one timer."""
    told: list[str] = []
    linears: dict[Product, Way] = {}
    experts: dict[Mixture, ExpertWay] = {}
    for rows in CLASSES:
        _choose_linears(layers, rows, eight_bit, time, linears, told)
        _choose_experts(layers, rows, active, eight_bit, time, experts, told)
    sparse = _sparse_is_faster(embedding, canvas, scale, time, told)
    return Choices(linears, experts, canvas if sparse else None, tuple(told))


def _layers(weights: Mapping[str, Weight]) -> list[dict[str, Weight]]:
    """Each layer's weights by kind."""
    found: dict[str, dict[str, Weight]] = {}
    for name, weight in weights.items():
        prefix, _, kind = name.rpartition(".")
        if prefix.startswith("layers."):
            found.setdefault(prefix, {})[kind] = weight
    return list(found.values())


def fastest(
    offered: Iterable[T],
    timed: Callable[[T], tuple[float, Tensor]],
    what: str,
    told: list[str],
    *,
    last: T | None = None,
) -> T:
    """The first of what is offered unless another is faster by GAIN. One that this chip or its libraries refuse, or
    whose result is not the first's, is passed over, and told of; a device that failed is not. `last`: what else there
    is should all be refused; None: then the last refusal is raised."""
    chosen: T | None = None
    usual = best = 0.0
    expected: Tensor | None = None
    refusal: Exception | None = None
    for way in offered:
        try:
            taken, result = timed(way)
            error = 0.0 if expected is None else _distance(result, expected)
        except (RuntimeError, triton.TritonError) as refused:
            if isinstance(refused, torch.AcceleratorError):
                raise
            told.append(f"{what}: {way} is refused ({str(refused).strip().splitlines()[0][:80]})")
            refusal = refused
            continue
        if expected is None:
            chosen, usual, best, expected = way, taken, taken, result
        elif not error < WRONG:  # nan is wrong too
            told.append(f"{what}: {way} is wrong here (off by {error:.2g} of the result)")
        elif taken < best and taken < (1 - GAIN) * usual:
            chosen, best = way, taken
    if chosen is None:
        if last is None:
            raise refusal or ValueError(f"{what}: nothing is offered")
        chosen, (best, _) = last, timed(last)
        usual = best
    told.append(f"{what}: {chosen}, {best:.0f} us" + (f" instead of {usual:.0f}" if best < usual else ""))
    return chosen


def _distance(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|."""
    return float((result.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def _choose_linears(
    layers: Sequence[Mapping[str, Weight]],
    rows: int,
    eight_bit: bool,
    time: Timer,
    linears: dict[Product, Way],
    told: list[str],
) -> None:
    """For every kind of quantised dense matrix; those behind a gate first, which decide how its result is ordered."""
    groups: dict[Product, list[tuple[Weight, Weight]]] = {}  # the matrix, and the one behind it or itself
    for kind in ("qkv", "out", "down", "gate_up"):
        for layer in layers:
            weight = layer[kind]
            if not isinstance(weight, Tensor):
                gated = kind == "gate_up"
                product = product_of(weight, rows, gated=gated)
                groups.setdefault(product, []).append((weight, layer["down"] if gated else weight))
    for product, pairs in groups.items():
        x = _rows(plain_like(layers), rows, product.width)

        def timed(
            way: Way, x: Tensor = x, product: Product = product, pairs: list[tuple[Weight, Weight]] = pairs
        ) -> tuple[float, Tensor]:
            return time([partial(_multiply, x, *pair, way, product, linears) for pair in pairs[:LAYERS]])

        offered = ways(product.form, rows, chip_of(x.device), eight_bit=eight_bit)
        linears[product] = fastest(offered, timed, str(product), told, last=TILES)


def _multiply(
    x: Tensor, weight: Weight, following: Weight, way: Way, product: Product, linears: Mapping[Product, Way]
) -> Tensor:
    """What `linear` and `gated_mlp` do with one matrix."""
    given = prepare(x, weight, way, gated=product.gated)
    if not product.gated:
        return multiply(given, weight, way)
    rows = x.shape[0]
    second = TILES if isinstance(following, Tensor) else linears[product_of(following, rows, gated=False)]
    return multiply_gated(given, weight, way, order_of(following, rows, second).of_columns)


def plain_like(layers: Sequence[Mapping[str, Weight]]) -> Tensor:
    """A tensor of the dtype and on the device of what is not quantised."""
    return plain(layers[0]["router"])


def _rows(like: Tensor, rows: int, width: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(rows, width, generator=generator, device=like.device).to(like.dtype)


def _choose_experts(
    layers: Sequence[Mapping[str, Weight]],
    rows: int,
    active: int,
    eight_bit: bool,
    time: Timer,
    experts: dict[Mixture, ExpertWay],
    told: list[str],
) -> None:
    """For every kind of experts, on random choices: about as many rows for each as in a real pass."""
    groups: dict[Mixture, list[Experts]] = {}
    for layer in layers:
        which = Experts(layer["expert_gate_up"], layer["expert_down"], active)
        groups.setdefault(mixture_of(which, rows), []).append(which)
    for mixture, alike in groups.items():
        count, _, width = shape(alike[0].gate_up)
        x = _rows(plain_like(layers), rows, width)
        chosen = _rows(x, rows, count).float().topk(active, dim=-1).indices

        def timed(
            way: ExpertWay,
            x: Tensor = x,
            chosen: Tensor = chosen,
            alike: list[Experts] = alike,
        ) -> tuple[float, Tensor]:
            return time([partial(experts_by, way, x, chosen, which) for which in alike[:EXPERT_LAYERS]])

        offered = expert_ways(alike[0], rows, chip_of(x.device), eight_bit=eight_bit)
        experts[mixture] = fastest(offered, timed, str(mixture), told, last=ExpertWay(offered[0].tile))


def _sparse_is_faster(embedding: Tensor, canvas: int, scale: float, time: Timer, told: list[str]) -> bool:
    """Whether a canvas is better served by looking for the ids that matter. A canvas begins unsure, where all of them
    do, and ends sure, where one a position does: each is taken for half of its steps."""
    vocab = embedding.shape[0]
    sure, unsure = embedding.new_zeros(canvas, vocab), embedding.new_full((canvas, vocab), 1 / vocab)
    places = torch.arange(canvas, device=embedding.device)
    sure[places, places * 7919 % vocab] = 1  # rows of the table that no cache holds

    def timed(way: str) -> tuple[float, Tensor]:
        op = soft_embedding.soft_embedding if way == "sparse" else output.soft_embedding
        return time([partial(op, shares, embedding, scale) for shares in (sure, unsure)])

    what = f"soft embedding {vocab}x{embedding.shape[1]} of {canvas} rows"
    return fastest(["dense", "sparse"], timed, what, told) == "sparse"
