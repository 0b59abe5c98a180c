"""The real engine around a scripted model: for what is between requests and logits.

Knows the engine's parts; no weights. Invariant: logits are a function of the committed ids, the canvas and a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.config import GenerationDefaults
from engine.engine import DiffusionEngine
from engine.interface import EngineInfo
from engine.kernels.reference_canvas import CanvasStart, CanvasState, start_canvas
from engine.kernels.reference_output import Draw, Reading, read_logits
from engine.kv_cache import KVCache
from engine.pages import PagePool, pages_of_a_slot
from engine.prefix_cache import PrefixCache
from tests.fakes import engine_info

Choose = Callable[[list[int], Tensor], Tensor]  # committed ids, canvas int64 [C] -> logits float32 [C, V]

WINDOW, CHUNK = 100, 512


class NoMemory:
    """Pages without contents: what is in them is known from the ids."""

    def copy_page(self, kind: str, source: int, target: int) -> None: ...

    def wipe_page(self, kind: str, page: int) -> None: ...


def bare_caches(
    slots: int, context: int, *, ahead: int, pages: int | None = None, window: int = WINDOW
) -> list[KVCache]:
    """Slots without tensors; `pages` for the full layers, as many as they can use if left out. `ahead`: positions that
    a pass adds at most."""
    counts = pages_of_a_slot(capacity=context, window=window, ahead=ahead)
    full = slots * counts["full"] if pages is None else pages
    prefixes = PrefixCache({"sliding": PagePool(slots * counts["sliding"] + 40), "full": PagePool(full)}, window)
    return [KVCache(prefixes, NoMemory(), context) for _ in range(slots)]


class Plan:
    """As much of a PassPlan as the loop looks at, and what the model needs."""

    def __init__(
        self,
        commits: Sequence[tuple[Sequence[int], KVCache]],
        canvases: Sequence[tuple[int, KVCache]],
        canvas_length: int,
    ) -> None:
        self.commits, self.canvases = commits, canvases
        self.images = ()
        for ids, cache in commits:
            cache.reserve(len(ids))
        for _, cache in canvases:
            cache.reserve(len(self._coming(cache)) + canvas_length)
        self.slots = torch.tensor([slot for slot, _ in canvases], dtype=torch.int64)
        self.layout = (len(commits), len(canvases))

    def _coming(self, cache: KVCache) -> list[int]:
        return [token_id for ids, owner in self.commits if owner is cache for token_id in ids]

    def prefix(self, cache: KVCache) -> list[int]:
        return list(cache.ids) + self._coming(cache)

    def advance(self) -> None:
        for ids, cache in self.commits:
            cache.advance(len(ids))


class Model:
    """Logits by a function; its embedding is the identity."""

    softcap = 1000.0

    def __init__(self, choose: Choose, canvas_length: int, vocab_size: int) -> None:
        self.choose = choose
        self.canvas_length = canvas_length
        self.vocab_size = vocab_size
        self.passes = 0

    def plan(self, commits: Sequence[tuple[Sequence[int], KVCache]], canvases: Sequence[tuple[int, KVCache]]) -> Plan:
        return Plan(commits, canvases, self.canvas_length)

    def forward(self, plan: Plan, canvas: Tensor | None, soft: Tensor | None) -> Tensor | None:
        if canvas is None:
            return None
        self.passes += 1
        prefixes = [plan.prefix(cache) for _, cache in plan.canvases]
        return torch.stack([self.choose(prefix, ids) for prefix, ids in zip(prefixes, canvas, strict=True)])

    def embed_soft(self, probabilities: Tensor) -> Tensor:
        return probabilities

    def embed(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, self.vocab_size).float()

    def start_canvas(self, state: CanvasState, slot: int, start: CanvasStart) -> None:
        start_canvas(state, slot, start)

    def read(self, logits: Tensor, draw: Draw) -> Reading:
        return read_logits(logits, self.softcap, draw)


def scripted_engine(
    choose: Choose,
    *,
    canvas_length: int,
    vocab_size: int,
    eos_ids: Sequence[int] = (1,),
    steps: int = 8,
    context: int = 512,
    slots: int = 1,
) -> DiffusionEngine:
    """An engine that says what `choose` wants; a canvas takes `steps` passes at most."""
    return engine_around(
        Model(choose, canvas_length, vocab_size),
        bare_caches(slots, context, ahead=CHUNK + canvas_length),
        engine_info(
            "scripted",
            canvas_length=canvas_length,
            context_length=context,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
        ),
        steps=steps,
        max_waiting=64,
        commit_chunk=CHUNK,
    )


def engine_around(
    model: Any, caches: list[KVCache], info: EngineInfo, *, steps: int, max_waiting: int, commit_chunk: int
) -> DiffusionEngine:
    """The real engine around a model of one's own; a canvas takes `steps` passes at most."""
    schedule = GenerationDefaults(
        max_denoising_steps=steps,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.1,
        stability_threshold=1,
        confidence_threshold=0.005,
        eos_ids=info.eos_ids,
        pad_id=0,
    )
    return DiffusionEngine(model, caches, schedule, info, max_waiting=max_waiting, commit_chunk=commit_chunk)


def babble(vocab_size: int, scale: float = 3.0, liking: Mapping[int, float] | None = None) -> Choose:
    """A model that was never trained: its logits are random, and others for another prefix or canvas. `liking`: ids it
    prefers all the same, and by how much."""
    bias = torch.zeros(vocab_size)
    for token_id, value in (liking or {}).items():
        bias[token_id] = value

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        seed = sum((place + 1) * token_id for place, token_id in enumerate([*committed, *canvas.tolist()]))
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(canvas), vocab_size, generator=generator) * scale + bias

    return choose
