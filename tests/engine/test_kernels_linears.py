"""Dense projections and the dense MLP against the reference."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from engine.kernels import reference
from engine.kernels.linears import gated_mlp, linear
from engine.kernels.tiles import column_of, ordered
from engine.kernels.weights import dense
from tests.engine.kernel_inputs import FORMATS, assert_near, randn, random_weight

# numpy, which the interpreter computes with, warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [1, 17, 130])
def test_linear(form: str, rows: int, device: torch.device) -> None:
    x = randn(rows, 192, device=device)
    weight = random_weight(form, 200, 192, seed=1, device=device)
    assert_near(linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("form", FORMATS)
def test_each_column_meets_its_own_weight(form: str, device: torch.device) -> None:
    """A row of x with a single one picks out a column: every stored value is read as `dense` says, to the bit."""
    weight = random_weight(form, 32, 128, seed=3, device=device)
    picked = linear(torch.eye(128, device=device, dtype=torch.bfloat16), weight)
    assert_near(picked.t(), dense(weight, torch.bfloat16), 4e-3)  # fp8's and nvfp4's row scale comes after a rounding
    if form in ("plain", "int4"):
        assert torch.equal(picked.t(), dense(weight, torch.bfloat16))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", [(128, 64), (192, 320)])
def test_gated_mlp(form: str, sizes: tuple[int, int], device: torch.device) -> None:
    hidden, width = sizes
    x = randn(19, hidden, device=device)
    gate_up = random_weight(form, 2 * width, hidden, seed=1, device=device)
    down = random_weight(form, hidden, width, seed=2, device=device)
    assert_near(gated_mlp(x, gate_up, down), reference.gated_mlp(x, gate_up, down))


@pytest.mark.parametrize(("gate_up", "down"), [("nvfp4", "plain"), ("plain", "fp8"), ("plain", "int4")])
def test_the_two_weights_may_be_stored_differently(gate_up: str, down: str, device: torch.device) -> None:
    x = randn(5, 64, device=device)
    first = random_weight(gate_up, 128, 64, seed=1, device=device)
    second = random_weight(down, 64, 64, seed=2, device=device)
    assert_near(gated_mlp(x, first, second), reference.gated_mlp(x, first, second))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("form", FORMATS)
def test_ordered_puts_columns_where_the_kernels_do(form: str, block: int, device: torch.device) -> None:
    x = torch.arange(256, device=device).view(2, 128)
    placed = torch.empty(128, dtype=torch.int32, device=device)
    column_kernel[(1,)](placed, FORM=form, BLOCK=block)
    assert torch.equal(ordered(x, form, block)[:, placed.long()], x)
    assert sorted(placed.tolist()) == list(range(128))


@triton.jit
def column_kernel(out, FORM: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, 128)
    tl.store(out + columns, column_of(columns, FORM, BLOCK))
