"""Puts a model together: the weights of a checkpoint, the memory for keys and values, an op set and a planner.

Whoever serves, measures or tests a whole model gets it here, so that all run the same thing.

Invariant: on a GPU with the Triton ops, passes come in few layouts (`buckets`), so that all that recur can be captured.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

import torch

from engine.config import ModelConfig
from engine.host_memory import keep_freed_memory
from engine.interface import EngineError
from engine.kernels.reference import REFERENCE, Ops
from engine.kernels.weights import Weight
from engine.kv_cache import KVPool
from engine.model.gemma4 import DiffusionGemma
from engine.pages import PAGE
from engine.plan import Planner

logger = logging.getLogger(__name__)

KERNELS = ("reference", "triton")
SMALLEST_BUCKET = 64  # rows: below it a pass costs the same


def choose_kernels(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto` or the name of an op set; auto is triton on a GPU in bfloat16. Raises EngineError for one that cannot
    run."""
    if name == "auto":
        return "triton" if device.type == "cuda" and dtype == torch.bfloat16 else "reference"
    if name not in KERNELS:
        raise EngineError(f"unknown kernels {name!r}; choose auto or {' or '.join(KERNELS)}")
    if name == "triton" and device.type != "cuda":
        raise EngineError(f"kernels 'triton' need an NVIDIA GPU, not {device}; choose auto or reference")
    return name


def assemble(
    config: ModelConfig, weights: MutableMapping[str, Weight], pool: KVPool, kernels: str, *, eight_bit: bool
) -> DiffusionGemma:
    """The model on the pool's device; `weights` and `eight_bit` as in `Checkpoint`, `kernels` as `choose_kernels`
    returns it. The Triton ops are measured here, and the fastest way of each chosen; weights that they want laid out in
    another way are replaced, so that several models may share them."""
    if pool.device.type == "cpu":
        keep_freed_memory()
    if kernels == "reference":
        return DiffusionGemma(config, weights, REFERENCE, pool)
    ops = _measured(config, weights, eight_bit)
    logger.info("chosen on this chip: %s", "; ".join(ops.chosen))
    capacity = max(cache.capacity for cache in pool.slots)
    planner = Planner(
        config,
        pool.device,
        row_align=ops.row_align,
        buckets=buckets(pool.chunk + len(pool.slots) * (config.canvas_length + ops.row_align)),
        width=-(-(capacity + pool.chunk + config.canvas_length) // PAGE),
    )
    return DiffusionGemma(config, weights, ops, pool, planner)


def _measured(config: ModelConfig, weights: MutableMapping[str, Weight], eight_bit: bool) -> Ops:
    """The Triton ops as measured here, with weights laid out as they want them."""
    # deferred: a machine without a GPU need not have triton
    from engine.kernels.choosing import GraphTimer, choose
    from engine.kernels.triton_ops import by_choice, lay_out

    lay_out(weights)
    return by_choice(
        choose(
            weights,
            active=config.top_k_experts,
            canvas=config.canvas_length,
            scale=config.hidden_size**0.5,
            eight_bit=eight_bit,
            time=GraphTimer(),
        )
    )


def buckets(most: int) -> tuple[int, ...]:
    """Rows that commits are filled up to: doubling, up to at least `most`."""
    found = [SMALLEST_BUCKET]
    while found[-1] < most:
        found.append(2 * found[-1])
    return tuple(found)
