"""What is compiled by default leaves out no function, no chip, no format of weights, and no pair of parameters."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import Any

import pytest

from engine.kernels import grouped, linears, routing
from engine.kernels.ahead_of_time import CHIPS, MODULES, all_cases, compilations
from engine.kernels.catalog import KernelCase
from engine.kernels.coverage import Compilation, pairwise

FORMATS = ("plain", "fp8", "e4m3", "nvfp4", "int4")


@pytest.fixture(scope="module")
def chosen() -> list[Compilation]:
    return pairwise(compilations())


def test_fewer_are_chosen(chosen: list[Compilation]) -> None:
    assert len(chosen) < 0.6 * len(compilations())


@pytest.mark.parametrize("chip", CHIPS)
def test_every_function_is_compiled_for_every_chip_it_is_for(chosen: list[Compilation], chip: int) -> None:
    compiled = {case.kernel for case, chips in chosen if chip in chips}
    assert compiled == {case.kernel for case in all_cases() if chip in case.chips}
    assert len(compiled) > 20


@pytest.mark.parametrize("module", [cases.__module__ for cases in MODULES])
def test_every_module_has_kernels_chosen(chosen: list[Compilation], module: str) -> None:
    cases = next(cases for cases in MODULES if cases.__module__ == module)
    assert {case.name for case in cases()} & {case.name for case, _ in chosen}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_multiplied_on_every_chip_that_can(chosen: list[Compilation], form: str) -> None:
    on = defaultdict(set)
    for case, chips in chosen:
        if case.constants.get("FORMAT") == form:
            on[case.kernel.__name__].update(chips)
    can = grouped.E4M3_CHIPS if form == "e4m3" else CHIPS
    assert on["gated_kernel"] == on["matmul_kernel"] == set(can)


def test_every_pair_of_parameters_is_compiled(chosen: list[Compilation]) -> None:
    def pairs(cases: list[KernelCase]) -> set[Any]:
        return {
            (case.kernel, *pair)
            for case in cases
            for pair in combinations([*case.constants.items(), *case.signature.items()], 2)
        }

    assert pairs([case for case, _ in chosen]) == pairs(all_cases())


def test_the_largest_tile_of_each_format_is_compiled_for_every_chip(chosen: list[Compilation]) -> None:
    def largest(compilations: list[Compilation]) -> dict[tuple[Any, str, tuple[int, ...]], int]:
        found: dict[tuple[Any, str, tuple[int, ...]], int] = defaultdict(int)
        for case, chips in compilations:
            if {"FORMAT", "BM", "BN"} <= case.constants.keys():
                key = case.kernel, case.constants["FORMAT"], chips
                found[key] = max(found[key], case.constants["BM"] * case.constants["BN"])
        return found

    assert largest(chosen) == largest(compilations())


def test_whatever_bounds_its_registers_is_compiled(chosen: list[Compilation]) -> None:
    bounded = {case.name for case in all_cases() if case.most_registers is not None}
    assert len(bounded) > 8
    assert bounded <= {case.name for case, _ in chosen}


def test_what_brings_nothing_new_is_left_out() -> None:
    kernel = linears.join_kernel
    small, large, other = (
        KernelCase(name=name, kernel=kernel, signature={"x": "*bf16"}, constants={"A": a, "B": b}, num_warps=4)
        for name, a, b in (("small", 1, 1), ("large", 2, 2), ("other", 1, 2))
    )
    routed = KernelCase(name="routed", kernel=routing.schedule_kernel, signature={}, constants={"A": 1}, num_warps=4)
    every = [(case, (80,)) for case in (small, large, other, routed, small)]
    assert [case.name for case, _ in pairwise(every)] == ["large", "other", "small", "routed"]
    assert [chips for _, chips in pairwise([(small, (80,)), (small, (90,))])] == [(80,), (90,)]
