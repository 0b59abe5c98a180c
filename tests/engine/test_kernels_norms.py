"""Norms, RoPE with its writes, and the two joins against the reference."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import norms, reference
from engine.kernels.views import NOWHERE
from engine.pages import PAGE
from tests.engine.kernel_inputs import assert_near, randn

# numpy, which the interpreter computes with, warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]


def bound(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 5e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 100])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(dtype: torch.dtype, width: int, weighted: bool, device: torch.device) -> None:
    x = randn(2, 3, width, device=device, dtype=dtype) * 5
    x[0, 1] = 0
    weight = randn(width, seed=1, device=device, dtype=torch.float32) if weighted else None
    assert_near(norms.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), bound(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kv", [1, 2])
def test_qkv_norm_rope_write(dtype: torch.dtype, shared: bool, kv: int, device: torch.device) -> None:
    """`shared`: the raw keys are the values too. Row 2 only fills up."""
    rows, heads, dim, pages = 5, 4, 16, 3
    count = heads + (kv if shared else 2 * kv)
    projected = randn(rows, count, dim, device=device, dtype=dtype) * 3
    weight = randn(heads + kv, dim, seed=1, device=device, dtype=torch.float32)
    angle = randn(rows, dim // 2, seed=2, device=device, dtype=torch.float32)
    cos = torch.cat((angle.cos(), angle.cos()), -1).to(dtype)
    sin = torch.cat((-angle.sin(), angle.sin()), -1).to(dtype)
    places = [3, PAGE - 1, NOWHERE, PAGE, 2 * PAGE + 9]
    where = torch.tensor(places, dtype=torch.int32, device=device)
    ours = [torch.zeros(pages, PAGE, kv, dim, device=device, dtype=dtype) for _ in range(2)]
    theirs = [torch.zeros_like(tensor) for tensor in ours]
    queries = norms.qkv_norm_rope_write(projected, weight, cos, sin, EPS, *ours, where)
    kept = [row for row, place in enumerate(places) if place != NOWHERE]
    expected = reference.qkv_norm_rope_write(projected[kept], weight, cos[kept], sin[kept], EPS, *theirs, where[kept])
    assert_near(queries[kept], expected, bound(dtype))
    for mine, reference_written in zip(ours, theirs, strict=True):
        assert_near(mine, reference_written, bound(dtype))
        assert int((mine != 0).any(-1).sum()) == len(kept) * kv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv", [1, 2])
def test_folded_queries(dtype: torch.dtype, kv: int, device: torch.device) -> None:
    """Times what is before the keys' weight, where RoPE turns nothing, they make the same scores."""
    rows, heads, dim, turned = 5, 4, 16, 3
    projected = randn(rows, heads + kv, dim, device=device, dtype=dtype) * 3
    weight = randn(heads + kv, dim, seed=1, device=device, dtype=torch.float32)
    angle = randn(rows, dim // 2, seed=2, device=device, dtype=torch.float32)
    angle[:, turned:] = 0
    cos = torch.cat((angle.cos(), angle.cos()), -1).to(dtype)
    sin = torch.cat((-angle.sin(), angle.sin()), -1).to(dtype)
    where = torch.arange(rows, dtype=torch.int32, device=device)
    caches = [torch.zeros(1, PAGE, kv, dim, device=device, dtype=dtype) for _ in range(4)]
    plain = norms.qkv_norm_rope_write(projected, weight, cos, sin, EPS, *caches[:2], where)
    folded = norms.qkv_norm_rope_write(projected, weight, cos, sin, EPS, *caches[2:], where, folded_from=turned)
    keys, values = caches[2:]
    assert torch.equal(keys, caches[0]) and torch.equal(values, caches[1])
    is_turned = torch.arange(dim, device=device) % (dim // 2) < turned
    assert torch.equal(folded[..., is_turned], plain[..., is_turned])
    read = torch.where(is_turned, keys, values)
    scores, expected = (
        torch.einsum("rkgd,pkd->rkgp", q.unflatten(1, (kv, -1)).float(), k[0].float())
        for q, k in ((folded, read), (plain, keys))
    )
    assert_near(scores, expected, bound(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 100])
def test_joins(dtype: torch.dtype, width: int, device: torch.device) -> None:
    x, other, third = (randn(5, width, seed=seed, device=device, dtype=dtype) for seed in range(3))
    weights = [randn(width, seed=10 + seed, device=device, dtype=torch.float32) for seed in range(4)]
    for mine, expected in zip(
        norms.join_attention(x, other, *weights, EPS), reference.join_attention(x, other, *weights, EPS), strict=True
    ):
        assert_near(mine, expected, bound(dtype))
    modes = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32, device=device)
    scalars = torch.tensor([0.5, 3.1], device=device)
    arguments = (x, other, third, *weights[:3], scalars, modes, weights[3], EPS)
    for mine, expected in zip(norms.join_layer(*arguments), reference.join_layer(*arguments), strict=True):
        assert_near(mine, expected, bound(dtype))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value: float, device: torch.device) -> None:
    x = randn(4, 48, device=device)
    clean = norms.rms_norm(x, None, EPS)
    x[2, 5] = value
    spoiled = norms.rms_norm(x, None, EPS)
    assert not spoiled[2].isfinite().all()
    assert torch.equal(spoiled[[0, 1, 3]], clean[[0, 1, 3]])
