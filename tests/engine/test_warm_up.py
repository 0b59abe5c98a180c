"""What is warmed up, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import load_generation_defaults
from engine.denoise import Denoiser
from engine.warm_up import warm_up
from tests.engine.small_models import fresh_slots, load_model


def test_slots_are_empty_afterwards_and_every_kind_of_pass_came_twice(small_checkpoint: Path) -> None:
    model = load_model(small_checkpoint, slots=2)
    length = model.config.canvas_length
    denoiser = Denoiser(
        model,
        load_generation_defaults(small_checkpoint),
        slots=2,
        canvas_length=length,
        vocab_size=model.config.vocab_size,
        device=torch.device("cpu"),
    )
    seen: dict[tuple[int, int], int] = {}
    plan = model.plan

    def watched(commits, canvases):  # type: ignore[no-untyped-def]
        kind = (sum(len(ids) for ids, _ in commits), len(canvases))
        seen[kind] = seen.get(kind, 0) + 1
        return plan(commits, canvases)

    model.plan = watched  # type: ignore[method-assign]
    caches = fresh_slots(model, 2)
    warm_up(denoiser, caches, canvas_length=length, chunk=32)
    assert {kind for kind, times in seen.items() if kind[0]} == {(length, 0), (length, 1), (32, 0), (32, 1)}
    assert all(times == 2 for kind, times in seen.items() if kind[0])
    assert {kind for kind in seen if not kind[0]} == {(0, 1), (0, 2)}
    assert [cache.length for cache in caches] == [0, 0]
