"""Looks at the disk: whether a model that is still to be downloaded has room, and whether what is kept can be written.

Knows the folders of the hub's client and of Triton, and the sizes of the published checkpoint; asks no network, so of
a model that is not here it knows no more than the size of each format. Invariant: nothing is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine import memory_plans
from server.check import GB, Finding

_ROOM_FOR_KERNELS = 1 * GB


def check_disk(model: str, *, gpu: bool) -> Iterator[Finding]:
    """Findings about the folder that models are downloaded into and, with a GPU, that of the compiled kernels."""
    from huggingface_hub.constants import HF_HUB_CACHE

    models = Path(HF_HUB_CACHE)
    here = Path(model).is_dir() or downloaded(model) is not None
    yield check_models_folder(models, None if here else model)
    if gpu:
        kernels = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
        yield check_kernels_folder(Path(kernels))


def check_models_folder(folder: Path, wanted: str | None) -> Finding:
    """Whether there is room for the published checkpoint, `wanted` by name or not."""
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    what = f"Disk: {free / GB:.1f} GB free in {folder}"
    if wanted is None and not os.access(place, os.W_OK):
        return Finding("note", f"Disk: nothing can be downloaded into {folder}", "To do so, set HF_HOME.")
    if not os.access(place, os.W_OK):
        what = f"Disk: {wanted} is to be downloaded into {folder}, which cannot be written"
        return Finding("problem", what, "Set HF_HOME to a folder that can, or change who owns this one.")
    sizes = {plan.format: plan.weights for plan in memory_plans(None) if "," not in plan.format}
    fitting = [f"{name} {size / GB:.1f} GB" for name, size in sizes.items() if size < free]
    if len(fitting) == len(sizes):
        return Finding("good", f"{what}, enough for a checkpoint of any format")
    if fitting:
        return Finding("note", f"{what}, enough for a checkpoint of these formats: {', '.join(fitting)}")
    least = f"the smallest checkpoint takes {min(sizes.values()) / GB:.1f} GB"
    advice = "To download one, free some, or set HF_HOME to a folder on a larger disk."
    return Finding("note" if wanted is None else "problem", f"{what}, and {least}", advice)


def check_kernels_folder(folder: Path) -> Finding:
    """Whether compiled kernels can be kept; without that, none can run."""
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        what, advice = f"Compiled kernels are kept in {folder}, which cannot be written", "Set TRITON_CACHE_DIR."
        return Finding("problem", what, advice)
    if free < _ROOM_FOR_KERNELS:
        what = f"Compiled kernels are kept in {folder}, which has {free / GB:.2f} GB free"
        return Finding("problem", what, "Free a gigabyte there, or set TRITON_CACHE_DIR.")
    return Finding("good", f"Compiled kernels are kept in {folder}")


def downloaded(model: str) -> Path | None:
    """The folder of a hub id's downloaded copy, if there is one."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
