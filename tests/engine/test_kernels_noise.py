"""How a canvas begins, in Triton against the reference: the same state to the last bit, by one kernel for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.interface import Sampling
from engine.kernels import noise, reference_canvas
from engine.kernels.launching import compiling
from engine.kernels.reference_canvas import CanvasStart, CanvasState
from tests.engine.test_denoise import ScriptedModel, denoiser, noisy, run
from tests.engine.test_kernels_launching import run_without_chip

SLOTS, MOST_PASSES = 3, 12
SEEDS = (0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, 2**63, 2**63 + 11, 2**64 - 1)


def start_of(device: torch.device, passes: int = 6, **changes: object) -> CanvasStart:
    start = CanvasStart(
        seed=7,
        canvas=0,
        attempt=0,
        vocab_size=262_144,
        temperatures=torch.linspace(0.8, 0.4, passes, device=device),
        entropy_bound=0.1,
        confidence=0.005,
        stability=1,
        request_temperature=0.7,
        top_k=0,
        top_p=0.95,
        min_p=1.0,
    )
    return replace(start, **changes)  # type: ignore[arg-type]


def used_state(length: int, device: torch.device) -> CanvasState:
    """As earlier canvases may have left it."""
    state = CanvasState(SLOTS, length, MOST_PASSES, device)
    generator = torch.Generator().manual_seed(length)
    for tensor in tensors(state):
        tensor.copy_(torch.randint(1, 50, tensor.shape, generator=generator))
    state.pins[:, ::2] = -1
    state.seen[:, 2] = 0
    state.kept[:] = torch.rand(state.kept.shape, generator=generator).to(device) < 0.5
    return state


def tensors(state: CanvasState) -> list[torch.Tensor]:
    """All memory of the state, once."""
    views = (state.ids, state.pins, state.seen, state.counts, state.floats, state.top_k, state.temperatures)
    return [*views, state.noise_ids, state.uniforms]


def assert_starts_alike(start: CanvasStart, length: int, device: torch.device, slot: int = 1) -> None:
    found, expected = used_state(length, device), used_state(length, device)
    noise.start_canvas(found, slot, start)
    reference_canvas.start_canvas(expected, slot, start)
    for mine, theirs in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed(seed: int, device: torch.device) -> None:
    assert_starts_alike(start_of(device, seed=seed), 32, device)


@pytest.mark.parametrize("attempt", [0, 1, 2])
@pytest.mark.parametrize("canvas", [0, 1, 2, 16, 1000, 2**31 - 1])
def test_every_canvas_and_attempt(canvas: int, attempt: int, device: torch.device) -> None:
    """An attempt that is not the first keeps its pins."""
    assert_starts_alike(start_of(device, seed=2**64 - 5, canvas=canvas, attempt=attempt), 16, device)


@pytest.mark.parametrize("slot", range(SLOTS))
@pytest.mark.parametrize(("length", "passes", "vocab"), [(256, MOST_PASSES, 262_144), (24, 1, 3), (8, 5, 2**31 - 1)])
def test_every_size(length: int, passes: int, vocab: int, slot: int, device: torch.device) -> None:
    assert_starts_alike(start_of(device, passes, vocab_size=vocab), length, device, slot)


@pytest.mark.parametrize(
    "changes",
    [
        {"request_temperature": 0, "top_p": 1, "min_p": 0, "top_k": 1},
        {"stability": 0, "entropy_bound": 1e30, "confidence": 1e-30, "top_k": 262_144},
    ],
)
def test_what_a_request_may_want(changes: dict[str, float], device: torch.device) -> None:
    assert_starts_alike(start_of(device, **changes), 16, device)


def test_a_stability_beyond_all_passes_stays_beyond_them(device: torch.device) -> None:
    state = used_state(16, device)
    noise.start_canvas(state, 0, start_of(device, stability=2**40))
    assert state.stability[0] > 10**9


def test_state_is_there_after_it_is_only_compiled(device: torch.device) -> None:
    """Without it, the pass that follows would look for embeddings of whatever was left."""
    found, expected = used_state(16, device), used_state(16, device)
    with compiling():
        noise.start_canvas(found, 1, start_of(device))
    reference_canvas.start_canvas(expected, 1, start_of(device))
    for mine, theirs in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(mine, theirs)


class TritonStart(ScriptedModel):
    def start_canvas(self, state: CanvasState, slot: int, start: CanvasStart) -> None:
        noise.start_canvas(state, slot, start)


def test_canvases_go_on_alike() -> None:
    """Pinned and redrawn ones too."""
    found = []
    for sort in (ScriptedModel, TritonStart):
        model = sort(lambda call, ids, soft: noisy(0, ids, soft))
        subject = denoiser(model)
        for index in range(2):
            canvas = subject.open(1, Sampling(seed=2**63 + 1, temperature=0.5, top_k=3), index)
            subject.pin(canvas, 2, [30, 31])
            assert run(subject, canvas).attempt == 1
        found.append(torch.stack(model.canvases))
    assert torch.equal(*found)


ONE_KERNEL = """
from dataclasses import replace
from engine.kernels.noise import start_canvas
from engine.kernels.reference_canvas import CanvasStart, CanvasState

state = CanvasState(17, 16, 12, torch.device("cpu"))
start = CanvasStart(
    seed=0, canvas=0, attempt=0, vocab_size=262_144, temperatures=torch.ones(6), entropy_bound=0.1, confidence=0.005,
    stability=1, request_temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
)
changes = [{"seed": seed} for seed in (1, 16, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1)]
changes += [{name: value} for name in ("canvas", "attempt", "stability", "top_k") for value in (0, 1, 16, 17)]
changes += [{"stability": 2**40}, {"request_temperature": 0}, {"top_p": 0.5}, {"temperatures": torch.ones(12)}]
with compiling():
    start_canvas(state, 0, start)
assert len(made) == 1 and not launched, made
for slot, each in [(0, {}), (1, {}), (16, {})] + [(2, change) for change in changes]:
    start_canvas(state, slot, replace(start, **each))
assert len(launched) == 3 + len(changes)
assert len(made) == 2, "the launcher of the one kernel that was compiled"
"""


def test_no_seed_and_no_canvas_needs_another_kernel(tmp_path: Path) -> None:
    run_without_chip(ONE_KERNEL, tmp_path)
