"""What a pass on a CPU frees stays with the process; asked in others, because it holds for the whole of one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PASSES = """
import resource, torch
from engine.host_memory import keep_freed_memory
if {asked}:
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    before = faults()
    tensors = [torch.ones(2**20) for _ in range(8)]
    del tensors
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")
def test_pages_that_a_pass_freed_are_not_new_to_the_next() -> None:
    def new_pages(*, asked: bool) -> int:
        command = [sys.executable, "-c", PASSES.format(asked=asked)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert new_pages(asked=False) > 1000, "else there is nothing to ask for"
    assert new_pages(asked=True) < 100
