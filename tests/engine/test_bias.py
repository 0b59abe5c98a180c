"""What requests add to the logits, their own schedule, and the logprobs they get back. Against scripted models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import sampler
from engine.check_request import check_request
from engine.interface import EngineError, GenerationRequest, Sampling, Schedule
from tests.engine.test_denoise import SOFTCAP, C, ScriptedModel, V, denoiser, noisy, peaked, run

WANTS = [3, 3, 7, 7, 9, 9, 1, 1]  # what the script's logits favour, by 2 nats; id 1 ends the reply


def mild(call: int, ids: Tensor, soft: Tensor) -> Tensor:
    """Sure of WANTS before anything else, and of id 20 + position where that is taken away."""
    favourite = torch.tensor(WANTS)
    second = 20 + torch.arange(C)
    logits = torch.full((C, V), -300.0)
    return logits.scatter(1, second[:, None], 0.0).scatter(1, favourite[:, None], 40.0)


def result(model: ScriptedModel, sampling: Sampling, **options: object) -> tuple[int, ...]:
    subject = denoiser(model)
    return run(subject, subject.open(0, sampling, 0, **options)).result  # type: ignore[arg-type]


def test_a_banned_id_is_never_delivered() -> None:
    assert result(ScriptedModel(mild), Sampling(seed=1)) == tuple(WANTS)
    banned = result(ScriptedModel(mild), Sampling(seed=1, logit_bias=((3, -100.0), (9, -100.0))))
    assert banned == (20, 21, 7, 7, 24, 25, 1, 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 2), st.sets(st.integers(0, V - 1), max_size=V - 1))
def test_no_draw_and_no_argmax_has_a_banned_id(seed: int, temperature: float, banned: set[int]) -> None:
    model = ScriptedModel(noisy)
    subject = denoiser(model)
    sampling = Sampling(seed=seed, temperature=temperature, logit_bias=tuple((each, -100.0) for each in banned))
    canvas = subject.open(0, sampling, 0)
    for _ in range(3):
        subject.step([canvas], [None])  # type: ignore[list-item]
        kept = subject._state.kept[0]
        assert not banned & set(subject._state.best[0].tolist())
        assert not banned & set(subject._state.ids[0][kept].tolist())


def test_a_bias_moves_the_argmax_only_where_it_is_large_enough() -> None:
    assert result(ScriptedModel(mild), Sampling(seed=1, logit_bias=((3, -30.0),)))[:2] == (3, 3)
    assert result(ScriptedModel(mild), Sampling(seed=1, logit_bias=((3, -50.0),)))[:2] == (20, 21)
    assert result(ScriptedModel(mild), Sampling(seed=1, logit_bias=((22, 50.0),)))[:3] == (3, 3, 22)


def test_a_bias_is_of_its_own_request_only() -> None:
    model = ScriptedModel(mild)
    subject = denoiser(model)
    canvases = [subject.open(0, Sampling(seed=1, logit_bias=((3, -100.0),)), 0), subject.open(1, Sampling(seed=1), 0)]
    while any(canvas.state == "open" for canvas in canvases):
        subject.step(canvases, [None, None])  # type: ignore[list-item]
    assert [canvas.result[:2] for canvas in canvases] == [(20, 21), (3, 3)]
    assert run(subject, subject.open(0, Sampling(seed=1), 0)).result[:2] == (3, 3), "the slot's next request has none"


def test_a_repeated_id_goes_and_the_first_one_stays() -> None:
    for sampling in (Sampling(seed=1, frequency_penalty=45.0), Sampling(seed=1, presence_penalty=45.0)):
        assert result(ScriptedModel(mild), sampling) == (3, 21, 7, 23, 9, 25, 1, 1), "what ends a reply may repeat"


def test_a_negative_penalty_makes_repeating_likelier() -> None:
    def repeats(call: int, ids: Tensor, soft: Tensor) -> Tensor:
        return peaked([5, *range(30, 30 + C - 1)]) + torch.zeros(C, V).scatter(1, torch.full((C, 1), 5), 20.0)

    assert result(ScriptedModel(repeats), Sampling(seed=1))[1] == 30
    assert set(result(ScriptedModel(repeats), Sampling(seed=1, presence_penalty=-15.0))) == {5}


def test_what_the_reply_said_before_counts() -> None:
    said = {3: 2, 9: 1}
    assert result(ScriptedModel(mild), Sampling(seed=1, presence_penalty=45.0), said=said)[4] == 24
    assert result(ScriptedModel(mild), Sampling(seed=1, frequency_penalty=25.0), said=said)[:5] == (20, 21, 7, 7, 9)


def slow_costs(ids: list[int], counts: list[bool], presence: float, frequency: float, seen: set[int]) -> Tensor:
    """By the definition: for each position and id, how often it stood before."""
    cost = torch.zeros(len(ids), V)
    for position in range(len(ids)):
        before = [token for token, counted in zip(ids[:position], counts[:position], strict=True) if counted]
        for token in set(before):
            cost[position, token] = frequency * before.count(token) + (0.0 if token in seen else presence)
    return cost


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12),
    st.floats(-2, 2, width=32),
    st.floats(-2, 2, width=32),
    st.sets(st.integers(0, 5)),
    st.integers(0, 99),
)
def test_penalties_are_nats_off_the_softcapped_logits(
    row: list[tuple[int, bool]], presence: float, frequency: float, seen: set[int], seed: int
) -> None:
    ids, counts = [token for token, _ in row], [counted for _, counted in row]
    logits = 12 * torch.randn(1, len(ids), V, generator=torch.Generator().manual_seed(seed))
    penalties = sampler.Penalties(
        torch.tensor([presence]), torch.tensor([frequency]), torch.tensor([[each in seen for each in range(V)]])
    )
    lowered = sampler.penalise_repeats(logits, torch.tensor([ids]), torch.tensor([counts]), penalties, 30.0)
    capped = 30 * (logits / 30).tanh() - slow_costs(ids, counts, presence, frequency, seen)
    torch.testing.assert_close(30 * (lowered / 30).tanh(), capped.clamp(-30, 30), atol=1e-3, rtol=0)


def test_what_stands_behind_the_end_does_not_count() -> None:
    ids = torch.tensor([[5, 6, 1, 5, 0]])
    accepted = torch.tensor([[True, False, True, True, True]])
    assert sampler.counted(ids, accepted, torch.tensor([0, 1])).tolist() == [[True, False, False, False, False]]


def test_a_request_brings_its_own_schedule() -> None:
    model = ScriptedModel(noisy)
    subject = denoiser(model)
    canvas = subject.open(0, Sampling(seed=1), 0, schedule=Schedule(max_denoising_steps=3))
    assert run(subject, canvas).state == "unconverged"
    assert canvas.steps == 6, "two attempts of three passes"
    own = [sampler.temperature_at(step, replace(subject._schedule, max_denoising_steps=3)) for step in (1, 2, 3)]
    assert subject._state.temperatures[0, :3].tolist() == own
    assert run(subject, subject.open(0, Sampling(seed=1), 0)).steps == 12, "the next request has the checkpoint's"


@pytest.mark.parametrize(("stability", "passes"), [(0, 1), (1, 2), (4, 5)])
def test_its_own_stop_rule(stability: int, passes: int) -> None:
    subject = denoiser(ScriptedModel(mild))
    assert (
        run(subject, subject.open(0, Sampling(seed=1), 0, schedule=Schedule(stability_threshold=stability))).steps
        == passes
    )


def test_its_own_bounds_on_slots_side_by_side() -> None:
    def unsure(call: int, ids: Tensor, soft: Tensor) -> Tensor:
        return peaked(range(C)) / 8  # mean entropy of about 1.9 nats at the first temperature

    subject = denoiser(ScriptedModel(unsure))
    generous = Schedule(confidence_threshold=3.0, entropy_bound=100.0)
    canvases = [subject.open(0, Sampling(seed=1), 0, schedule=generous), subject.open(1, Sampling(seed=1), 0)]
    subject.step(canvases, [None, None])  # type: ignore[list-item]
    assert subject._state.kept[0].all()
    assert subject._state.kept[1].sum() == 1
    subject.step(canvases, [None, None])  # type: ignore[list-item]
    assert [canvas.state for canvas in canvases] == ["done", "open"]


def test_logprobs_are_the_models_own_at_temperature_1() -> None:
    model = ScriptedModel(mild)
    subject = denoiser(model)
    sampling = Sampling(seed=1, logit_bias=((3, -100.0),))
    canvas = run(subject, subject.open(0, sampling, 0, logprobs=2))
    found = subject.logprobs(canvas)
    expected = (SOFTCAP * (mild(0, torch.zeros(C), torch.zeros(C, V)) / SOFTCAP).tanh()).log_softmax(-1)
    assert len(found) == C
    for position, each in enumerate(found):
        assert each.logprob == pytest.approx(expected[position, canvas.result[position]].item(), abs=1e-4)
        assert [token for token, _ in each.top] == [WANTS[position], 20 + position], "before any bias"
        assert each.top[0][1] == pytest.approx(0.0, abs=1e-4)


def test_logprobs_of_a_canvas_among_others() -> None:
    subject = denoiser(ScriptedModel(mild))
    other, canvas = subject.open(2, Sampling(seed=1), 0), subject.open(0, Sampling(seed=2), 0, logprobs=0)
    while canvas.state == "open":
        subject.step([other, canvas], [None, None])  # type: ignore[list-item]
    assert {each.top for each in subject.logprobs(canvas)} == {()}


def request(**changes: object) -> GenerationRequest:
    return replace(
        GenerationRequest(id="a", prompt_ids=(1,), max_tokens=1, sampling=Sampling(seed=0)),
        **changes,  # type: ignore[arg-type]
    )


BAD: Sequence[tuple[dict[str, object], str]] = [
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"sampling": Sampling(seed=0, logit_bias=((V, 1.0),))}, "logit_bias"),
    ({"sampling": Sampling(seed=0, logit_bias=((0, float("nan")),))}, "logit_bias"),
    ({"sampling": Sampling(seed=0, presence_penalty=float("inf"))}, "penalties"),
    ({"schedule": Schedule(max_denoising_steps=0)}, "max_denoising_steps"),
    ({"schedule": Schedule(max_denoising_steps=257)}, "max_denoising_steps"),
    ({"schedule": Schedule(stability_threshold=-1)}, "stability_threshold"),
    ({"schedule": Schedule(entropy_bound=float("nan"))}, "entropy_bound"),
    ({"schedule": Schedule(confidence_threshold=-1.0)}, "confidence_threshold"),
]


@pytest.mark.parametrize(("changes", "field"), BAD)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, object], field: str) -> None:
    check_request(request(), V, C)
    with pytest.raises(EngineError, match=field):
        check_request(request(**changes), V, C)


def test_penalties_that_keep_a_canvas_from_converging_are_left_out_of_its_redraw() -> None:
    def restless(call: int, ids: Tensor, soft: Tensor) -> Tensor:
        """Sure of id 5 everywhere; where that is taken away, of nothing."""
        return torch.zeros(C, V).scatter(1, torch.full((C, 1), 5), 20.0)

    sampling = Sampling(seed=1, presence_penalty=19.5)
    subject = denoiser(ScriptedModel(restless))
    canvas = run(subject, subject.open(0, sampling, 0))
    assert (canvas.state, canvas.attempt, set(canvas.result)) == ("done", 1, {5})
    again = subject.open(0, sampling, 1)
    assert run(subject, again).attempt == 1, "the next canvas is penalised again"
