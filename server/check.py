"""Looks at this machine and says what can run here, what is wrong, and what to do about it.

Asks the driver and torch in processes of their own, so that a broken installation is a finding and not a crash.
Loads no model. Invariant: every problem carries what to do; nothing is reported that was not looked at.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import CARDS, EngineError, EngineOptions, MemoryPlan, Pools, memory_plans, planned_pools, usable
from server.address import AddressError, bind

GB = 1e9
LEAST_CAPABILITY = (8, 0)  # of a GPU that easel's kernels are compiled for
SHORT = 1024  # positions of the context that "does not fit" is about
_TORCH_PROBE = """
import json, torch
gpus = []
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        chip = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": chip.name, "capability": [chip.major, chip.minor], "total": total, "free": free})
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                  "architectures": torch.cuda.get_arch_list(), "gpus": gpus}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` says what to do and is never empty for a problem."""

    level: Literal["good", "note", "problem"]
    what: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as torch sees it; bytes of memory."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int


@dataclass(frozen=True, kw_only=True)
class Torch:
    """The installed torch. `cuda` is the version it was built for; None = built without."""

    version: str
    cuda: str | None
    architectures: tuple[str, ...]
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What the NVIDIA driver says: GPU name -> driver version, and what is wrong with it, if anything."""

    gpus: Mapping[str, str]
    trouble: str = ""


def findings(host: str, port: int, options: EngineOptions) -> Iterator[Finding]:
    """Everything about this machine, and what it has for the model of `options`; slowest last."""
    yield Finding("good", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    memory = machine_memory()
    yield Finding("good", f"CPU: {cpu_name()}, {os.cpu_count()} threads, {memory / GB:.1f} GB of memory")
    yield check_port(host, port)
    try:
        torch = probe_torch()
    except ProbeError as error:
        yield Finding(
            "problem", f"torch does not work here: {error}", "Install it anew: rm -rf .venv, then make serve."
        )
        return
    found = driver()
    if found.trouble:
        yield Finding(
            "problem",
            f"The NVIDIA driver does not answer: {found.trouble}",
            "Get nvidia-smi to list the GPU first: load the driver, or restart the machine after an update of it.",
        )
    yield from check_torch(torch, found.gpus)
    yield from check_fit(torch.gpus)
    yield from check_pools(torch.gpus, options)


def check_port(host: str, port: int) -> Finding:
    """Whether the server could listen there now."""
    try:
        bind(host, port).close()
    except AddressError as error:
        return Finding("problem", f"Port: {error}", "Stop what uses it (perhaps another easel), or use another port.")
    return Finding("good", f"Port {port} on {host} is free")


class ProbeError(Exception):
    """The probe did not answer; the message is the last thing it said."""


def probe_torch() -> Torch:
    """What the installed torch says of itself and the GPUs. Raises ProbeError."""
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise ProbeError("no answer within two minutes") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ProbeError(said[-1])
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    gpus = tuple(
        Gpu(
            name=gpu["name"],
            capability=(gpu["capability"][0], gpu["capability"][1]),
            total=gpu["total"],
            free=gpu["free"],
        )
        for gpu in facts["gpus"]
    )
    return Torch(version=facts["version"], cuda=facts["cuda"], architectures=tuple(facts["architectures"]), gpus=gpus)


def driver() -> Driver:
    """What nvidia-smi reports; nothing where there is none, or no GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return Driver(gpus={})
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(gpus={}, trouble=str(error))
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        return Driver(gpus={}, trouble="" if said.startswith("No devices") else said or f"status {done.returncode}")
    rows = (line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line)
    return Driver(gpus={name.strip(): version.strip() for name, version in rows})


def check_torch(torch: Torch, drivers: Mapping[str, str]) -> Iterator[Finding]:
    """Whether torch, its CUDA build, the driver and each GPU go together."""
    built = f"built for CUDA {torch.cuda}" if torch.cuda else "built without CUDA"
    yield Finding("good", f"torch {torch.version}, {built}")
    if drivers and not torch.cuda:
        yield Finding(
            "problem",
            f"There is a GPU ({', '.join(drivers)}), but torch was built without CUDA",
            "Install a CUDA build of torch into .venv; until then everything runs on the CPU.",
        )
    elif drivers and not torch.gpus:
        versions = ", ".join(sorted(set(drivers.values())))
        yield Finding(
            "problem",
            f"There is a GPU ({', '.join(drivers)}), but torch cannot use it with driver {versions}",
            f"Update the NVIDIA driver to one for CUDA {torch.cuda} or later, and look at CUDA_VISIBLE_DEVICES.",
        )
    elif not drivers and not torch.gpus:
        advice = "Fine for the demo model. A container sees a GPU only if it is started with one, as by docker compose."
        yield Finding("note", "No NVIDIA GPU: models run on the CPU", advice)
    for gpu in torch.gpus:
        major, minor = gpu.capability
        text = f"GPU: {gpu.name}, compute capability {major}.{minor}, driver {drivers.get(gpu.name, 'unknown')}, "
        text += f"{gpu.total / GB:.1f} GB of memory, {gpu.free / GB:.1f} GB free"
        if gpu.capability < LEAST_CAPABILITY:
            yield Finding(
                "problem",
                f"{text}; its kernels need compute capability 8.0 (Ampere) or later",
                "Use a later GPU, or the demo model on the CPU: --device cpu.",
            )
        elif runs_on(torch.architectures, gpu.capability):
            yield Finding("good", text)
        else:
            yield Finding(
                "problem",
                f"{text}; this torch holds no code for it (only {', '.join(torch.architectures)})",
                f"Install a torch build that supports compute capability {major}.{minor}.",
            )


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a torch build has code for a chip: binaries serve later minors of their major, PTX all later chips."""
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not found:
            continue
        built = (int(found[2]), int(found[3]))
        if found[4] == "a":
            fits = built == capability
        elif found[1] == "compute" and not found[4]:
            fits = built <= capability
        else:
            fits = built[0] == capability[0] and built[1] <= capability[1]
        if fits:
            return True
    return False


def check_fit(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Which format of the published checkpoint fits the largest GPU."""
    plans = memory_plans(None)
    if not gpus:
        sizes = ", ".join(f"{plan.format} {plan.weights / GB:.1f} GB" for plan in plans)
        yield Finding("note", f"The published checkpoint needs a GPU ({sizes})", "The bundled demo model runs here.")
        return
    gpu = max(gpus, key=lambda each: each.total)
    crowded = []
    for plan in plans:
        size = f"{plan.format}: {plan.weights / GB:.1f} GB of weights"
        if not plan.context(gpu.total):
            yield Finding("note", f"{size} do not fit this GPU (about {plan.needed(SHORT) / GB:.0f} GB needed)")
        elif (pools := plan.pools(gpu.free)) is None:
            crowded.append(plan.format)
        else:
            yield Finding("good", f"{size} fit this GPU, {pools_in_words(pools)}")
    if crowded:
        what = f"In use: {'; '.join(crowded)} would fit this GPU, but only {gpu.free / GB:.1f} GB are free"
        yield Finding("problem", what, "Stop what else uses the GPU (nvidia-smi lists it).")


def check_pools(gpus: Sequence[Gpu], options: EngineOptions) -> Iterator[Finding]:
    """Slots, context and pages that the model of `options` would get here, if it is a folder that can be read."""
    on_gpu = bool(gpus) and options.device != "cpu"
    memory = max(gpu.free for gpu in gpus) if on_gpu else machine_memory() // 4
    if not Path(options.model).is_dir():
        return
    try:
        pools = planned_pools(options, memory, gpu=on_gpu)
    except EngineError:  # whatever is wrong with the checkpoint is another finding
        return
    if pools is None:
        what = "The model does not fit here with these slots, this context and this memory for keys and values"
        yield Finding("problem", what, "Ask for less of one of them, or leave them out.")
    else:
        yield Finding("good", f"The model would be served here {pools_in_words(pools)}")


def pools_in_words(pools: Pools) -> str:
    """What a memory plan leaves to requests."""
    served = f"{pools.slots} requests at a time" if pools.slots > 1 else "one request at a time"
    return (
        f"with a context of up to {pools.context} and {served}; {pools.bytes / GB:.2f} GB of KV cache "
        f"({pools.full} pages of full layers, {pools.sliding} of sliding layers)"
    )


def memory_table(title: str, plans: Sequence[MemoryPlan]) -> str:
    """Formats x cards: the longest context, "-" where the model does not fit."""
    width = max(len(plan.format) for plan in plans)
    lines = [title, f"{'':{width}}  weights" + "".join(f"{f'{card} GB':>9}" for card in CARDS)]
    for plan in plans:
        contexts = (plan.context(usable(card)) for card in CARDS)
        cells = "".join(f"{f'{length // 1024}k' if length >= 1024 else length or '-':>9}" for length in contexts)
        lines.append(f"{plan.format:{width}}{f'{plan.weights / GB:.2f}':>6} GB{cells}")
    return "\n".join(lines)


def cpu_name() -> str:
    """The processor's marketing name, or the nearest thing the system knows."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def machine_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
