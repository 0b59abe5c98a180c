"""What is warmed up, when it is compiled, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import load_generation_defaults
from engine.denoise import Denoiser
from engine.graphs import Graphs
from engine.kernels.launching import compiling, only_compiling
from engine.warm_up import warm_up
from tests.engine.small_models import fresh_slots, load_model


def test_slots_are_empty_afterwards_and_every_kind_came_twice_after_it_was_compiled(small_checkpoint: Path) -> None:
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
    seen: dict[tuple[int, int], list[bool]] = {}  # by kind: of each pass, whether it only compiles
    plan = model.plan

    def watched(commits, canvases):  # type: ignore[no-untyped-def]
        kind = (sum(len(ids) for ids, _ in commits), len(canvases))
        seen.setdefault(kind, []).append(only_compiling())
        return plan(commits, canvases)

    opened: list[bool] = []  # likewise of each canvas
    start_canvas = model.start_canvas

    def watched_start(*given):  # type: ignore[no-untyped-def]
        opened.append(only_compiling())
        start_canvas(*given)

    model.plan, model.start_canvas = watched, watched_start  # type: ignore[method-assign]
    caches = fresh_slots(model, 2)
    warm_up(denoiser, caches, canvas_length=length, chunk=32)
    assert {kind for kind, times in seen.items() if kind[0]} == {(length, 0), (length, 1), (32, 0), (32, 1)}
    assert all(passes == [True, False, False] for kind, passes in seen.items() if kind[0])
    assert {kind for kind in seen if not kind[0]} == {(0, 1), (0, 2)}
    assert opened[0] and not opened[-1]
    assert [cache.length for cache in caches] == [0, 0]
    assert not only_compiling()


def test_a_pass_that_only_compiles_is_not_the_first_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one after it is, which is not captured either: it loads the kernels."""
    graphs = Graphs(torch.device("cpu"), enabled=False)
    monkeypatch.setattr(graphs, "_enabled", True)
    done: list[bool] = []
    with compiling():
        for _ in range(2):
            graphs.run("a kind", lambda: done.append(only_compiling()))
    graphs.run("a kind", lambda: done.append(only_compiling()))
    assert done == [True, True, False]
    assert graphs.captured == 0
