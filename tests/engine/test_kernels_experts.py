"""Routing and the grouped expert matmuls against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.experts import ExpertWay, expert_ways, experts, experts_by, mixture_of
from engine.kernels.grouped import row_tile, stored
from engine.kernels.readers import Experts
from engine.kernels.routing import choose, route, schedule, tile_count
from engine.kernels.weights import Int4Weight
from tests.engine.kernel_inputs import FORMATS, assert_near, randn, random_weight


def spread(rows: int, active: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=generator)[:active] for _ in range(rows)])


CHOICES = {
    "random": spread(13, 3, 8),
    "one row": spread(1, 2, 8),
    "one expert has all": torch.full((37, 1), 5),
    "two of many": torch.tensor([[6, 1]] * 33),
    "the last only": torch.full((16, 1), 7),
    "more than one scan": spread(400, 3, 8),
}
FEW = spread(9, 2, 3)  # three of eight experts have rows: the interpreter runs one program after the other
# numpy, which the interpreter computes with, warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("tile", [16, 32])
def test_schedule_gives_every_choice_to_its_expert_once(name: str, tile: int, device: torch.device) -> None:
    chosen = CHOICES[name].to(device)
    plan = schedule(chosen, 8, tile)
    order, flat = plan.order.tolist(), chosen.flatten().tolist()
    assert order == sorted(range(len(flat)), key=lambda choice: flat[choice])  # stable
    assert len(plan.rows) == tile_count(len(flat), 8, tile)
    covered: list[int] = []
    for expert, start, rows in zip(plan.expert.tolist(), plan.start.tolist(), plan.rows.tolist(), strict=True):
        assert 0 <= rows <= tile
        covered += range(start, start + rows)
        assert all(flat[choice] == expert for choice in order[start : start + rows])
    assert covered == list(range(len(flat)))


@pytest.mark.parametrize("count", [8, 100, 128])
def test_choose(count: int, device: torch.device) -> None:
    scores = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(seed)) for seed in range(5)])
    scores = (scores / 7).to(device)
    scale = torch.rand(count, generator=torch.Generator().manual_seed(1)).to(device)
    weights, chosen = choose(scores, scale, 3)
    best, expected = scores.softmax(-1).topk(3, dim=-1)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, best / best.sum(-1, keepdim=True) * scale[expected])


def test_of_equal_scores_the_first_is_chosen(device: torch.device) -> None:
    scores = torch.tensor([[1.0, 2, 2, 1, 2, 1, 1, 1], [-300.0, -200, 0, -250, -250, -300, -300, -300]]).to(device)
    weights, chosen = choose(scores, torch.ones(8, device=device), 4)
    assert chosen.tolist() == [[1, 2, 4, 0], [2, 0, 1, 3]]  # the others' odds are nothing in float32, thus equal
    assert weights[1].tolist() == [1, 0, 0, 0]


def test_route(device: torch.device) -> None:
    # float32: in bfloat16 two scores may round to one, and then which is chosen is anyone's
    x = randn(9, 64, device=device, dtype=torch.float32)
    projection = randn(16, 64, seed=2, device=device, dtype=torch.float32)
    scale = randn(16, seed=3, device=device, dtype=torch.float32)
    weights, chosen = route(x, projection, scale, 4)
    expected_weights, expected = reference.route(x, projection, scale, 4)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, expected_weights)


def run(chosen: Tensor, gate_up_form: str, down_form: str, device: torch.device, sizes: tuple[int, int]) -> None:
    hidden, width = sizes
    rows, active = chosen.shape
    x = randn(rows, hidden, device=device)
    gate_up = random_weight(gate_up_form, 8, 2 * width, hidden, seed=1, device=device)
    down = random_weight(down_form, 8, hidden, width, seed=2, device=device)
    which = Experts(gate_up, down, active)
    expected = reference.experts(x, chosen.to(device), which)
    assert_near(experts(x, chosen.to(device), which), expected)


# How rows are spread decides nothing about how weights are read: one format is enough for all but one of the choices.
SPREAD = [name for name in CHOICES if name not in ("random", "more than one scan")]


@pytest.mark.parametrize(
    ("form", "name"), [*((form, "random") for form in FORMATS), *(("nvfp4", name) for name in SPREAD)]
)
def test_experts(form: str, name: str, device: torch.device) -> None:
    run(CHOICES[name], form, form, device, (128, 64))


@pytest.mark.parametrize(
    ("form", "sizes"), [("plain", (80, 48)), *((form, (192, 192)) for form in FORMATS if form != "plain")]
)
def test_experts_whose_sizes_divide_by_no_tile(form: str, sizes: tuple[int, int], device: torch.device) -> None:
    """Columns of x and of what is between, of which a quantised weight has whole blocks; and rows of down."""
    run(FEW, form, form, device, sizes)


@pytest.mark.parametrize(("gate_up", "down"), [("nvfp4", "plain"), ("plain", "int4"), ("fp8", "nvfp4")])
def test_the_two_weights_may_be_stored_differently(gate_up: str, down: str, device: torch.device) -> None:
    run(CHOICES["random"], gate_up, down, device, (128, 64))


@pytest.mark.parametrize("form", FORMATS)
def test_large_tiles_of_rows(form: str, device: torch.device) -> None:
    chosen = spread(120, 3, 8)
    assert row_tile(chosen.numel(), 8) == 128
    run(chosen, form, form, device, (64, 64))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value: float, device: torch.device) -> None:
    chosen = CHOICES["random"].to(device)
    x = randn(13, 64, device=device)
    clean = experts(x, *(arguments := _rest(chosen, device)))
    x[4, 7] = value
    spoiled = experts(x, *arguments)
    others = torch.arange(13, device=device) != 4
    assert not spoiled[4].isfinite().all()
    assert torch.equal(spoiled[others], clean[others])


def _rest(chosen: Tensor, device: torch.device) -> tuple[Tensor, Experts]:
    gate_up = random_weight("plain", 8, 64, 64, seed=1, device=device)
    down = random_weight("plain", 8, 64, 32, seed=2, device=device)
    return chosen, Experts(gate_up, down, chosen.shape[1])


def test_experts_repeat_exactly(device: torch.device) -> None:
    x, chosen = randn(13, 64, device=device), CHOICES["random"].to(device)
    assert torch.equal(experts(x, *_rest(chosen, device)), experts(x, *_rest(chosen, device)))


def test_scales_must_fill_words(device: torch.device) -> None:
    weight = Int4Weight(
        torch.zeros(4, 48, dtype=torch.uint8, device=device), torch.ones(4, 3, dtype=torch.bfloat16, device=device)
    )
    with pytest.raises(ValueError, match="96 columns does not divide by 64"):
        stored(weight)


@pytest.mark.parametrize("form", FORMATS)
def test_another_tile_than_the_usual_may_be_chosen(form: str, device: torch.device) -> None:
    chosen = FEW.to(device)
    x = randn(9, 128, device=device)
    gate_up = random_weight(form, 8, 128, 128, seed=1, device=device)
    down = random_weight(form, 8, 128, 64, seed=2, device=device)
    which = Experts(gate_up, down, 2)
    expected = reference.experts(x, chosen, which)
    way = {mixture_of(which, 9): ExpertWay(64)}
    assert_near(experts(x, chosen, which, way), expected)


@pytest.mark.parametrize(
    ("gate_up", "down", "tile"),
    [("fp8", "fp8", 32), ("fp8", "fp8", 128), ("fp8", "nvfp4", 32), ("nvfp4", "fp8", 32), ("plain", "fp8", 32)],
)
def test_experts_of_eight_bit_rows(gate_up: str, down: str, tile: int, device: torch.device) -> None:
    """Rounding x and what is between the two matrices moves the result, see test_kernels_linears."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this chip multiplies no 8-bit floats")
    chosen = FEW.to(device)
    x = randn(9, 128, device=device)
    first = random_weight(gate_up, 8, 2 * 192, 128, seed=1, device=device)
    second = random_weight(down, 8, 128, 192, seed=2, device=device)
    which = Experts(first, second, 2)
    result = experts_by(ExpertWay(tile, True), x, chosen, which)
    assert_near(result, reference.experts(x, chosen, which), 6e-2)


def test_only_what_may_be_chosen_for_experts_is_offered(device: torch.device) -> None:
    weights = (random_weight(form, 8, 64, 64, seed=1, device=device) for form in ("fp8", "nvfp4"))
    fp8, nvfp4 = (Experts(weight, weight, 8) for weight in weights)
    assert expert_ways(fp8, 16, 90, eight_bit=False) == [ExpertWay(32)]
    assert expert_ways(fp8, 64, 90, eight_bit=False) == [ExpertWay(128), ExpertWay(64)]
    eight = [ExpertWay(128, True), ExpertWay(64, True)]
    assert expert_ways(fp8, 64, 90, eight_bit=True) == eight
    assert not any(way.eight_bit for way in expert_ways(fp8, 64, 86, eight_bit=True))
    assert not any(way.eight_bit for way in expert_ways(nvfp4, 64, 90, eight_bit=True))
