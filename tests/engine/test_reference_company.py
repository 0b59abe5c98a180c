"""A row's bits do not depend on the rows beside it, op by op, whatever the number of threads that share the work.

Where torch cuts a tensor among threads follows from its size and from their number, and an op may round otherwise at
the ends of a piece. So this is asked of every op that takes rows of several requests, with numbers of threads that do
not divide what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import reference as ops
from engine.kernels.readers import Entrance, Experts, Mlp
from engine.kernels.reference_output import Draw, read_logits

M, WIDTH, EXPERTS, EXPERT_WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 96, 200, 8, 104, 4, 2, 48, 1000
ROWS = 512
PARTS = ((0, 16), (16, 23), (23, 100), (100, 256), (256, 511), (511, 512))
EPS = 1e-6

Run = Callable[[slice], tuple[Tensor, ...]]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(dtype: torch.dtype, width: int = M, seed: int = 0) -> Tensor:
    return (3 * randn(ROWS, width, seed=seed)).to(dtype)


def norms(dtype: torch.dtype) -> Run:
    x, weight = inputs(dtype), randn(M, seed=1)
    return lambda rows: (ops.rms_norm(x[rows], weight, EPS), ops.rms_norm(x[rows], None, EPS))


def heads(dtype: torch.dtype) -> Run:
    count = HEADS + 2 * KV_HEADS
    projected = inputs(dtype, count * HEAD_DIM).view(ROWS, count, HEAD_DIM)
    weight = randn(HEADS + KV_HEADS, HEAD_DIM, seed=1)
    cos, sin = inputs(dtype, HEAD_DIM, seed=2), inputs(dtype, HEAD_DIM, seed=3)
    where = torch.arange(ROWS)

    def run(rows: slice) -> tuple[Tensor, ...]:
        keys, values = (projected.new_zeros(ROWS // 64, 64, KV_HEADS, HEAD_DIM) for _ in range(2))
        found = ops.qkv_norm_rope_write(
            projected[rows], weight, cos[rows], sin[rows], EPS, keys, values, where[rows].int()
        )
        return found, keys.flatten(0, 1)[rows], values.flatten(0, 1)[rows]

    return run


def joins(dtype: torch.dtype) -> Run:
    x, projected = inputs(dtype), inputs(dtype, seed=1)
    parts, shares = inputs(dtype, 2 * M, seed=2).view(ROWS, 2, M), randn(ROWS, 2, seed=3)
    one, two, three, four = (randn(M, seed=seed) for seed in range(4, 8))
    modes = (torch.arange(ROWS) % 2).int()

    def run(rows: slice) -> tuple[Tensor, ...]:
        attended = ops.join_attention(x[rows], projected[rows], one, Entrance(two), Entrance(three), four, EPS)
        scalars = torch.tensor([0.5, 1.25])
        left = ops.join_layer(
            x[rows],
            projected[rows],
            parts[rows],
            shares[rows],
            one,
            two,
            three,
            scalars,
            modes[rows],
            Entrance(four),
            EPS,
        )
        return *attended, *left

    return run


def products(dtype: torch.dtype) -> Run:
    x, weight = inputs(dtype), randn(WIDTH, M, seed=1).to(dtype)
    mlp = Mlp(randn(2 * WIDTH, M, seed=2).to(dtype), randn(M, WIDTH, seed=3).to(dtype))
    return lambda rows: (ops.linear(x[rows], weight), ops.gated_mlp(x[rows], mlp))


def experts(dtype: torch.dtype) -> Run:
    x, router = inputs(dtype), randn(EXPERTS, M, seed=1).to(dtype)
    gate_up = randn(EXPERTS, 2 * EXPERT_WIDTH, M, seed=2).to(dtype)
    which = Experts(gate_up, randn(EXPERTS, M, EXPERT_WIDTH, seed=3).to(dtype), 2)

    def run(rows: slice) -> tuple[Tensor, ...]:
        shares, chosen = ops.route(x[rows], router, randn(EXPERTS, seed=4), 2)
        return shares, chosen, ops.experts(x[rows], chosen, which)

    return run


def output(dtype: torch.dtype) -> Run:
    logits = inputs(dtype, VOCAB)
    uniforms = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(ROWS)

    def run(rows: slice) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for shaped, top_k, top_p, min_p in ((False, 0, 1.0, 0.0), (True, 40, 0.9, 0.01)):
            draw = Draw(
                temperature=0.6 * ones[rows],
                request_temperature=0.7 * ones[rows],
                top_k=(top_k * ones[rows]).int(),
                top_p=top_p * ones[rows],
                min_p=min_p * ones[rows],
                uniforms=uniforms[rows],
                shaped=shaped,
            )
            reading = read_logits(logits[rows], 30.0, draw)
            found += [reading.best, reading.entropy, reading.drawn, reading.probabilities]
        return tuple(found)

    return run


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [norms, heads, joins, products, experts, output])
def test_a_rows_bits_are_its_own(op: Callable[[torch.dtype], Run], dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    run = op(dtype)
    together = run(slice(0, ROWS))
    for begin, end in PARTS:
        rows = slice(begin, end)
        for mine, theirs in zip(run(rows), together, strict=True):
            assert torch.equal(mine, theirs[rows])
