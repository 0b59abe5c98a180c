"""engine.sampler against transformers' own sampler, schedule and stopping classes, on the same logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from engine import sampler
from engine.config import GenerationDefaults
from engine.kernels.reference_output import Draw, Reading, read_logits

C, V = 16, 61


def schedule(steps: int = 48, t_min: float = 0.4, t_max: float = 0.8) -> GenerationDefaults:
    return GenerationDefaults(
        max_denoising_steps=steps,
        t_min=t_min,
        t_max=t_max,
        entropy_bound=0.1,
        stability_threshold=1,
        confidence_threshold=0.005,
        eos_ids=frozenset({1}),
        pad_id=0,
    )


def read(logits: torch.Tensor, temperature: float) -> Reading:
    """Read logits [C, V] without a softcap that could be felt."""
    rows = logits.shape[0]
    draw = Draw(
        temperature=torch.full((rows,), temperature),
        request_temperature=torch.ones(rows),
        top_k=torch.zeros(rows, dtype=torch.int32),
        top_p=torch.ones(rows),
        min_p=torch.zeros(rows),
        uniforms=torch.zeros(rows),
        shaped=False,
    )
    return read_logits(logits, 1e6, draw)


def make_logits(seed: int, kind: str) -> torch.Tensor:
    """Float32 [C, V] in the softcapped range: plain noise, near one-hot rows, flat rows, repeated rows, a mixture."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(C, V, generator=generator)
    if kind == "noise":
        return noise * 3
    peaked = noise.clone()
    peaked[torch.arange(C), torch.randint(V, (C,), generator=generator)] = 30.0
    if kind == "peaked":
        return peaked
    if kind == "flat":
        return torch.zeros(C, V)
    if kind == "tied rows":
        return (noise * 6)[torch.randint(3, (C,), generator=generator)]
    return torch.where(torch.rand(C, 1, generator=generator) < 0.6, peaked, noise * 4)


KINDS = ["noise", "peaked", "flat", "tied rows", "mixed"]
logits_kinds = st.sampled_from(KINDS)


@pytest.mark.parametrize("steps", [1, 3, 48])
@pytest.mark.parametrize(("t_min", "t_max"), [(0.4, 0.8), (0.1, 1.7), (0.0, 0.3)])
def test_temperature_is_transformers_bit_for_bit(steps: int, t_min: float, t_max: float) -> None:
    oracle = LinearTemperatureScheduleLogitsProcessor(t_min, t_max, steps)
    logits = make_logits(0, "noise")
    for step in range(1, steps + 1):
        remaining = torch.tensor(steps - step + 1, dtype=torch.int32)
        ours = logits / sampler.temperature_at(step, schedule(steps, t_min, t_max))
        assert torch.equal(ours, oracle(None, logits, cur_step=remaining))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), logits_kinds, st.sampled_from([1e-3, 0.1, 1.0, 5.0, 100.0]), st.floats(0.4, 0.8))
def test_acceptance_is_transformers(seed: int, kind: str, bound: float, temperature: float) -> None:
    scaled = make_logits(seed, kind) / temperature
    oracle = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), C, V, 48)
    oracle.accept_canvas(torch.zeros(1, C, dtype=torch.int64), torch.ones(1, C, dtype=torch.int64), scaled[None], 1)
    reading = read(make_logits(seed, kind), temperature)
    assert (
        sampler.accept(reading.entropy[None], torch.tensor([bound]))[0].tolist()
        == oracle.accepted_token_mask[0].tolist()
    )


def test_acceptance_order_by_hand() -> None:
    entropy = torch.tensor([0.06, 0.5, 0.03, 0.06, 0.0, 0.06])
    # ascending 0, .03, .06, .06, .06, .5 with sums before them 0, 0, .03, .09, .15: the rightmost of the ties goes
    flat = torch.full((6,), 9.0)
    assert sampler.accept(torch.stack((entropy, flat)), torch.tensor([0.1, 0.1])).tolist() == [
        [True, False, True, True, True, False],
        [True, False, False, False, False, False],
    ]


def thresholds(rule: GenerationDefaults) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([rule.confidence_threshold]), torch.tensor([rule.stability_threshold])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), logits_kinds), min_size=1, max_size=6), st.integers(0, 3), st.data())
def test_stop_decision_is_transformers(passes: list[tuple[int, str]], threshold: int, data: st.DataObject) -> None:
    confidence = data.draw(st.sampled_from([1e-9, 0.005, 0.5, 2.0, 100.0]))
    oracle = StableAndConfidentStoppingCriteria(threshold, confidence)
    previous, unchanged = torch.full((1, C), -1), torch.zeros(1, dtype=torch.int64)
    rule = replace(schedule(), stability_threshold=threshold, confidence_threshold=confidence)
    for seed, kind in passes:
        scaled = make_logits(seed, kind) / 0.6
        reading = read(make_logits(seed, kind), 0.6)
        verdict = sampler.judge(reading.best[None], reading.entropy[None], previous, unchanged, *thresholds(rule))
        previous, unchanged = reading.best[None], verdict.unchanged
        assert verdict.done.item() == oracle(scaled.argmax(-1)[None], scaled[None]).item()
        assert verdict.finite.item()


def test_confidence_is_compared_in_float32() -> None:
    best, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    verdict = sampler.judge(best, torch.tensor([[0.005]]), best, none, *thresholds(schedule()))
    assert verdict.unchanged.item() == 1
    assert not verdict.done.item(), "the mean equals the threshold: not below it"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_entropy_is_noticed(bad: float) -> None:
    best, none = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    entropy = torch.zeros(2, 3)
    entropy[1, 2] = bad
    verdict = sampler.judge(best, entropy, best, none, *thresholds(schedule()))
    assert verdict.finite.tolist() == [True, False]
    assert verdict.done.tolist() == [True, False]
