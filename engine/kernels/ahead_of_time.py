"""Compiles kernels for chips that are not here and says what they need: `python -m engine.kernels.ahead_of_time`.

Needs no GPU. Compiles all that start-up may choose, or with `--pairwise` what stands for all (see `coverage`).
Registers and spills are what Triton's own assembler reports of the machine code; a kernel that does not compile or does
not fit a chip's shared memory makes the command fail. Launches nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource

from engine.kernels import (
    attention,
    attention_hopper_256,
    attention_hopper_512,
    experts,
    experts_hopper,
    linears,
    noise,
    norms,
    output,
    rounding,
    routing,
    soft_embedding,
    unpacking,
)
from engine.kernels.catalog import KernelCase
from engine.kernels.chips import SHARED_LIMIT
from engine.kernels.coverage import Compilation, pairwise

MODULES: tuple[Callable[[], list[KernelCase]], ...] = (
    routing.cases,
    experts.cases,
    experts_hopper.cases,
    linears.cases,
    rounding.cases,
    unpacking.cases,
    attention.cases,
    attention_hopper_256.cases,
    attention_hopper_512.cases,
    norms.cases,
    noise.cases,
    output.cases,
    soft_embedding.cases,
)
CHIPS = tuple(SHARED_LIMIT)
# What Triton asks of a chip tells those of a group apart only where 8-bit floats are multiplied or converted. Of a
# kernel without any it makes the same PTX for all of a group, but for the chip's name: so that is made once, and
# assembled for each. A chip asked for alone gets PTX of its own; the tests compare.
ALIKE = ((80, 86, 89), (120, 121))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one kernel needs on one chip. Registers and spills are None where the tools to ask are missing."""

    name: str
    chip: int
    shared: int  # bytes
    registers: int | None  # of a thread
    spilled: int | None  # bytes of a thread


def all_cases() -> list[KernelCase]:
    """Every kernel of every module. ValueError if two have one name."""
    found = [case for cases in MODULES for case in cases()]
    names = [case.name for case in found]
    if len(set(names)) != len(names):
        raise ValueError(f"two kernels are called {next(name for name in names if names.count(name) > 1)}")
    return found


def compile_alike(case: KernelCase, chips: Sequence[int]) -> list[Needs]:
    """Compile for chips with the same PTX. Raises what Triton raises; ValueError if shared memory exceeds the limit of
    one of them."""
    first, *others = chips
    compiled = lowered(case, first)
    cubins = {first: compiled.asm["cubin"]} | {chip: _assembled(case, compiled.asm["ptx"], chip) for chip in others}
    shared = int(compiled.metadata.shared)
    return [_needs(case, chip, shared, cubin) for chip, cubin in cubins.items()]


def lowered(case: KernelCase, chip: int) -> CompiledKernel:
    """All that Triton makes of a kernel for a chip, from source to machine code."""
    signature = {name: kind.partition(":")[0] for name, kind in case.signature.items()}
    signature |= dict.fromkeys(case.constants, "constexpr")
    order = case.kernel.arg_names
    aligned = [name for name, kind in case.signature.items() if kind.endswith(":16")]
    sort = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = sort(
        fn=case.kernel,
        signature={name: signature[name] for name in order},
        constexprs=dict(case.constants),
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=_options(case))


def _options(case: KernelCase) -> dict[str, Any]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.most_registers}


def _assembled(case: KernelCase, ptx: str, chip: int) -> bytes:
    """Machine code for a chip, of PTX that differs from the chip's own in its target only."""
    backend = make_backend(GPUTarget("cuda", chip, 32))
    own = re.sub(r"^\.target sm_\d+", f".target sm_{chip}", ptx, count=1, flags=re.MULTILINE)
    cubin: bytes = backend.make_cubin(own, {}, backend.parse_options(_options(case)), chip)
    return cubin


def _needs(case: KernelCase, chip: int, shared: int, cubin: bytes) -> Needs:
    if shared > SHARED_LIMIT[chip]:
        raise ValueError(f"{case.name} needs {shared} bytes of shared memory, sm_{chip} has {SHARED_LIMIT[chip]}")
    registers, spilled = resources(cubin)
    return Needs(name=case.name, chip=chip, shared=shared, registers=registers, spilled=spilled)


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and spilled bytes of a thread, in machine code; None where the tool that tells is missing."""
    spec = find_spec("triton.backends.nvidia")
    assert spec is not None and spec.submodule_search_locations
    tool = Path(next(iter(spec.submodule_search_locations))) / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout)
    return (int(found[1]), int(found[2])) if found else (None, None)


@cache
def _by_name() -> dict[str, KernelCase]:
    return {case.name: case for case in all_cases()}


def _named(name: str, chips: Sequence[int]) -> list[Needs]:
    return compile_alike(_by_name()[name], chips)


def alike(case: KernelCase, chips: Iterable[int]) -> list[tuple[int, ...]]:
    """Those of `chips` that a kernel may run on, in groups with the same PTX."""
    apart = any("fp8" in kind for kind in case.signature.values())
    groups: dict[tuple[int, ...], list[int]] = {}
    for chip in chips:
        if chip in case.chips:
            group = (chip,) if apart else next((group for group in ALIKE if chip in group), (chip,))
            groups.setdefault(group, []).append(chip)
    return [tuple(group) for group in groups.values()]


def compilations(chips: Sequence[int] = CHIPS, pattern: str = "") -> list[Compilation]:
    """Every case whose name contains `pattern`, with each group of `chips` it may run on."""
    return [(case, group) for name, case in _by_name().items() if pattern in name for group in alike(case, chips)]


def compile_all(wanted: Iterable[Compilation]) -> list[Needs]:
    """In as many processes as there are processors."""
    named = [(case.name, group) for case, group in wanted]
    with ProcessPoolExecutor() as pool:  # a case holds a function of Triton's, which does not travel: its name does
        return list(chain.from_iterable(pool.map(_named, *zip(*named, strict=True)))) if named else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chip", type=int, action="append", choices=CHIPS, help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--pairwise", action="store_true", help="only those that stand for the others")
    given = parser.parse_args()
    wanted = compilations(given.chip or CHIPS, given.kernel)
    print(f"{'kernel':<52} {'chip':>5} {'registers':>9} {'spilled':>7} {'shared':>7}")
    for needs in compile_all(pairwise(wanted) if given.pairwise else wanted):
        registers, spilled = (("?" if value is None else value) for value in (needs.registers, needs.spilled))
        print(f"{needs.name:<52} {needs.chip:>5} {registers:>9} {spilled:>7} {needs.shared:>7}")


if __name__ == "__main__":
    main()
