"""Turns EngineOptions' "auto" values and names into torch's: chosen once at start-up, never silently changed.

Invariant: a choice that cannot be met is an EngineError that says what could be chosen instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.checkpoint import CheckpointPlan
from engine.config import ModelConfig
from engine.interface import EngineError, EngineOptions
from engine.memory_plan import FLAGS, GB, MIN_CONTEXT, Pools, default_chunk, plan_memory, plans, refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_SLOTS = 8
CUDA_RESERVE = 2 * 2**30  # bytes left for activations and logits when the context is sized to the memory


def check_options(options: EngineOptions) -> None:
    """Raise EngineError for a bound that makes no sense."""
    if options.max_waiting < 0:
        raise EngineError(f"max_waiting must be 0 or more, not {options.max_waiting}")
    if options.slots is not None and not 1 <= options.slots <= MOST_SLOTS:
        raise EngineError(f"slots must be in 1..{MOST_SLOTS}, not {options.slots}")
    if options.kv_memory is not None and not options.kv_memory > 0:
        raise EngineError(f"kv_memory must be more than 0 GB, not {options.kv_memory}")
    if options.commit_chunk is not None and options.commit_chunk < 1:
        raise EngineError(f"commit_chunk must be at least 1, not {options.commit_chunk}")


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`; auto takes the first GPU if there is one."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or name.endswith(":"):
        raise EngineError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise EngineError(
            f"device {name!r} was asked for, but torch {torch.__version__} finds no usable NVIDIA GPU; "
            "check the driver and that torch was built for CUDA, or choose device cpu"
        )
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise EngineError(f"device {name!r} was asked for, but there are only {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`, `float32` or `bfloat16`; auto is bfloat16, but float32 on a CPU without instructions for that."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" and not _multiplies_bfloat16() else torch.bfloat16
    if name not in DTYPES:
        raise EngineError(f"unknown dtype {name!r}; choose auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def _multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself: four times as fast as float32 then, else many times slower."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_pools(
    config: ModelConfig,
    weight_bytes: int,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    slots: int | None = None,
) -> Pools:
    """Slots, context and pages for a model that is loaded. Raises EngineError for what the memory does not hold.

    `slots`: so many, each with room for a whole context, whatever `options` say."""
    plan = plan_memory(
        config,
        weight_bytes,
        name="",
        itemsize=dtype.itemsize,
        gpu=device.type == "cuda",
        commit_chunk=choose_chunk(options.commit_chunk, device),
    )
    if slots is not None:
        return plan.pools_for(slots, options.context_length or plan.max_context)
    kv_bytes = None if options.kv_memory is None else int(options.kv_memory * GB)
    memory = plan.weights + plan.working + free_memory(device)
    pools = plan.pools(memory, slots=options.slots, context=options.context_length, kv_bytes=kv_bytes)
    if pools is not None:
        return pools
    least = min(MIN_CONTEXT, plan.max_context) if options.context_length is None else options.context_length
    served = options.slots or 1
    needed = plan.needed(least, served) - plan.weights - plan.work(served)
    held = memory - plan.weights - plan.work(served)
    asked = "" if kv_bytes is None else f", of which {kv_bytes / GB:.3g} GB were asked for"
    raise EngineError(
        f"{served} slot{'s' * (served > 1)} and a context of {least} need {needed / GB:.3g} GB for keys and values; "
        f"{device} has {held / GB:.3g} GB for them{asked}"
    )


def check_images(config: ModelConfig, commit_chunk: int) -> None:
    """Raise EngineError if an image does not fit into one pass, or into the window."""
    vision = config.vision
    if vision is None:
        return
    limits = {"commit_chunk": commit_chunk, "the sliding window": config.sliding_window - 1}
    for name, limit in limits.items():
        if vision.most_tokens > limit:
            raise EngineError(
                f"an image takes up to {vision.most_tokens} tokens, which are committed at once, and {name} is "
                f"{limit}; raise commit_chunk, lower max_soft_tokens in the checkpoint's processor config, or serve "
                "text only (--images off)"
            )


def choose_chunk(asked: int | None, device: torch.device) -> int:
    """Prompt tokens a pass commits: as asked, or what suits the device."""
    if asked is not None:
        return asked
    gpu = device.type == "cuda"
    return default_chunk(gpu, torch.cuda.get_device_properties(device).total_memory if gpu else 0)


def chunk_beside(device: torch.device, canvas_length: int, commit_chunk: int) -> int:
    """Prompt tokens that a pass commits where other slots denoise: so many that it takes less than twice as long. On a
    CPU time goes by rows; a GPU reads the weights anyway, which leaves room for more."""
    return min(commit_chunk, canvas_length if device.type == "cpu" else 2 * canvas_length)


def free_memory(device: torch.device) -> int:
    """Bytes that KV may take: what is free on the GPU less a reserve, or a quarter of the host's memory.

    Not the host's free memory: just after loading it is mostly the page cache, and would make the context
    depend on what ran before.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, free - CUDA_RESERVE)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def require_fit(
    plan: CheckpointPlan,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    flags: Mapping[str, str] = FLAGS,
) -> None:
    """Raise EngineError if weights, KV cache and work space exceed the memory that is free on the device now, or for a
    context beyond the checkpoint's limit.

    `flags`: what to type for another format, for the message."""
    asked = options.context_length
    if asked is not None and not 2 <= asked <= plan.config.max_positions:
        raise EngineError(f"context {asked} is outside 2..{plan.config.max_positions}, the checkpoint's limit")
    gpu = device.type == "cuda"
    wanted = plan_memory(
        plan.config,
        plan.layout,
        name=plan.title,
        itemsize=dtype.itemsize,
        gpu=gpu,
        commit_chunk=choose_chunk(options.commit_chunk, device),
    )
    others = () if plan.quantized else plans(plan.config, itemsize=dtype.itemsize, gpu=gpu)
    free = available_memory(device)
    problem = refusal(wanted, others, context=asked, free=free, where=str(device), slots=options.slots, flags=flags)
    if problem is not None:
        raise EngineError(f"{options.model}: {problem}")


def available_memory(device: torch.device) -> int:
    """Bytes free on the GPU, or those that the host could give without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    listing = Path("/proc/meminfo")
    if listing.is_file():
        for line in listing.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
