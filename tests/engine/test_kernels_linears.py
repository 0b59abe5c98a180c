"""Dense projections and the dense MLP against the reference."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from engine.kernels import reference
from engine.kernels.grouped import stored
from engine.kernels.linears import (
    PARTS,
    Chosen,
    Way,
    gated_mlp,
    linear,
    multiply,
    multiply_gated,
    prepare,
    product_of,
    ways,
)
from engine.kernels.operands import Order
from engine.kernels.readers import Mlp
from engine.kernels.rounding import round_rows
from engine.kernels.tiles import column_of, ordered
from engine.kernels.unpacking import unpack
from engine.kernels.weights import Weight, dense
from tests.engine.kernel_inputs import FORMATS, assert_near, randn, random_weight, skip_without_eight_bit

# numpy, which the interpreter computes with, warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


# How rows and columns are divided among programs is the same code for every format, and how these are decoded is the
# same for every division. So one format sees all divisions, and each of the others one: the interpreter is slow.
@pytest.mark.parametrize(("form", "rows"), [*((form, 17) for form in FORMATS), *(("nvfp4", rows) for rows in (1, 130))])
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
@pytest.mark.parametrize("sizes", [(128, 64), (192, 192)])
def test_gated_mlp(form: str, sizes: tuple[int, int], device: torch.device) -> None:
    hidden, width = sizes
    x = randn(19, hidden, device=device)
    gate_up = random_weight(form, 2 * width, hidden, seed=1, device=device)
    down = random_weight(form, hidden, width, seed=2, device=device)
    mlp = Mlp(gate_up, down)
    assert_near(gated_mlp(x, mlp), reference.gated_mlp(x, mlp))


@pytest.mark.parametrize(("gate_up", "down"), [("nvfp4", "plain"), ("plain", "fp8"), ("plain", "int4")])
def test_the_two_weights_may_be_stored_differently(gate_up: str, down: str, device: torch.device) -> None:
    x = randn(5, 64, device=device)
    first = random_weight(gate_up, 128, 64, seed=1, device=device)
    second = random_weight(down, 64, 64, seed=2, device=device)
    mlp = Mlp(first, second)
    assert_near(gated_mlp(x, mlp), reference.gated_mlp(x, mlp))


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


WAYS = [Way("tiles", 2), Way("tiles", 3), Way("unpacked"), Way("e4m3"), Way("e4m3", 2), Way("library")]
SIXTEEN_BIT = [(form, way) for form in FORMATS[1:] for way in (Way("tiles", 2), Way("unpacked"))]
DIVIDED = ("nvfp4", Way("tiles", 3))  # of 128 columns the last part is empty
EIGHT_BIT = [way for way in WAYS if way.eight_bit]
# What rounding x to 8 bit may add: e4m3 has 3 bits behind the point, so an error evenly between +-2^-4 of a value's
# power of two, which by norm is about 2.6e-2 of x, and as much of each sum.
ROUNDING = 4e-2


def eight_bit(x: torch.Tensor) -> torch.Tensor:
    """x as `round_rows` leaves it, by torch alone."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def choose(way: Way, rows: int, gate_up: Weight | None, down: Weight) -> Chosen:
    chosen = {product_of(down, rows, gated=False): way}
    return chosen if gate_up is None else chosen | {product_of(gate_up, rows, gated=True): way}


@pytest.mark.parametrize(
    ("form", "way", "rows"),
    [*((*each, 1) for each in (*SIXTEEN_BIT, DIVIDED)), *(("nvfp4", way, 70) for way in WAYS if not way.eight_bit)],
    ids=str,
)
def test_every_way_agrees(form: str, way: Way, rows: int, device: torch.device) -> None:
    x = randn(rows, 320, device=device)
    weight = random_weight(form, 208, 320, seed=1, device=device)
    assert_near(linear(x, weight, choose(way, rows, None, weight)), reference.linear(x, weight))


@pytest.mark.parametrize(("form", "way"), [*SIXTEEN_BIT, DIVIDED], ids=str)
def test_gated_mlp_by_every_way(form: str, way: Way, device: torch.device) -> None:
    x = randn(19, 128, device=device)
    gate_up = random_weight(form, 2 * 192, 128, seed=1, device=device)
    down = random_weight(form, 128, 192, seed=2, device=device)
    mlp = Mlp(gate_up, down)
    for other in (way, Way()):  # of gate and up; down always by `way`, which decides how columns are handed on
        chosen = choose(way, 19, None, down) | {product_of(gate_up, 19, gated=True): other}
        assert_near(gated_mlp(x, mlp, chosen), reference.gated_mlp(x, mlp))


@pytest.mark.parametrize("way", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("rows", [1, 70])
def test_eight_bit_rows(way: Way, rows: int, device: torch.device) -> None:
    """As exact as the others on what is left of x; and near enough to what x was."""
    skip_without_eight_bit(device)
    x = randn(rows, 320, device=device)
    weight = random_weight("fp8", 208, 320, seed=1, device=device)
    result = linear(x, weight, choose(way, rows, None, weight))
    assert_near(result, reference.linear(eight_bit(x).float(), weight).bfloat16())
    assert_near(result, reference.linear(x, weight), ROUNDING)


@pytest.mark.parametrize("way", EIGHT_BIT, ids=str)
def test_gated_mlp_of_eight_bit_rows(way: Way, device: torch.device) -> None:
    skip_without_eight_bit(device)
    x = randn(19, 128, device=device)
    gate_up = random_weight("fp8", 2 * 192, 128, seed=1, device=device)
    down = random_weight("fp8", 128, 192, seed=2, device=device)
    mlp = Mlp(gate_up, down)
    for first in (way, Way()):
        chosen = choose(way, 19, None, down) | {product_of(gate_up, 19, gated=True): first}
        assert_near(gated_mlp(x, mlp, chosen), reference.gated_mlp(x, mlp), 1.5 * ROUNDING)


def test_rows_are_rounded_each_by_its_own_scale(device: torch.device) -> None:
    skip_without_eight_bit(device)
    x = randn(6, 192, device=device) * torch.tensor([1e-3, 1, 40, 1, 1, 1], device=device)[:, None].bfloat16()
    x[3] = 0
    x[4, 7] = 1e4  # beside it the others are subnormal, or nothing
    found = round_rows(x)
    scale = x.float().abs().amax(-1) / 448
    expected = (x.float() / scale[:, None]).nan_to_num(0).to(torch.float8_e4m3fn)
    kept = torch.arange(6, device=device) != 3
    torch.testing.assert_close(found.scale[kept], scale[kept])
    assert torch.equal(found.values.float(), expected.float())
    x[5, 3] = float("inf")
    spoiled = round_rows(x)
    assert not (spoiled.values.float() * spoiled.scale[:, None])[5].isfinite().all()
    assert torch.equal(spoiled.values[:5].float(), found.values[:5].float())


@pytest.mark.parametrize("form", FORMATS[1:])
def test_unpacked_is_dense_to_the_bit(form: str, device: torch.device) -> None:
    weight = random_weight(form, 100, 320, seed=3, device=device)
    whole = unpack(stored(weight))
    assert torch.equal(whole, ordered(dense(weight, torch.bfloat16), form, 64))


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    """In tiles, whatever else is in the pass, as long as its class is the same."""
    for form, way in (("fp8", Way("tiles", 3)), ("nvfp4", Way("tiles", 3)), ("fp8", Way("e4m3", 2))):
        if way.eight_bit:
            skip_without_eight_bit(device)
        weight = random_weight(form, 128, 192, seed=1, device=device)
        chosen = choose(way, 9, None, weight)
        x = randn(9, 192, device=device)
        alone = linear(x, weight, chosen)[4]
        x[:4], x[5:] = 1000, -3
        assert torch.equal(linear(x, weight, chosen)[4], alone)


def test_only_what_may_be_chosen_is_offered() -> None:
    assert ways("fp8", 256, 90, eight_bit=False) == [Way(), *(Way("tiles", parts) for parts in PARTS), Way("unpacked")]
    rounded = [*(Way("e4m3", parts) for parts in (1, *PARTS)), Way("library")]
    assert ways("fp8", 256, 90, eight_bit=True) == rounded
    assert not any(way.eight_bit for way in ways("fp8", 256, 86, eight_bit=True))  # has no such matrix units
    assert not any(way.eight_bit for way in ways("nvfp4", 256, 90, eight_bit=True))
    assert all(way.parts == 1 for way in ways("int4", 1024, 90, eight_bit=True))


def test_what_start_up_times_is_what_runs(device: torch.device) -> None:
    x = randn(5, 128, device=device)
    gate_up = random_weight("nvfp4", 256, 128, seed=1, device=device)
    down = random_weight("nvfp4", 64, 128, seed=2, device=device)
    way = Way("tiles", 2)
    hidden = multiply_gated(prepare(x, gate_up, way, gated=True), gate_up, way, Order("nvfp4", 64))
    assert torch.equal(multiply(hidden, down, way), gated_mlp(x, Mlp(gate_up, down), choose(way, 5, gate_up, down)))
