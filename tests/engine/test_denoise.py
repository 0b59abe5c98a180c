"""engine.denoise: the loop's order, its guards, and that canvases do not see each other. Against scripted models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engine import sampler
from engine.canvas import Canvas
from engine.config import GenerationDefaults
from engine.denoise import Denoiser
from engine.interface import Sampling
from engine.kernels.reference_canvas import CanvasStart, CanvasState, start_canvas
from engine.kernels.reference_output import Draw, Reading, read_logits
from engine.rng import canvas_noise

C, V = 8, 50
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


SOFTCAP = 1000.0  # so large that the scripts' logits pass as they are, but for rounding


class ScriptedPlan:
    """As much of a PassPlan as the loop looks at."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = torch.tensor(slots)
        self.layout = len(slots)
        self.images = ()

    def advance(self) -> None:
        pass


class ScriptedModel:
    """Logits by a function of (pass number, canvas ids [C], probabilities [C, V]); remembers what it was given.

    Its embedding is the identity, so what it is conditioned on are the probabilities themselves."""

    softcap = SOFTCAP

    def __init__(self, script: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        self.script = script
        self.canvases: list[Tensor] = []
        self.probabilities: list[Tensor] = []

    def plan(self, commits: Sequence[object], canvases: Sequence[tuple[int, object]]) -> ScriptedPlan:
        assert not commits
        return ScriptedPlan([slot for slot, _ in canvases])

    def forward(self, plan: ScriptedPlan, canvas: Tensor, soft: Tensor | None) -> Tensor:
        assert canvas.shape == (len(plan.slots), C)
        assert canvas.dtype == torch.int64
        given = torch.zeros(len(plan.slots), C, V) if soft is None else soft
        self.canvases.append(canvas.clone())
        self.probabilities.append(given.clone())
        call = len(self.canvases) - 1
        return torch.stack([self.script(call, ids, soft) for ids, soft in zip(canvas, given, strict=True)])

    def embed_soft(self, probabilities: Tensor) -> Tensor:
        return probabilities

    def embed(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, V).float()

    def start_canvas(self, state: CanvasState, slot: int, start: CanvasStart) -> None:
        start_canvas(state, slot, start)

    def read(self, logits: Tensor, draw: Draw) -> Reading:
        return read_logits(logits, SOFTCAP, draw)


def peaked(ids: Sequence[int]) -> Tensor:
    return torch.zeros(C, V).scatter(1, torch.tensor(ids)[:, None], 30.0)


def noisy(call: int, ids: Tensor, soft: Tensor) -> Tensor:
    """Depends on the whole input, never converges: some rows sure, some not."""
    base = int((soft * torch.arange(V)).sum().mul(100).round().item())
    generator = torch.Generator().manual_seed(int(ids.sum()) * 7919 + base)
    logits = torch.randn(C, V, generator=generator)
    logits[: C // 2] *= 12
    return logits


def denoiser(model: ScriptedModel, **settings: float) -> Denoiser:
    return Denoiser(model, schedule(**settings), slots=3, canvas_length=C, vocab_size=V, device=CPU)  # type: ignore[arg-type]


def run(subject: Denoiser, canvas: Canvas) -> Canvas:
    while canvas.state == "open":
        subject.step([canvas], [None])  # type: ignore[list-item]
    return canvas


def test_a_pass_goes_in_the_models_order() -> None:
    model = ScriptedModel(noisy)
    sampling = Sampling(seed=5)
    subject = denoiser(model)
    canvas = subject.open(1, sampling, index=2)
    noise = canvas_noise(5, canvas=2, attempt=0, passes=6, canvas_length=C, vocab_size=V, device=CPU)
    for _ in range(3):
        subject.step([canvas], [None])  # type: ignore[list-item]
    assert torch.equal(model.canvases[0][0], noise.ids[0])
    assert (model.probabilities[0] == 0).all()
    for step in (1, 2):
        logits = noisy(0, model.canvases[step - 1][0], model.probabilities[step - 1][0])
        draw = Draw(
            temperature=torch.full((C,), sampler.temperature_at(step, schedule())),
            request_temperature=torch.ones(C),
            top_k=torch.zeros(C, dtype=torch.int32),
            top_p=torch.ones(C),
            min_p=torch.zeros(C),
            uniforms=noise.uniforms[step],
            shaped=False,
        )
        reading = read_logits(logits, SOFTCAP, draw)
        accepted = sampler.accept(reading.entropy[None], torch.tensor([0.1]))[0]
        assert 0 < accepted.sum() < C, "the script must exercise both branches"
        assert torch.equal(model.canvases[step][0], torch.where(accepted, reading.drawn, noise.ids[step]))
        assert torch.equal(model.probabilities[step][0], reading.probabilities)


def test_the_result_is_the_argmax_not_the_sample() -> None:
    target = list(range(10, 10 + C))
    subject = denoiser(ScriptedModel(lambda *_: peaked(target) / 30), confidence=100.0)
    canvas = run(subject, subject.open(0, Sampling(seed=1), 0))
    assert canvas.state == "done"
    assert canvas.result == tuple(target)
    assert subject._state.ids[0].tolist() != target, "the sample must differ, or this shows nothing"


@pytest.mark.parametrize(("stability", "passes"), [(0, 1), (1, 2), (3, 4)])
def test_stops_once_stable_and_confident(stability: int, passes: int) -> None:
    subject = denoiser(ScriptedModel(lambda *_: peaked(range(C))), stability=stability)
    canvas = run(subject, subject.open(0, Sampling(seed=1), 0))
    assert (canvas.state, canvas.steps) == ("done", passes)


def test_a_changed_argmax_starts_the_count_again() -> None:
    def script(call: int, ids: Tensor, soft: Tensor) -> Tensor:
        return peaked([20 if call == 2 else 10] * C)

    subject = denoiser(ScriptedModel(script), stability=2)
    canvas = run(subject, subject.open(0, Sampling(seed=1), 0))
    assert (canvas.state, canvas.steps) == ("done", 6)


def test_converging_at_the_last_pass_counts() -> None:
    model = ScriptedModel(lambda call, ids, soft: peaked([10] * C) if call >= 4 else noisy(call, ids, soft))
    subject = denoiser(model)
    canvas = run(subject, subject.open(0, Sampling(seed=1), 0))
    assert (canvas.state, canvas.attempt, canvas.steps) == ("done", 0, 6)


def test_an_unconverged_canvas_is_redrawn_once_with_other_noise() -> None:
    model = ScriptedModel(lambda call, ids, soft: peaked([10] * C) if call >= 6 else noisy(call, ids, soft))
    subject = denoiser(model)
    canvas = run(subject, subject.open(0, Sampling(seed=9), index=3))
    assert (canvas.state, canvas.attempt, canvas.steps) == ("done", 1, 8)
    first, second = (
        canvas_noise(9, canvas=3, attempt=attempt, passes=6, canvas_length=C, vocab_size=V, device=CPU)
        for attempt in (0, 1)
    )
    assert torch.equal(model.canvases[0][0], first.ids[0])
    assert torch.equal(model.canvases[6][0], second.ids[0])
    assert (model.probabilities[6] == 0).all(), "the failed attempt must not condition the new one"


def test_the_redraw_forgets_the_failed_attempts_argmax() -> None:
    """Pass 6 fails unsure; pass 7, the new attempt's first, has the same argmax and is sure: not stable yet."""

    def script(call: int, ids: Tensor, soft: Tensor) -> Tensor:
        sure = peaked([10] * C)
        return sure if call >= 6 else sure / 10

    subject = denoiser(ScriptedModel(script))
    canvas = run(subject, subject.open(0, Sampling(seed=9), 0))
    assert (canvas.state, canvas.steps) == ("done", 8)


def test_gives_up_after_the_second_attempt() -> None:
    subject = denoiser(ScriptedModel(noisy))
    canvas = run(subject, subject.open(0, Sampling(seed=9), 0))
    assert (canvas.state, canvas.attempt, canvas.steps) == ("unconverged", 1, 12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_give_the_canvas_up_at_once(bad: float) -> None:
    def script(call: int, ids: Tensor, soft: Tensor) -> Tensor:
        logits = peaked(range(C))
        if call == 1:
            logits[3, 4] = bad
        return logits

    subject = denoiser(ScriptedModel(script), stability=3)
    canvas = run(subject, subject.open(0, Sampling(seed=9), 0))
    assert (canvas.state, canvas.steps) == ("non-finite", 2)


def test_canvases_stepped_together_equal_each_alone() -> None:
    """Different seeds, temperatures and starting times; the soft input of a fresh canvas beside others is zero."""
    samplings = [
        Sampling(seed=1),
        Sampling(seed=2, temperature=0.5, top_k=3, min_p=0.1),
        Sampling(seed=3, temperature=0.0),
    ]

    def script(call: int, ids: Tensor, soft: Tensor) -> Tensor:
        return noisy(0, ids, soft)

    alone = []
    for sampling in samplings:
        model = ScriptedModel(script)
        subject = denoiser(model)
        run(subject, subject.open(0, sampling, 0))
        alone.append([ids[0].tolist() for ids in model.canvases])
    model = ScriptedModel(script)
    subject = denoiser(model)
    canvases = [subject.open(slot, sampling, 0) for slot, sampling in enumerate(samplings)]
    seen: list[list[list[int]]] = [[], [], []]
    for tick in range(20):
        running = [n for n in range(3) if tick >= 2 * n and canvases[n].state == "open"]
        if running:
            subject.step([canvases[n] for n in running], [None] * len(running))  # type: ignore[list-item]
            for row, n in enumerate(running):
                seen[n].append(model.canvases[-1][row].tolist())
    assert seen == alone


def test_pinned_positions_are_held_whatever_the_model_wants() -> None:
    """In the input, the argmax, the self-conditioning and a redraw; free positions go on as if it wanted them too."""
    model = ScriptedModel(lambda call, ids, soft: noisy(0, ids, soft))
    subject = denoiser(model)
    canvas = subject.open(1, Sampling(seed=3, temperature=0.0), 0)
    subject.pin(canvas, 2, [30, 31])
    subject.step([canvas], [None])  # type: ignore[list-item]
    subject.pin(canvas, 6, [32])
    best, entropy = subject.found(canvas)
    assert (best[2:4], best[6], entropy[2:4], entropy[6]) == ([30, 31], 32, [0.0, 0.0], 0.0)
    assert min(entropy[4:6]) > 0
    while canvas.state == "open":
        subject.step([canvas], [None])  # type: ignore[list-item]
    assert (canvas.state, canvas.steps) == ("unconverged", 12)
    for call, ids in enumerate(model.canvases):
        assert ids[0, 2:4].tolist() == [30, 31]
        assert call == 0 or ids[0, 6] == 32
    fresh = canvas_noise(3, canvas=0, attempt=0, passes=6, canvas_length=C, vocab_size=V, device=CPU).ids[0]
    assert model.canvases[0][0, [0, 1, 4, 5, 6, 7]].tolist() == fresh[[0, 1, 4, 5, 6, 7]].tolist()
    for call, soft in enumerate(model.probabilities):
        if call in (0, 6):  # the first pass of an attempt has no self-conditioning
            assert (soft == 0).all()
        else:
            assert torch.equal(soft[0, [2, 3, 6]], torch.eye(V)[[30, 31, 32]])
            assert torch.allclose(soft[0].sum(-1), torch.ones(C))


def test_a_canvas_converges_around_its_pins() -> None:
    subject = denoiser(ScriptedModel(lambda *_: peaked(range(10, 10 + C))))
    canvas = subject.open(0, Sampling(seed=1), 0)
    subject.pin(canvas, 0, [44])
    run(subject, canvas)
    assert (canvas.state, canvas.steps, canvas.result) == ("done", 2, (44, *range(11, 10 + C)))
    assert run(subject, subject.open(0, Sampling(seed=1), 1)).result[0] == 10, "pins end with their canvas"


def test_a_guided_canvas_ends_when_its_guide_says_so() -> None:
    """Neither the stop rule nor the last pass ends or redraws it."""
    subject = denoiser(ScriptedModel(lambda *_: peaked(range(10, 10 + C)) + torch.arange(V) / 100), steps=3)
    canvas = subject.open(2, Sampling(seed=1), 0, guided=True)
    other = subject.open(0, Sampling(seed=2), 0)
    for running in ([other, canvas], [canvas, other], [canvas]):
        subject.step(running, [None] * len(running))  # type: ignore[list-item]
    assert (canvas.state, canvas.settled, canvas.attempt, other.state) == ("open", True, 0, "done")
    assert subject.passes_left(canvas) == 0
    allowed = bytearray(8)
    for token_id in (3, 12, 33):
        allowed[token_id // 8] |= 1 << token_id % 8
    assert subject.best_allowed(canvas, 2, bytes(allowed)) == 12
    assert subject.best_allowed(canvas, 3, bytes(allowed)) == 33
    subject.pin(canvas, 3, [33])
    subject.finish(canvas)
    assert (canvas.state, canvas.result) == ("done", (10, 11, 12, 33, *range(14, 10 + C)))
