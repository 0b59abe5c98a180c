"""How kernels are launched, and how many are compiled at a time before any is.

Triton compiles a kernel where it is first launched, one after the other and 0.4 s each. So whoever knows what it will
run first runs all of it within `compiling`: there a launch only hands its kernel to threads, and at the end every
kernel is where its launch will look for it. Threads do, since half of a compilation is another process, ptxas, and
most of the rest leaves Python's lock.

Invariant: what runs in the threads touches neither the GPU nor torch, and an error there hides nothing: that kernel
fails again where it is launched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

MOST_THREADS = 16  # with more, what does hold Python's lock decides

_compiling = ContextVar("compiling", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`: takes the kernel's arguments and options. Within `compiling` that launches nothing."""
    return partial(kernel.warmup, grid=grid) if _compiling.get() else kernel[grid]


def only_compiling() -> bool:
    """Whether this is within `compiling`."""
    return _compiling.get()


@contextmanager
def compiling() -> Iterator[None]:
    """Within, what this thread would launch is compiled instead, and all of it ready at the end. So what kernels write
    is not written, and holds anything; torch's own operations do run, and must take no indices from it."""
    # deferred: a machine without a GPU need not have triton
    from triton import AsyncCompileMode

    token = _compiling.set(True)
    try:
        # Errors are ignored only here, see above; raised here, one would also leave Triton in this mode for good.
        with _Compilers(min(MOST_THREADS, _processors())) as threads, AsyncCompileMode(threads, ignore_errors=True):
            yield
    finally:
        _compiling.reset(token)


class _Compilers(ThreadPoolExecutor):
    """The threads in which Triton compiles."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(_with_launcher, partial(fn, *args, **kwargs))


def _with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    """The compiled kernel. Triton 3.6 calls it through a C function that gcc compiles at the first launch, in a third
    of the kernel's own time. It is made here and thrown away: the launch finds it on disk. Later versions need none."""
    from triton.runtime import driver

    kernel = compile_kernel()
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _processors() -> int:
    return len(os.sched_getaffinity(0))
