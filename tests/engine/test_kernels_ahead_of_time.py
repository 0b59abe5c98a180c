"""Kernels compile for every chip and fit its shared memory and registers: checked by the command itself.

By default those that stand for the others (`coverage`); with ALL_KERNELS=1, as `make test-kernels` sets it, all.
In a process of its own, because these tests' process may interpret Triton instead of compiling it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.ahead_of_time import all_cases, compilations
from engine.kernels.coverage import pairwise

# Bytes of a thread. What only a kernel's end needs may wait in memory: gates of 4 bit, 128 rows, keep 24 numbers there.
MOST_SPILLED = 96
CHIPS = (80, 86, 89, 90, 100, 120, 121)
ALL_KERNELS = bool(int(os.environ.get("ALL_KERNELS", "0")))
ROOT = Path(__file__).resolve().parents[2]


# For the smallest kernel of each function that has been compiled, how many PTX there are for each group of chips for
# which one is made, names aside.
COMPARE = """
import re
from engine.kernels.ahead_of_time import compilations, lowered
from engine.kernels.coverage import pairwise

smallest = {(case.kernel, chips): case for case, chips in pairwise(compilations()) if len(chips) > 1}
for (_, chips), case in smallest.items():
    print(len({re.sub(r"sm_\\d+", "", lowered(case, chip).asm["ptx"]) for chip in chips}), case.name, chips)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def lines(cache: Path, *arguments: str) -> list[str]:
    """What Python says to `arguments`, while Triton compiles."""
    told = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return told.stdout.splitlines()


def per_chip() -> dict[int, set[str]]:
    """What there is for each chip, whatever the sizes of its tiles."""
    sizes = re.compile(r"\d+x\d+(x\d+)*(,\d+w\d+s|,\d)?")
    return {chip: {sizes.sub("tile", case.name) for case in all_cases() if chip in case.chips} for chip in CHIPS}


def test_every_kernel_is_for_every_chip() -> None:
    # a tile may depend on the chip, what there is a kernel for may not
    kernels = per_chip()
    assert len(kernels[90]) > 40
    # chips whose matrix units multiply no 8-bit floats do without
    eight_bit = {name for name in kernels[90] if "e4m3" in name or name.startswith("round[")}
    assert len(eight_bit) > 8
    # in Gluon, and what is for it; and rows as the dense MLP's tiles of 128 columns of 4 bit want them
    only = ("hopper", "fragment", "join_attention[nvfp4 128 and")
    hopper = {name for name in kernels[90] if any(part in name for part in only)}
    assert hopper
    missing = {chip: (eight_bit if chip < 89 else set()) | (hopper if chip != 90 else set()) for chip in CHIPS}
    assert all(names == kernels[90] - missing[chip] for chip, names in kernels.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_and_fit(cache: Path) -> None:
    arguments, wanted = ([], compilations()) if ALL_KERNELS else (["--pairwise"], pairwise(compilations()))
    rows = [line.rsplit(maxsplit=4) for line in lines(cache, "-m", "engine.kernels.ahead_of_time", *arguments)[1:]]
    assert {(row[0], int(row[1])) for row in rows} == {(case.name, chip) for case, chips in wanted for chip in chips}
    assert not [(name, chip) for name, chip, _, spilled, _ in rows if int(spilled.replace("?", "0")) > MOST_SPILLED]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chips_that_share_ptx_would_get_the_same(cache: Path) -> None:
    compared = lines(cache, "-c", COMPARE)
    assert len(compared) > 20
    assert not [line for line in compared if not line.startswith("1 ")]
