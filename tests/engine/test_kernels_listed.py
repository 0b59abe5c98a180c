"""What start-up may choose is listed, and so compiled ahead of time: products, and the joins that write for them.

Start-up chooses here for every chip, at the model's shapes, among weights that take no memory; whatever it launches to
choose, and the joins beside any choice, is noted instead of run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import choosing, experts, experts_hopper, grouped, linears, norms, rounding, unpacking
from engine.kernels.catalog import KernelCase
from engine.kernels.chips import HOPPER, SHARED_LIMIT
from engine.kernels.choosing import Choices, Run, choose
from engine.kernels.grouped import CLASSES, E4M3_CHIPS
from engine.kernels.readers import Entrance, Experts, Mlp
from engine.kernels.routing import Schedule
from engine.kernels.triton_ops import by_choice
from engine.kernels.weights import Fp8Weight, FragmentWeight, Int4Weight, Nvfp4Weight, Weight

MODULES = (experts, experts_hopper, linears, norms, rounding, unpacking)
WIDTH, INNER, COUNT, ACTIVE = 2816, 704, 128, 8
SHAPES = {
    "qkv": (8192, WIDTH),
    "out": (WIDTH, 4096),
    "gate_up": (2 * 2112, WIDTH),
    "down": (WIDTH, 2112),
    "expert_gate_up": (COUNT, 2 * INNER, WIDTH),
    "expert_down": (COUNT, WIDTH, INNER),
}
KINDS = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}

Seen = tuple[Any, dict[str, Any], tuple[str, ...], int, int | None]  # kernel, constants, pointers, warps, registers


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(form: str, *shape: int) -> Weight:
    *outer, width = shape
    if form == "plain":
        return empty(*shape)
    if form == "fp8":
        return Fp8Weight(empty(*shape, dtype=torch.float8_e4m3fn), empty(*outer, dtype=torch.float32))
    packed, row_scale = empty(*outer, width // 2, dtype=torch.uint8), empty(*outer, dtype=torch.float32)
    if form == "nvfp4":
        return Nvfp4Weight(packed, empty(*outer, width // 16, dtype=torch.float8_e4m3fn), row_scale)
    return Int4Weight(packed, empty(*outer, width // 32))


def fragments(form: str, *shape: int) -> FragmentWeight:
    count, out, width = shape
    words, scale = (empty(count, out // 64, width // 64, size, dtype=torch.int32) for size in (512, 64))
    return FragmentWeight(form, words, scale, empty(count, out, dtype=torch.float32) if form == "nvfp4" else None)


def layers(chip: int) -> list[dict[str, Weight]]:
    """One a format; for Hopper those whose experts lie as fragments too."""
    found = [
        {kind: weight(form, *shape) for kind, shape in SHAPES.items()} for form in ("plain", "fp8", "nvfp4", "int4")
    ]
    if chip == HOPPER:
        for form in ("nvfp4", "int4"):
            found.append({kind: weight(form, *shape) for kind, shape in SHAPES.items()})
            found[-1] |= {kind: fragments(form, *SHAPES[kind]) for kind in ("expert_gate_up", "expert_down")}
    return found


def favouring(words: str) -> Callable[[Sequence[Run]], tuple[float, Tensor]]:
    """A timer for which ways with this in their name are fast. Each is done once."""

    def timer(runs: Sequence[Run]) -> tuple[float, Tensor]:
        runs[0]()
        way = next(part for part in runs[0].args if isinstance(part, linears.Way | experts.ExpertWay))  # type: ignore[attr-defined]
        return 1.0 if words in str(way) else 10.0, torch.ones(1)

    return timer


def launches(chip: int, monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """All that start-up launches on a chip to choose, and the joins beside each of these choices."""
    seen: list[Seen] = []

    def note(kernel: Any, grid: object, *given: Any, **options: Any) -> None:
        warps, registers = options.pop("num_warps"), options.pop("maxnreg", None)
        options.pop("num_stages", None)
        pointers = tuple(KINDS[each.dtype] for each in given if isinstance(each, Tensor))
        if not any(known[:3] == (kernel, options, pointers) for known in seen):
            seen.append((kernel, options, pointers, warps, registers))

    for module in (*MODULES, grouped):
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda kernel, grid: partial(note, kernel, grid))
        if hasattr(module, "chip_of"):
            monkeypatch.setattr(module, "chip_of", lambda device: chip)
    monkeypatch.setattr(choosing, "chip_of", lambda device: chip)
    monkeypatch.setattr(choosing, "_rows", lambda like, rows, width: empty(rows, width))
    monkeypatch.setattr(choosing, "_sparse_is_faster", lambda *_: False)
    monkeypatch.setattr(experts, "schedule", a_schedule)
    found = layers(chip)
    named = {f"layers.{at}.{kind}": each for at, layer in enumerate(found) for kind, each in layer.items()}
    named |= {f"layers.{at}.router": empty(COUNT, WIDTH) for at in range(len(found))}
    named["embedding"] = empty(256, WIDTH)
    for eight_bit, words in product((False, True), ("tiles", "parts", "tiles of 32", "tiles of 64", "library")):
        timer = favouring(words)
        choices = choose(named, active=ACTIVE, canvas=256, scale=1.0, eight_bit=eight_bit, time=timer)
        assert not any("refused" in line for line in choices.told)
        joins(found, choices)
        products(found, choices)
    joins(found, Choices())  # what goes by tiles since all else was refused
    products(found, Choices())
    return seen


def a_schedule(chosen: Tensor, count: int, tile: int) -> Schedule:
    order, expert, start, rows = (empty(chosen.numel(), dtype=torch.int32) for _ in range(4))
    return Schedule(order=order, expert=expert, start=start, rows=rows, tile=tile)


def joins(found: Sequence[dict[str, Weight]], choices: Choices) -> None:
    """Both joins of every layer, the experts' matrices being any other's."""
    ops, norm = by_choice(choices), empty(WIDTH, dtype=torch.float32)
    for (one, other), rows in product(product(found, repeat=2), CLASSES):
        x, shares = empty(rows, WIDTH), empty(rows, ACTIVE, dtype=torch.float32)
        mlp = Entrance(norm, Mlp(one["gate_up"], one["down"]))
        mixture = Entrance(norm, Experts(other["expert_gate_up"], other["expert_down"], ACTIVE))
        ops.join_attention(x, x, norm, mlp, mixture, norm, 1e-6)
        modes = empty(rows, dtype=torch.int32)
        following = Entrance(norm, one["qkv"])
        ops.join_layer(x, x, empty(rows, ACTIVE, WIDTH), shares, norm, norm, norm, norm, modes, following, 1e-6)


def products(found: Sequence[dict[str, Weight]], choices: Choices) -> None:
    """Both MLPs, the second matrix being any other's; fragments are laid out for both matrices or for none."""
    ops = by_choice(choices)
    for (one, other), rows in product(product(found, repeat=2), CLASSES):
        x, chosen = empty(rows, WIDTH), empty(rows, ACTIVE, dtype=torch.int64)
        ops.gated_mlp(x, Mlp(one["gate_up"], other["down"]))
        mixture = one["expert_gate_up"], other["expert_down"]
        if isinstance(mixture[0], FragmentWeight) == isinstance(mixture[1], FragmentWeight):
            ops.experts(x, chosen, Experts(*mixture, ACTIVE))


def lists(case: KernelCase, chip: int, seen: Seen) -> bool:
    kernel, constants, pointers, warps, registers = seen
    kinds = [case.signature[name] for name in kernel.arg_names if name in case.signature]
    told = tuple(kind[1:].removesuffix(":16") for kind in kinds if kind.startswith("*"))
    same = case.kernel is kernel and dict(case.constants) == constants and told == pointers
    return same and chip in case.chips and (case.num_warps, case.most_registers) == (warps, registers)


@pytest.mark.parametrize("chip", SHARED_LIMIT)
def test_what_start_up_may_choose_is_listed(chip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for module in MODULES for case in module.cases()]
    seen = launches(chip, monkeypatch)
    assert {kernel.__name__ for kernel, *_ in seen} >= {"join_attention_kernel", "gated_kernel", "matmul_kernel"}
    assert any("e4m3" in known[1].values() for known in seen) == (chip in E4M3_CHIPS)
    assert not [known for known in seen if not any(lists(case, chip, known) for case in cases)]
