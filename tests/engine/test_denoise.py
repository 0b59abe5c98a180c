"""engine.denoise: the loop's order, its guards, and that canvases do not see each other. Against scripted models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engine import sampler
from engine.config import GenerationDefaults
from engine.denoise import Canvas, Denoiser
from engine.interface import Sampling
from engine.rng import canvas_noise

C, V, M = 8, 50, 3
CPU = torch.device("cpu")


def schedule(steps: int = 6, stability: int = 1, confidence: float = 0.005) -> GenerationDefaults:
    return GenerationDefaults(
        max_denoising_steps=steps,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.1,
        stability_threshold=stability,
        confidence_threshold=confidence,
        eos_ids=frozenset({1}),
        pad_id=0,
    )


class ScriptedModel:
    """Logits by a function of (pass number, canvas ids [C], soft [C, M] or None); remembers what it was given."""

    def __init__(self, script: Callable[[int, Tensor, Tensor | None], Tensor]) -> None:
        self.script = script
        self.canvases: list[Tensor] = []
        self.softs: list[Tensor | None] = []
        self.embedded: list[Tensor] = []

    def run(self, commits: Sequence[object], canvas: Tensor, soft: Tensor | None, caches: Sequence[object]) -> Tensor:
        assert not commits
        assert canvas.shape == (len(caches), C)
        assert canvas.dtype == torch.int64
        self.canvases.append(canvas.clone())
        self.softs.append(None if soft is None else soft.clone())
        call = len(self.canvases) - 1
        return torch.stack([self.script(call, ids, None if soft is None else soft[i]) for i, ids in enumerate(canvas)])

    def soft_embedding(self, logits: Tensor) -> Tensor:
        assert logits.shape == (1, C, V)
        self.embedded.append(logits.clone())
        return logits.softmax(-1)[..., :M] * 10


def peaked(ids: Sequence[int]) -> Tensor:
    return torch.zeros(C, V).scatter(1, torch.tensor(ids)[:, None], 30.0)


def noisy(call: int, ids: Tensor, soft: Tensor | None) -> Tensor:
    """Depends on the whole input, never converges: some rows sure, some not."""
    base = 0 if soft is None else int(soft.abs().sum().mul(1000).item())
    generator = torch.Generator().manual_seed(int(ids.sum()) * 7919 + base)
    logits = torch.randn(C, V, generator=generator)
    logits[: C // 2] *= 12
    return logits


def denoiser(model: ScriptedModel, **settings: float) -> Denoiser:
    return Denoiser(model, schedule(**settings), canvas_length=C, vocab_size=V, device=CPU)  # type: ignore[arg-type]


def run(subject: Denoiser, canvas: Canvas) -> Canvas:
    while canvas.state == "open":
        subject.step([canvas], [None])  # type: ignore[list-item]
    return canvas


def test_a_pass_goes_in_the_models_order() -> None:
    model = ScriptedModel(noisy)
    sampling = Sampling(seed=5)
    subject = denoiser(model)
    canvas = subject.open(sampling, index=2)
    noise = canvas_noise(5, canvas=2, attempt=0, passes=6, canvas_length=C, vocab_size=V, device=CPU)
    for _ in range(3):
        subject.step([canvas], [None])  # type: ignore[list-item]
    assert torch.equal(model.canvases[0][0], noise.ids[0])
    assert model.softs[0] is None
    for step in (1, 2):
        soft = model.softs[step - 1]
        logits = noisy(0, model.canvases[step - 1][0], None if soft is None else soft[0])
        scaled = logits / sampler.temperature_at(step, schedule())
        stats = sampler.row_statistics(scaled)
        accepted = sampler.accept(stats.entropy, 0.1)
        assert 0 < accepted.sum() < C, "the script must exercise both branches"
        drawn = sampler.draw(scaled, stats, noise.uniforms[step], sampling)
        assert torch.equal(model.canvases[step][0], torch.where(accepted, drawn, noise.ids[step]))
        assert torch.equal(model.embedded[step - 1][0], scaled)
        assert torch.equal(model.softs[step], model.soft_embedding(scaled[None]))


def test_the_result_is_the_argmax_not_the_sample() -> None:
    target = list(range(10, 10 + C))
    subject = denoiser(ScriptedModel(lambda *_: peaked(target) / 30), confidence=100.0)
    canvas = run(subject, subject.open(Sampling(seed=1), 0))
    assert canvas.state == "done"
    assert canvas.best is not None
    assert canvas.best.tolist() == target
    assert canvas.ids.tolist() != target, "the sample must differ, or this shows nothing"


@pytest.mark.parametrize(("stability", "passes"), [(0, 1), (1, 2), (3, 4)])
def test_stops_once_stable_and_confident(stability: int, passes: int) -> None:
    subject = denoiser(ScriptedModel(lambda *_: peaked(range(C))), stability=stability)
    canvas = run(subject, subject.open(Sampling(seed=1), 0))
    assert (canvas.state, canvas.steps) == ("done", passes)


def test_a_changed_argmax_starts_the_count_again() -> None:
    def script(call: int, ids: Tensor, soft: Tensor | None) -> Tensor:
        return peaked([20 if call == 2 else 10] * C)

    subject = denoiser(ScriptedModel(script), stability=2)
    canvas = run(subject, subject.open(Sampling(seed=1), 0))
    assert (canvas.state, canvas.steps) == ("done", 6)


def test_converging_at_the_last_pass_counts() -> None:
    model = ScriptedModel(lambda call, ids, soft: peaked([10] * C) if call >= 4 else noisy(call, ids, soft))
    subject = denoiser(model)
    canvas = run(subject, subject.open(Sampling(seed=1), 0))
    assert (canvas.state, canvas.attempt, canvas.steps) == ("done", 0, 6)


def test_an_unconverged_canvas_is_redrawn_once_with_other_noise() -> None:
    model = ScriptedModel(lambda call, ids, soft: peaked([10] * C) if call >= 6 else noisy(call, ids, soft))
    subject = denoiser(model)
    canvas = run(subject, subject.open(Sampling(seed=9), index=3))
    assert (canvas.state, canvas.attempt, canvas.steps) == ("done", 1, 8)
    first, second = (
        canvas_noise(9, canvas=3, attempt=attempt, passes=6, canvas_length=C, vocab_size=V, device=CPU)
        for attempt in (0, 1)
    )
    assert torch.equal(model.canvases[0][0], first.ids[0])
    assert torch.equal(model.canvases[6][0], second.ids[0])
    assert model.softs[6] is None, "the failed attempt must not condition the new one"


def test_the_redraw_forgets_the_failed_attempts_argmax() -> None:
    """Pass 6 fails unsure; pass 7, the new attempt's first, has the same argmax and is sure: not stable yet."""

    def script(call: int, ids: Tensor, soft: Tensor | None) -> Tensor:
        sure = peaked([10] * C)
        return sure if call >= 6 else sure / 10

    subject = denoiser(ScriptedModel(script))
    canvas = run(subject, subject.open(Sampling(seed=9), 0))
    assert (canvas.state, canvas.steps) == ("done", 8)


def test_gives_up_after_the_second_attempt() -> None:
    subject = denoiser(ScriptedModel(noisy))
    canvas = run(subject, subject.open(Sampling(seed=9), 0))
    assert (canvas.state, canvas.attempt, canvas.steps) == ("unconverged", 1, 12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_give_the_canvas_up_at_once(bad: float) -> None:
    def script(call: int, ids: Tensor, soft: Tensor | None) -> Tensor:
        logits = peaked(range(C))
        if call == 1:
            logits[3, 4] = bad
        return logits

    subject = denoiser(ScriptedModel(script), stability=3)
    canvas = run(subject, subject.open(Sampling(seed=9), 0))
    assert (canvas.state, canvas.steps) == ("non-finite", 2)


def test_canvases_stepped_together_equal_each_alone() -> None:
    """Different seeds, temperatures and starting times; the soft input of a fresh canvas beside others is zero."""
    samplings = [Sampling(seed=1), Sampling(seed=2, temperature=0.5, top_k=3), Sampling(seed=3, temperature=0.0)]
    zero = torch.zeros(C, M)

    def script(call: int, ids: Tensor, soft: Tensor | None) -> Tensor:
        return noisy(0, ids, zero if soft is None else soft)

    alone = []
    for sampling in samplings:
        model = ScriptedModel(script)
        subject = denoiser(model)
        run(subject, subject.open(sampling, 0))
        alone.append([ids[0].tolist() for ids in model.canvases])
    model = ScriptedModel(script)
    subject = denoiser(model)
    canvases = [subject.open(sampling, 0) for sampling in samplings]
    seen: list[list[list[int]]] = [[], [], []]
    for tick in range(20):
        running = [n for n in range(3) if tick >= 2 * n and canvases[n].state == "open"]
        if running:
            subject.step([canvases[n] for n in running], [None] * len(running))  # type: ignore[list-item]
            for row, n in enumerate(running):
                seen[n].append(model.canvases[-1][row].tolist())
    assert seen == alone
