"""Norms, RoPE with its writes, and the two joins against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import norms, reference
from engine.kernels.grouped import BLOCK, EightBit
from engine.kernels.operands import (
    EIGHT_BIT,
    PLAIN,
    Operand,
    Order,
    Ordered,
    order_for,
    taken,
    values_of,
)
from engine.kernels.readers import Entrance, Mlp, Reader
from engine.kernels.views import NOWHERE
from engine.pages import PAGE
from tests.engine.kernel_inputs import assert_near, randn, skip_without_eight_bit

# numpy, which the interpreter computes with, warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered|All-NaN:RuntimeWarning")
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
# Those that some chip's tiles want of the model's rows, fragments aside.
ORDERS = (PLAIN, EIGHT_BIT, *(order_for(form, block) for form in ("fp8", "nvfp4") for block in (BLOCK, 2 * BLOCK)))


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


def attention_inputs(
    rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Entrance, Entrance, Tensor, float]:
    """Of `join_attention`."""
    x, projected = (randn(rows, width, seed=seed, device=device, dtype=dtype) for seed in range(2))
    post, mlp, experts, router = vectors(width, device)
    return x, projected, post, Entrance(mlp), Entrance(experts, READER), router, EPS


def layer_inputs(
    rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Entrance, float]:
    """Of `join_layer`, three experts a row."""
    h, mlp = (randn(rows, width, seed=seed, device=device, dtype=dtype) for seed in range(2))
    parts = randn(rows, 3, width, seed=2, device=device, dtype=dtype)
    shares = randn(rows, 3, seed=3, device=device, dtype=torch.float32)
    modes = torch.tensor([0, 1, 1, 0, 1] * rows, dtype=torch.int32, device=device)[:rows]
    scalars = torch.tensor([0.5, 3.1], device=device)
    *weights, following = vectors(width, device)
    return h, mlp, parts, shares, *weights, scalars, modes, Entrance(following, READER), EPS  # type: ignore[return-value]


def vectors(width: int, device: torch.device) -> list[Tensor]:
    return [randn(width, seed=10 + seed, device=device, dtype=torch.float32) for seed in range(4)]


READER = Mlp(torch.zeros(0), torch.zeros(0))  # any that is not nobody


def plain(reader: Reader, rows: int) -> Order:
    return PLAIN


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
    inputs = attention_inputs(5, width, dtype, device)
    for mine, expected in zip(
        norms.join_attention(*inputs, orders=plain), reference.join_attention(*inputs), strict=True
    ):
        assert_near(mine, expected, bound(dtype))
    inputs = layer_inputs(5, width, dtype, device)
    for mine, expected in zip(norms.join_layer(*inputs, orders=plain), reference.join_layer(*inputs), strict=True):
        assert_near(mine, expected, bound(dtype))


def assert_same(mine: Operand, expected: Operand) -> None:
    """To the bit, and come in the same order."""
    assert type(mine) is type(expected)
    assert torch.equal(values_of(mine).view(torch.uint8), values_of(expected).view(torch.uint8))
    if isinstance(mine, EightBit) and isinstance(expected, EightBit):
        assert torch.equal(mine.scale, expected.scale)


def in_order(x: Tensor, order: Order) -> Operand:
    """Plain rows as a kernel of its own would hand them over."""
    found = taken(x, order)
    return Ordered(found, order) if isinstance(found, Tensor) and order != PLAIN else found


# At the model's width, which no power of two is: in 8 bit a row has one scale, in blocks of 128 columns the most order.
@pytest.mark.parametrize(
    ("order", "width"),
    [*((order, 128) for order in ORDERS), (EIGHT_BIT, 2816), (order_for("nvfp4", 2 * BLOCK), 2816)],
    ids=str,
)
def test_rows_are_handed_over_as_if_made_so_afterwards(order: Order, width: int, device: torch.device) -> None:
    """Some rows in an order, or all: no bit differs from what `taken` makes of plain ones."""
    if order == EIGHT_BIT:
        skip_without_eight_bit(device)
    for others in (PLAIN, order):

        def orders(reader: Reader, rows: int, others: Order = others) -> Order:
            return others if reader is None else order

        inputs = attention_inputs(5, width, torch.bfloat16, device)
        inputs[0][3], inputs[1][3] = 0, 0  # a row of zeros, and one whose largest is far off
        inputs[0][4, 7] = 3e4
        h, mlp, experts, router = norms.join_attention(*inputs, orders=plain)
        assert isinstance(mlp, Tensor) and isinstance(experts, Tensor)
        found = norms.join_attention(*inputs, orders=orders)
        for mine, expected in zip(found, (h, in_order(mlp, others), in_order(experts, order), router), strict=True):
            assert_same(mine, expected)
    inputs = layer_inputs(5, width, torch.bfloat16, device)
    x, normed = norms.join_layer(*inputs, orders=plain)
    assert isinstance(normed, Tensor)
    found = norms.join_layer(*inputs, orders=lambda *_: order)
    for mine, expected in zip(found, (x, in_order(normed, order)), strict=True):
        assert_same(mine, expected)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_row_handed_over_does_not_depend_on_its_neighbours(order: Order, device: torch.device) -> None:
    if order == EIGHT_BIT:
        skip_without_eight_bit(device)
    inputs = layer_inputs(5, 128, torch.bfloat16, device)
    alone = values_of(norms.join_layer(*inputs, orders=lambda *_: order)[1])[2]
    for rows in inputs[:3]:
        rows[:2], rows[3:] = float("nan"), 500
    beside = values_of(norms.join_layer(*inputs, orders=lambda *_: order)[1])[2]
    assert torch.equal(beside.view(torch.uint8), alone.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 2816])
def test_experts_are_summed_in_the_order_they_were_chosen(dtype: torch.dtype, width: int, device: torch.device) -> None:
    """To the bit as if a kernel before had summed them in float32 and rounded: then that is one part of share 1."""
    h, mlp, parts, shares, *rest = layer_inputs(5, width, dtype, device)
    shares[1] = torch.tensor([1e4, -1e4, 1e-3], device=device)  # where the order shows
    total = torch.zeros(5, width, device=device)
    for place in range(parts.shape[1]):
        product = parts[:, place].double() * shares[:, place, None].double()  # exact
        if device.type == "cpu":  # a GPU adds and multiplies at once
            product = product.float()
        total = (total.double() + product).float()
    found = norms.join_layer(h, mlp, parts, shares, *rest, orders=plain)
    expected = norms.join_layer(h, mlp, total.to(dtype)[:, None], torch.ones(5, 1, device=device), *rest, orders=plain)
    for mine, same in zip(found, expected, strict=True):
        assert_same(mine, same)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value: float, device: torch.device) -> None:
    x = randn(4, 48, device=device)
    clean = norms.rms_norm(x, None, EPS)
    x[2, 5] = value
    spoiled = norms.rms_norm(x, None, EPS)
    assert not spoiled[2].isfinite().all()
    assert torch.equal(spoiled[[0, 1, 3]], clean[[0, 1, 3]])
