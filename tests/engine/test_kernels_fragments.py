"""Experts' 4-bit weights laid out as fragments: they stand for the same; and the kernel that multiplies by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.experts import ExpertWay, experts, experts_by, experts_order
from engine.kernels.fragments import INT4_LARGEST, arrange_experts, arranged, fit
from engine.kernels.operands import taken
from engine.kernels.readers import Experts
from engine.kernels.weights import (
    E2M1,
    FragmentWeight,
    Int4Weight,
    Nvfp4Weight,
    Weight,
    dense,
    expert,
    nbytes,
    shape,
)
from tests.engine.kernel_inputs import ON_HOPPER, assert_near, randn, random_weight

CPU = torch.device("cpu")
FORMS = ("nvfp4", "int4")


def four_bit(form: str, *sizes: int, seed: int, device: torch.device = CPU) -> Nvfp4Weight | Int4Weight:
    weight = random_weight(form, *sizes, seed=seed, device=device)
    assert isinstance(weight, Nvfp4Weight | Int4Weight)
    return weight


@pytest.mark.parametrize("form", FORMS)
def test_fragments_stand_for_the_same_in_the_same_memory(form: str) -> None:
    weight = four_bit(form, 20, 128, 192, seed=0)
    meant, size, places = dense(weight, torch.float32), nbytes(weight), {part.data_ptr() for part in tensors(weight)}
    fragments = arranged(weight)
    assert torch.equal(dense(fragments, torch.float32), meant)
    assert torch.equal(dense(expert(fragments, 17), torch.float32), meant[17])
    assert shape(fragments) == (20, 128, 192)
    assert nbytes(fragments) == size
    assert {part.data_ptr() for part in tensors(fragments)} == places


def tensors(weight: Weight) -> list[Tensor]:
    return [part for part in vars(weight).values() if isinstance(part, Tensor)]


def test_scales_without_a_place_among_the_fragments() -> None:
    weight = four_bit("nvfp4", 1, 128, 64, seed=0)
    weight.block_scale.view(torch.uint8)[0, 0] = torch.tensor([0, 0x80, 0x83, 0xFE])  # zeros, and negative ones
    meant = dense(weight, torch.float32)
    assert torch.equal(dense(arranged(weight), torch.float32), meant)


def test_words_are_where_threads_want_them() -> None:
    columns, rows = torch.arange(64), torch.arange(128)
    for column, row in ((0, 0), (9, 3), (38, 24), (63, 127)):
        packed = torch.zeros(1, 128, 32, dtype=torch.uint8)
        packed[0, row, column // 2] = 7 << 4 * (column % 2)
        scale = torch.ones(1, 128, 4).to(torch.float8_e4m3fn)
        fragments = arranged(Nvfp4Weight(packed, scale, torch.ones(1, 128)))
        block, inside = row // 64, row % 64
        thread = inside // 16 * 32 + inside % 8 * 4 + column // 8 % 4
        word = thread * 4 + inside // 8 % 2 * 2 + column // 32
        assert fragments.words[0].nonzero().tolist() == [[block, 0, word]]
        assert dense(fragments, torch.float32)[0].nonzero().tolist() == [[rows[row], columns[column]]]
        assert dense(fragments, torch.float32).max() == E2M1[7]


def test_what_does_not_fit_stays() -> None:
    large = Int4Weight(torch.zeros(1, 128, 32, dtype=torch.uint8), torch.full((1, 128, 2), INT4_LARGEST).bfloat16())
    down = four_bit("int4", 1, 128, 64, seed=0)
    assert fit(down, down)
    assert not fit(down, large)
    assert not fit(four_bit("nvfp4", 1, 64, 64, seed=0), down)  # a program has two blocks of rows
    assert not fit(four_bit("int4", 1, 128, 96, seed=0), down)
    weights: dict[str, Weight] = {
        "layers.0.expert_gate_up": down, "layers.0.expert_down": large, "layers.1.expert_gate_up": torch.ones(1),
        "layers.1.expert_down": torch.ones(1), "layers.2.expert_gate_up": four_bit("nvfp4", 1, 128, 64, seed=1),
        "layers.2.expert_down": four_bit("int4", 1, 128, 64, seed=1),
    }  # fmt: skip
    before = dict(weights)
    arrange_experts(weights)
    changed = {name for name in weights if weights[name] is not before[name]}
    assert changed == {"layers.2.expert_gate_up", "layers.2.expert_down"}
    assert all(isinstance(weights[name], FragmentWeight) for name in changed)
    again = dict(weights)
    arrange_experts(weights)  # several models share them
    assert all(weights[name] is again[name] for name in weights)


CHOICES = {
    "random": torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row))[:4] for row in range(70)]),
    "one row": torch.tensor([[3, 9]]),
    "one expert has all": torch.full((150, 1), 5),
    "two of many": torch.tensor([[15, 0]] * 33),
}


@pytest.mark.parametrize("tile", [pytest.param(tile, marks=ON_HOPPER) for tile in (32, 64, 128)])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("gate_up", "down"), [("nvfp4", "nvfp4"), ("int4", "int4"), ("int4", "nvfp4")])
@pytest.mark.parametrize("sizes", [(256, 128), (384, 192), (2816, 704)])
def test_experts_by_fragments(tile: int, name: str, gate_up: str, down: str, sizes: tuple[int, int]) -> None:
    device = torch.device("cuda")
    hidden, width = sizes
    chosen = CHOICES[name].to(device)
    rows, active = chosen.shape
    x = randn(rows, hidden, device=device)
    pair = (
        four_bit(gate_up, 16, 2 * width, hidden, seed=1, device=device),
        four_bit(down, 16, hidden, width, seed=2, device=device),
    )
    expected = reference.experts(x, chosen, Experts(*pair, active))
    which = Experts(arranged(pair[0]), arranged(pair[1]), active)
    result = experts_by(ExpertWay(tile), x, chosen, which)
    assert_near(result, expected)
    assert torch.equal(experts_by(ExpertWay(tile), x, chosen, which), result)
    in_order = taken(x, experts_order(which, ExpertWay(tile)))
    assert isinstance(in_order, Tensor)
    assert torch.equal(in_order.sort(dim=-1).values, x.sort(dim=-1).values)


@pytest.mark.parametrize("value", [pytest.param(float(value), marks=ON_HOPPER) for value in ("inf", "-inf", "nan")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    device = torch.device("cuda")
    chosen = CHOICES["random"].to(device)
    x = randn(70, 256, device=device)
    gate_up, down = (four_bit("nvfp4", 16, *size, seed=1, device=device) for size in ((256, 256), (256, 128)))
    which = Experts(arranged(gate_up), arranged(down), 4)
    clean = experts(x, chosen, which)
    x[4, 7] = value
    spoiled = experts(x, chosen, which)
    others = torch.arange(70, device=device) != 4
    assert not spoiled[4].isfinite().all()
    assert torch.equal(spoiled[others], clean[others])
