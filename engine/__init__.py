"""The engine: token ids in, token ids out. Import only from here; no torch is imported until `build_engine` runs."""

from pathlib import Path

from engine.config import load_model_config, published_config
from engine.formats import layout
from engine.interface import (
    MAX_DENOISING_STEPS,
    MAX_LOGPROBS,
    CanvasDone,
    CheckpointError,
    Constraint,
    ConstraintError,
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
    Schedule,
    TokenLogprobs,
    Usage,
)
from engine.memory_plan import CARDS, MemoryPlan, plan_memory, plans, usable
from engine.quantization_config import load_quantization


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
    if folder is None:
        return plans(published_config())
    config = load_model_config(Path(folder))
    quantization = load_quantization(Path(folder))
    if quantization is None:
        return plans(config)
    own = layout(config, quantization.scheme_of)
    return (plan_memory(config, own, name=own.format or "bf16"),)


def stored_format(folder: str) -> str | None:
    """The schemes that a checkpoint's quantization_config names; None if it is not quantised.

    Raises CheckpointError for one that cannot be loaded."""
    quantization = load_quantization(Path(folder))
    return " and ".join(scheme.title for scheme, _ in quantization.groups) if quantization else None


__all__ = [
    "CARDS",
    "MAX_DENOISING_STEPS",
    "MAX_LOGPROBS",
    "CanvasDone",
    "CheckpointError",
    "Constraint",
    "ConstraintError",
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
    "Schedule",
    "TokenLogprobs",
    "Usage",
    "build_engine",
    "memory_plans",
    "quantize_checkpoint",
    "stored_format",
    "usable",
]
