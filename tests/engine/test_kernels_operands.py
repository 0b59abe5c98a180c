"""Rows that joins hand over: the op set takes them as it takes plain ones, and refuses what came for another."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from engine.kernels import norms
from engine.kernels.choosing import Choices
from engine.kernels.experts import ExpertWay, mixture_of
from engine.kernels.grouped import EightBit
from engine.kernels.linears import TILES, Way, product_of
from engine.kernels.operands import PLAIN, Operand, Order, Ordered, plain_rows, taken
from engine.kernels.readers import Entrance, Experts, Mlp
from engine.kernels.reference import Ops
from engine.kernels.triton_ops import by_choice
from engine.kernels.weights import Weight
from tests.engine.kernel_inputs import randn, random_weight, skip_without_eight_bit

# numpy, which the interpreter computes with, warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
ROWS, HIDDEN, WIDTH, EXPERTS, ACTIVE, EPS = 5, 128, 64, 8, 3, 1e-6
# The form of dense weights, a way to multiply by them, what their rows come as; the same of the experts.
CHOSEN = [
    ("plain", TILES, Tensor, "plain", ExpertWay(32), Tensor),
    ("plain", TILES, Tensor, "nvfp4", ExpertWay(32), Ordered),
    ("fp8", TILES, Ordered, "fp8", ExpertWay(32), Ordered),
    ("fp8", Way("e4m3"), EightBit, "fp8", ExpertWay(32, True), EightBit),
    ("fp8", Way("e4m3", 2), EightBit, "nvfp4", ExpertWay(64), Ordered),
    ("fp8", Way("library"), EightBit, "plain", ExpertWay(32), Tensor),
    ("nvfp4", Way("tiles", 3), Ordered, "fp8", ExpertWay(64, True), EightBit),
    ("int4", Way("unpacked"), Ordered, "int4", ExpertWay(64), Ordered),
    ("nvfp4", TILES, Ordered, "nvfp4", ExpertWay(128), Ordered),
]


def layer(ops: Ops, x: Tensor, weights: dict[str, Weight]) -> tuple[list[Operand], list[Tensor]]:
    """What the joins of a layer hand over, and all that is computed from it."""
    vectors = [randn(HIDDEN, seed=20 + seed, device=x.device, dtype=torch.float32) for seed in range(7)]
    mlp = Mlp(weights["gate_up"], weights["down"])
    which = Experts(weights["expert_gate_up"], weights["expert_down"], ACTIVE)
    h, mlp_input, experts_input, router_input = ops.join_attention(
        x, x.flip(0), vectors[0], Entrance(vectors[1], mlp), Entrance(vectors[2], which), vectors[3], EPS
    )
    chosen = torch.stack([torch.arange(ACTIVE) * 2 + row % 3 for row in range(ROWS)]).to(x.device)
    shares = randn(ROWS, ACTIVE, seed=30, device=x.device, dtype=torch.float32)
    dense = ops.gated_mlp(mlp_input, mlp)
    parts = ops.experts(experts_input, chosen, which)
    scalars, modes = torch.ones(2, device=x.device), torch.zeros(ROWS, dtype=torch.int32, device=x.device)
    following = Entrance(vectors[4], weights["qkv"])
    out, normed = ops.join_layer(h, dense, parts, shares, *vectors[4:], scalars, modes, following, EPS)
    computed = [h, router_input, dense, parts, out, ops.linear(normed, weights["qkv"])]
    return [mlp_input, experts_input, normed], computed


@pytest.mark.parametrize(("form", "way", "comes", "expert_form", "expert_way", "expert_comes"), CHOSEN)
def test_rows_that_are_handed_over_change_no_result(
    form: str,
    way: Way,
    comes: type,
    expert_form: str,
    expert_way: ExpertWay,
    expert_comes: type,
    device: torch.device,
) -> None:
    if way.eight_bit or expert_way.eight_bit:
        skip_without_eight_bit(device)
    shapes = {"qkv": (192, HIDDEN), "gate_up": (2 * WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    weights = {kind: random_weight(form, *shape, seed=1, device=device) for kind, shape in shapes.items()}
    for kind in ("gate_up", "down"):
        weights[f"expert_{kind}"] = random_weight(expert_form, EXPERTS, *shapes[kind], seed=2, device=device)
    which = Experts(weights["expert_gate_up"], weights["expert_down"], ACTIVE)
    linears = {product_of(weights[kind], ROWS, gated=kind == "gate_up"): way for kind in shapes}
    ops = by_choice(Choices(linears, {mixture_of(which, ROWS): expert_way}))
    apart = replace(
        ops,
        join_attention=partial(norms.join_attention, orders=lambda *_: PLAIN),
        join_layer=partial(norms.join_layer, orders=lambda *_: PLAIN),
    )
    x = randn(ROWS, HIDDEN, device=device)
    handed_over, found = layer(ops, x, weights)
    assert [type(each) for each in handed_over] == [comes, expert_comes, comes]
    plain, expected = layer(apart, x, weights)
    assert all(isinstance(each, Tensor) for each in plain)
    for mine, same in zip(found, expected, strict=True):
        assert torch.equal(mine, same)


def test_what_came_for_another_is_refused(device: torch.device) -> None:
    x = Ordered(randn(2, 128, device=device), Order("nvfp4", 64))
    with pytest.raises(ValueError, match="rows came as"):
        taken(x, Order("nvfp4", 128))
    with pytest.raises(ValueError, match="rows came as"):
        taken(x, PLAIN)
    with pytest.raises(TypeError, match="expected plain rows"):
        plain_rows(x)
