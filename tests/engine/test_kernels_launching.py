"""Kernels compiled ahead: nothing is launched meanwhile, threads share the work, and no failure is lost.

The interpreter compiles nothing, so what Triton does is tried in a process of its own, for a chip that is not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from engine.kernels.launching import compiling, only_compiling
from engine.kernels.norms import rms_norm
from tests.engine.kernel_inputs import randn

CPU = torch.device("cpu")
KERNELS = Path(__file__).resolve().parents[2] / "engine" / "kernels"

DRIVER = """
import threading
import torch, triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from engine.kernels import launching
from engine.kernels.launching import compiling, launch

launched, made = [], []
on_made = lambda: None


class Launcher:
    def __init__(self, source, metadata):
        made.append(threading.current_thread() is threading.main_thread())
        on_made()

    def __call__(self, *args):
        launched.append(args)


class Utils:
    @staticmethod
    def get_device_properties(device):
        return {"max_shared_mem": 232448}

    @staticmethod
    def load_binary(name, kernel, shared, device):
        return "module", "function", 32, 0, 1024


class Driver:
    launcher_cls, utils = Launcher, Utils
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


driver.set_active(Driver())
"""

COMPILED = """
together = threading.Barrier(2, timeout=60)


def on_made():
    if len(made) <= 2:
        together.wait()  # nobody passes alone


@triton.jit
def first_kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)


@triton.jit
def second_kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 2.0)


@triton.jit
def failing_kernel(x, N: tl.constexpr):
    tl.static_assert(N == 1, "this cannot be compiled")


launching._processors = lambda: 2
x = torch.zeros(64)
with compiling():
    for kernel in (first_kernel, second_kernel, failing_kernel, first_kernel):
        launch(kernel, (1,))(x, N=64, num_warps=2)
assert made == [False, False] and not launched, (made, launched)
assert threading.active_count() == 1

first_kernel.compile = second_kernel.compile = None  # from now on there is nothing left to compile
for kernel in (first_kernel, second_kernel):
    compiled = launch(kernel, (1,))(x, N=64, num_warps=2)
    assert compiled.metadata.num_warps == 2
assert len(launched) == 2 and made[2:] == [True, True]
for _ in range(2):
    try:
        launch(failing_kernel, (1,))(x, N=64, num_warps=2)
    except triton.CompilationError as error:
        assert "this cannot be compiled" in str(error)
    else:
        raise AssertionError("it was launched")
"""


def run_without_chip(code: str, tmp_path: Path) -> None:
    """Run `code` after DRIVER, in a process that compiles Triton's kernels whatever this one does."""
    script = tmp_path / "compiled.py"  # Triton reads the source of its kernels
    script.write_text(DRIVER + code, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": f"{KERNELS.parents[1]}:{environment.get('PYTHONPATH', '')}",
    }
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_launched_where_kernels_are_only_compiled() -> None:
    x, weight = randn(4, 64, device=CPU), torch.ones(64)
    expected = rms_norm(x, weight, 1e-6)
    with compiling():
        assert only_compiling()
        empty = rms_norm(x, weight, 1e-6)
    assert not only_compiling()
    assert empty.shape == expected.shape
    assert torch.equal(rms_norm(x, weight, 1e-6), expected)


def test_threads_compile_and_what_fails_there_fails_again_at_its_launch(tmp_path: Path) -> None:
    run_without_chip(COMPILED, tmp_path)


def test_every_kernel_is_launched_so_that_it_can_be_compiled_ahead() -> None:
    direct = {path.name for path in KERNELS.glob("*.py") if re.search(r"_kernel\[", path.read_text(encoding="utf-8"))}
    assert not direct, "by `launch`, which may leave it at compiling"
