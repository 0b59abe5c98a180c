"""Which compilations stand for all of them where there is no time for all.

Knows kernels only as what `catalog` says of them, and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from itertools import combinations
from math import prod

from engine.kernels.catalog import KernelCase
from engine.kernels.chips import SHARED_LIMIT

Compilation = tuple[KernelCase, tuple[int, ...]]  # a kernel, and chips for which it is compiled at once


def pairwise(compilations: Collection[Compilation]) -> list[Compilation]:
    """Enough of them that whatever `covered` says of any of them is so of one here; the largest first.

    So there is every function for every chip that it is for, every format of weights for every chip, every pair of
    values that two parameters of a function have, and of all that a chip gets of a function and format the largest.
    Kernels that bound their own registers are all here, since they are closest to spilling.
    """
    found, seen = [], set[Hashable]()
    for case, chips in sorted(compilations, key=_size, reverse=True):
        brought = set(covered(case, chips))
        if case.most_registers is not None or not brought <= seen:
            seen |= brought
            found.append((case, chips))
    return found


def covered(case: KernelCase, chips: tuple[int, ...]) -> Iterable[Hashable]:
    """What one compilation shows to work: a function on a chip, a format of weights there, pairs of parameters."""
    for chip in chips:
        yield case.kernel, chip, case.constants.get("FORMAT")  # of weights, which chips decode in ways of their own
    for pair in combinations(sorted(parameters(case).items()), 2):
        yield case.kernel, pair


def parameters(case: KernelCase) -> dict[str, Hashable]:
    """Whatever is decided about a kernel before it is compiled, chips aside."""
    return {**case.constants, **case.signature, "num_warps": case.num_warps, "num_stages": case.num_stages}


def _size(compilation: Compilation) -> tuple[int, int, int]:
    """Grows with the shared memory and registers that a kernel needs; then with how many chips are done at once; then
    with how scarce shared memory is."""
    case, chips = compilation
    sizes = (value for value in case.constants.values() if type(value) is int and value > 0)
    return prod(sizes) * case.num_stages, len(chips), -min(SHARED_LIMIT[chip] for chip in chips)
