"""Start-up with a cold and with a warm kernel cache: the same bench twice, in processes that share an empty cache.

A process cannot measure its own cold start once it has run a kernel. Knows nothing of what is started.
Invariant: the cache of the user is neither read nor written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.interface import EngineError
from engine.measure.figure import Figure
from engine.measure.options import BenchOptions

SECONDS = 300.0  # until a start that does not end is given up
CACHE = "TRITON_CACHE_DIR"


def kernels_on_disk() -> int:
    """Entries of Triton's cache on disk."""
    folder = Path(os.environ.get(CACHE) or Path.home() / ".triton" / "cache")
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def start_up_figures(options: BenchOptions, form: str) -> list[Figure]:
    """Seconds from weights in memory to a server that is ready: cold, then warm. Raises EngineError."""
    figures = []
    with tempfile.TemporaryDirectory(prefix="easel-kernels-") as cache:
        for state in ("cold", "warm"):
            found = _start(options, form, cache)
            figures.append(
                Figure(
                    key=f"start_up@{state}",
                    title=f"weights to ready, {state} kernel cache",
                    value=found["value"],
                    unit="s",
                    detail={"kernels_compiled": found["kernels_compiled"]},
                )
            )
    return figures


def _start(options: BenchOptions, form: str, cache: str) -> dict[str, float]:
    command = [
        sys.executable,
        *("-m", "engine.measure", "--shape", options.shape, "--format", form, "--only", "start"),
        *("--device", options.device, "--dtype", options.dtype, "--kernels", options.kernels),
    ]
    try:
        done = subprocess.run(
            command, env=os.environ | {CACHE: cache}, capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"a start took more than {SECONDS:.0f} s") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or "no message").splitlines()[-1]
        raise EngineError(f"a start ended with status {error.returncode}: {last}") from None
    figure: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["runs"][0]["figures"]["start"]
    return figure
