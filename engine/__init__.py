"""The engine: token ids in, token ids out. Import only from here; no torch is imported until `build_engine` runs."""

from pathlib import Path

from engine.config import load_model_config, published_config
from engine.interface import (
    CanvasDone,
    CheckpointError,
    Engine,
    EngineError,
    EngineInfo,
    EngineOptions,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    QueueFull,
    RequestTooLong,
    Sampling,
    Usage,
)
from engine.memory_plan import CARDS, MemoryPlan, plans, usable


def build_engine(options: EngineOptions) -> Engine:
    """Load a checkpoint and return a ready engine. Raises CheckpointError."""
    from engine.engine import DiffusionEngine  # deferred: imports torch

    return DiffusionEngine.from_options(options)


def quantize_checkpoint(
    source: str, target: Path, quantize: str, quantize_dense: str | None, *, device: str = "auto", progress: bool = True
) -> Path:
    """Write a quantised copy of a checkpoint into a new folder. Options as in EngineOptions. Raises EngineError."""
    from engine.export import write_quantized  # deferred: imports torch
    from engine.formats import choose
    from engine.options import choose_device

    return write_quantized(source, target, choose(quantize, quantize_dense), choose_device(device), progress=progress)


def memory_plans(folder: str | None) -> tuple[MemoryPlan, ...]:
    """What the checkpoint in a folder needs on a GPU, in every format it can be loaded in; None = the published
    one. Reads its configuration only. Raises CheckpointError."""
    return plans(load_model_config(Path(folder)) if folder is not None else published_config())


__all__ = [
    "CARDS",
    "CanvasDone",
    "CheckpointError",
    "Engine",
    "EngineError",
    "EngineInfo",
    "EngineOptions",
    "Event",
    "FinishReason",
    "Finished",
    "GenerationRequest",
    "MemoryPlan",
    "QueueFull",
    "RequestTooLong",
    "Sampling",
    "Usage",
    "build_engine",
    "memory_plans",
    "quantize_checkpoint",
    "usable",
]
