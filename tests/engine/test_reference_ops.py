"""Each reference op against a slow one written from its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import reference as ops
from engine.kernels.readers import Entrance, Experts, Mlp
from engine.kernels.views import AttentionView, Segment
from engine.model.layers import Rope
from engine.pages import PAGE

CPU = torch.device("cpu")
EPS = 1e-6


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = (3 * randn(5, 16)).to(dtype), randn(16, seed=1)
    expected = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS), (expected * weight).to(dtype))
    torch.testing.assert_close(ops.rms_norm(x, None, EPS), expected.to(dtype))


@pytest.mark.parametrize(("theta", "turned"), [(1e4, 8), (1e6, 2)])
def test_rope_rotates_pairs_by_their_position_times_frequency(theta: float, turned: int) -> None:
    dim, half = 16, 8
    x = randn(3, 2, dim)
    cos, sin = Rope(dim, theta, turned, CPU, torch.float32).rows(torch.arange(40, 43))
    out = ops.rope(x, cos, sin)
    for row in range(3):
        for pair in range(half):
            angle = (40 + row) * theta ** (-2 * pair / dim) if pair < turned else 0.0
            a, b = x[row, :, pair], x[row, :, pair + half]
            rotated = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
            torch.testing.assert_close(out[row, :, pair], rotated[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(out[row, :, pair + half], rotated[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("separate_values", [True, False])
def test_qkv_norm_rope_write(separate_values: bool) -> None:
    heads, kv, dim, rows = 4, 2, 8, 3
    projected = randn(rows, heads + (2 if separate_values else 1) * kv, dim)
    q_weight, k_weight = randn(dim, seed=1), randn(dim, seed=2)
    cos, sin = Rope(dim, 1e4, dim // 2, CPU, torch.float32).rows(torch.arange(7, 7 + rows))
    weight = torch.cat((q_weight.expand(heads, -1), k_weight.expand(kv, -1)))
    keys, values = (torch.full((2, PAGE, kv, dim), 99.0) for _ in range(2))
    where = torch.tensor([PAGE + 5, 3, 4])
    queries = ops.qkv_norm_rope_write(projected, weight, cos, sin, EPS, keys, values, where)
    raw_keys = projected[:, heads : heads + kv]
    raw_values = projected[:, heads + kv :] if separate_values else raw_keys
    torch.testing.assert_close(queries, ops.rope(ops.rms_norm(projected[:, :heads], q_weight, EPS), cos, sin))
    stored_keys, stored_values = keys.view(-1, kv, dim), values.view(-1, kv, dim)
    torch.testing.assert_close(stored_keys[where], ops.rope(ops.rms_norm(raw_keys, k_weight, EPS), cos, sin))
    torch.testing.assert_close(stored_values[where], ops.rms_norm(raw_values, None, EPS))
    others = torch.ones(2 * PAGE, dtype=torch.bool).index_fill(0, where, False)
    assert (stored_keys[others] == 99).all() and (stored_values[others] == 99).all()


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [D] over keys, values [L, D]."""
    return (keys @ query).softmax(0) @ values


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(
    ("low", "high"), [(0, 5), (0, PAGE), (3, PAGE + 1), (PAGE - 1, 2 * PAGE + 9), (PAGE, PAGE + 1)]
)
def test_attention(low: int, high: int, uniform: bool) -> None:
    """Two segments in pages that are out of order; in the first every row sees one position more than the last."""
    count, heads, kv, dim, pages = 4, 6, 2, 8, 8
    queries = randn(2 * count, heads, dim)
    keys, values = randn(pages, PAGE, kv, dim, seed=1), randn(pages, PAGE, kv, dim, seed=2)
    table = torch.tensor([[5, 2, 7, 0], [1, 6, 3, 4]], dtype=torch.int32)
    step = torch.zeros(count, dtype=torch.int32) if uniform else torch.arange(count, dtype=torch.int32)
    lows = torch.cat((low + step, torch.zeros(count, dtype=torch.int32)))
    highs = torch.cat((high + step, torch.full((count,), 70, dtype=torch.int32)))
    view = AttentionView(
        segments=(Segment(0, count, uniform, start=high - 1), Segment(count, count, True, start=0)),
        low=lows,
        high=highs,
        segment=torch.tensor([0, 1], dtype=torch.int32).repeat_interleave(count),
        table=table,
        where=torch.zeros(2 * count, dtype=torch.int32),
    )
    out = ops.attention(queries, keys, values, view).view(2 * count, heads, dim)
    for row in range(2 * count):
        spread_keys, spread_values = (
            stored[table[row // count].long()].flatten(0, 1)[int(lows[row]) : int(highs[row])]
            for stored in (keys, values)
        )
        for head in range(heads):
            group = head // (heads // kv)
            expected = attend(queries[row, head], spread_keys[:, group], spread_values[:, group])
            torch.testing.assert_close(out[row, head], expected)


def test_joins_are_norms_and_sums() -> None:
    x, projected, dense = (randn(5, 16, seed=seed) for seed in range(3))
    parts, shares = randn(5, 3, 16, seed=3), randn(5, 3, seed=4)
    w = [randn(16, seed=10 + number) for number in range(4)]
    h, mlp_input, experts_input, router_input = ops.join_attention(
        x, projected, w[0], Entrance(w[1]), Entrance(w[2]), w[3], EPS
    )
    torch.testing.assert_close(h, x + ops.rms_norm(projected, w[0], EPS))
    torch.testing.assert_close(mlp_input, ops.rms_norm(h, w[1], EPS))
    torch.testing.assert_close(experts_input, ops.rms_norm(h, w[2], EPS))
    torch.testing.assert_close(router_input, ops.rms_norm(h, w[3], EPS))
    modes, scalars = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0.5, 3.0])
    out, normed = ops.join_layer(h, dense, parts, shares, w[0], w[1], w[2], scalars, modes, Entrance(w[3]), EPS)
    routed = torch.stack([shares[row] @ parts[row] for row in range(5)])
    y = ops.rms_norm(dense, w[0], EPS) + ops.rms_norm(routed, w[1], EPS)
    expected = (h + ops.rms_norm(y, w[2], EPS)) * torch.tensor([0.5, 0.5, 3.0, 0.5, 3.0])[:, None]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(normed, ops.rms_norm(expected, w[3], EPS))


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T


def test_gated_mlp_takes_the_gate_rows_first() -> None:
    x, gate, up, down = randn(4, 8), randn(6, 8, seed=1), randn(6, 8, seed=2), randn(8, 6, seed=3)
    torch.testing.assert_close(ops.gated_mlp(x, Mlp(torch.cat((gate, up)), down)), mlp(x, gate, up, down))


def test_route() -> None:
    x, projection, scale = randn(9, 16), randn(6, 16, seed=2), randn(6, seed=3)
    weights, chosen = ops.route(x, projection, scale, 2)
    probabilities = (x @ projection.T).softmax(-1)
    for row in range(9):
        best = probabilities[row].argsort(descending=True)[:2]
        assert chosen[row].tolist() == best.tolist()
        expected = probabilities[row, best] / probabilities[row, best].sum() * scale[best]
        torch.testing.assert_close(weights[row], expected)


def test_route_computes_probabilities_in_float32() -> None:
    x, projection = randn(4, 16).bfloat16(), randn(6, 16, seed=2).bfloat16()
    weights, _ = ops.route(x, projection, torch.ones(6), 3)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 13])
def test_experts(dtype: torch.dtype, rows: int) -> None:
    count, active, hidden, width = 7, 3, 8, 4
    x = randn(rows, hidden).to(dtype)
    gate_up, down = randn(count, 2 * width, hidden, seed=1).to(dtype), randn(count, hidden, width, seed=2).to(dtype)
    # the last expert gets no row
    chosen = torch.stack([randn(count - 1, seed=row).argsort()[:active] for row in range(rows)])
    expected = torch.zeros(rows, active, hidden)
    for row in range(rows):
        for place, expert in enumerate(chosen[row].tolist()):
            gate, up = gate_up[expert].float().chunk(2)
            expected[row, place] = mlp(x[row].float(), gate, up, down[expert].float())
    out = ops.experts(x, chosen, Experts(gate_up, down, active))
    assert out.dtype == dtype
    error = (out.float() - expected).norm() / expected.norm()
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2)


def test_an_expert_without_rows_is_not_touched() -> None:
    gate_up, down = torch.full((3, 4, 4), math.nan), torch.full((3, 4, 2), math.nan)
    gate_up[1], down[1] = 1.0, 1.0
    chosen = torch.ones(5, 1, dtype=torch.int64)
    out = ops.experts(randn(5, 4), chosen, Experts(gate_up, down, 1))
    assert out.isfinite().all()
