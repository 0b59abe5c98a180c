"""engine.sampler against transformers' own sampler, schedule and stopping classes, on the same logits."""

from __future__ import annotations

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
from engine.interface import Sampling

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
    entropy = sampler.row_statistics(scaled).entropy
    assert sampler.accept(entropy, bound).tolist() == oracle.accepted_token_mask[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_row_statistics(kind: str) -> None:
    scaled = make_logits(3, kind) / 0.5
    stats = sampler.row_statistics(scaled)
    exact = scaled.double().softmax(-1)
    assert torch.equal(stats.best, scaled.argmax(-1))
    torch.testing.assert_close(stats.probabilities.double(), exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), torch.special.entr(exact).sum(-1), atol=1e-5, rtol=1e-5)


def test_acceptance_order_by_hand() -> None:
    entropy = torch.tensor([0.06, 0.5, 0.03, 0.06, 0.0, 0.06])
    # ascending 0, .03, .06, .06, .06, .5 with sums before them 0, 0, .03, .09, .15: the rightmost of the ties goes
    assert sampler.accept(entropy, 0.1).tolist() == [True, False, True, True, True, False]
    assert sampler.accept(torch.full((4,), 9.0), 0.1).tolist() == [True, False, False, False]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), logits_kinds), min_size=1, max_size=6), st.integers(0, 3), st.data())
def test_stop_decision_is_transformers(passes: list[tuple[int, str]], threshold: int, data: st.DataObject) -> None:
    confidence = data.draw(st.sampled_from([1e-9, 0.005, 0.5, 2.0, 100.0]))
    oracle = StableAndConfidentStoppingCriteria(threshold, confidence)
    previous, unchanged = None, 0
    for seed, kind in passes:
        scaled = make_logits(seed, kind) / 0.6
        stats = sampler.row_statistics(scaled)
        verdict = sampler.judge(stats, previous, confidence)
        unchanged = unchanged + 1 if verdict.unchanged else 0
        previous = stats.best
        ours = verdict.confident and unchanged >= threshold
        assert ours == oracle(scaled.argmax(-1)[None], scaled[None]).item()
        assert verdict.finite


def test_confidence_is_compared_in_float32() -> None:
    stats = sampler.RowStats(torch.zeros(1, dtype=torch.int64), torch.tensor([0.005]), torch.ones(1, 1))
    assert not sampler.judge(stats, None, 0.005).confident, "the mean equals the threshold: not below it"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_logit_is_noticed(bad: float) -> None:
    logits = make_logits(0, "noise")
    logits[5, 7] = bad
    assert not sampler.judge(sampler.row_statistics(logits), None, 0.005).finite


def drawn(sampling: Sampling, kind: str = "noise", rows: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids drawn many times from one row, and that row [V]."""
    row = make_logits(11, kind)[0]
    scaled = row.expand(rows, V).contiguous()
    uniforms = (torch.arange(rows) + 0.5) / rows  # stratified: frequencies are exact to 1 / rows
    return sampler.draw(scaled, sampler.row_statistics(scaled), uniforms, sampling), row


def test_draw_follows_the_probabilities() -> None:
    for temperature in (1.0, 0.3, 2.0):
        ids, row = drawn(Sampling(seed=0, temperature=temperature))
        frequencies = torch.bincount(ids, minlength=V) / len(ids)
        assert (frequencies - (row / temperature).softmax(-1)).abs().max() <= 1 / len(ids) + 1e-5


def test_temperature_zero_is_argmax_whatever_the_filters() -> None:
    ids, row = drawn(Sampling(seed=0, temperature=0.0, top_k=5, top_p=0.5))
    assert (ids == row.argmax()).all()


def test_top_k_keeps_the_k_best_in_proportion() -> None:
    ids, row = drawn(Sampling(seed=0, top_k=5))
    allowed = row.topk(5)
    frequencies = torch.bincount(ids, minlength=V) / len(ids)
    expected = torch.zeros(V).scatter(0, allowed.indices, allowed.values.softmax(-1))
    assert (frequencies - expected).abs().max() <= 1 / len(ids) + 1e-5
    assert torch.equal(drawn(Sampling(seed=0, top_k=V + 10))[0], drawn(Sampling(seed=0))[0])


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float) -> None:
    ids, row = drawn(Sampling(seed=0, top_p=top_p))
    probabilities = row.softmax(-1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    allowed = order[(before < top_p) | (torch.arange(V) == 0)]
    frequencies = torch.bincount(ids, minlength=V) / len(ids)
    expected = torch.zeros(V).scatter(0, allowed, probabilities[allowed] / probabilities[allowed].sum())
    assert (frequencies - expected).abs().max() <= 1 / len(ids) + 1e-5


def test_top_p_comes_after_top_k_and_temperature() -> None:
    ids, row = drawn(Sampling(seed=0, temperature=0.5, top_k=4, top_p=0.6))
    best = (row / 0.5).topk(4)
    share = best.values.softmax(-1)
    kept = best.indices[(share.cumsum(0) - share) < 0.6]
    assert set(ids.tolist()) == set(kept.tolist())


def test_inverse_cdf_edges() -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    nearly_one = 1 - 2.0**-24
    uniforms = torch.tensor([0.0, 0.2499, 0.25, nearly_one])
    assert sampler.inverse_cdf(weights.expand(4, 5), uniforms).tolist() == [1, 1, 3, 3]
    for seed in range(50):  # totals that are not exactly 1
        row = torch.rand(40, generator=torch.Generator().manual_seed(seed))
        row[20:] = 0
        assert sampler.inverse_cdf(row[None], torch.tensor([nearly_one])).item() <= 19


def test_neighbour_rows_do_not_matter() -> None:
    scaled = make_logits(5, "mixed")
    uniforms = torch.rand(C, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(seed=0, temperature=0.7, top_k=9, top_p=0.8)
    together = sampler.draw(scaled, sampler.row_statistics(scaled), uniforms, sampling)
    for row in range(C):
        alone = scaled[row : row + 1].clone()
        one = sampler.draw(alone, sampler.row_statistics(alone), uniforms[row : row + 1], sampling)
        assert one.item() == together[row].item()
