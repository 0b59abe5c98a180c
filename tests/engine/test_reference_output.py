"""engine.kernels.reference_output against its formulas: statistics, draws and filters, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.reference_output import Draw, Reading, inverse_cdf, read_logits, soft_embedding

C, V = 16, 61
SOFTCAP = 30.0


def make_logits(seed: int, kind: str) -> Tensor:
    """Float32 [C, V]: plain noise, near one-hot rows, flat rows, a mixture."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(C, V, generator=generator)
    if kind == "noise":
        return noise * 3
    peaked = noise.clone()
    peaked[torch.arange(C), torch.randint(V, (C,), generator=generator)] = 60.0
    if kind == "peaked":
        return peaked
    if kind == "flat":
        return torch.zeros(C, V)
    return torch.where(torch.rand(C, 1, generator=generator) < 0.6, peaked, noise * 4)


def read(
    logits: Tensor,
    uniforms: Tensor | None = None,
    *,
    temperature: float = 1.0,
    request_temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bias: Tensor | None = None,
) -> Reading:
    rows = logits.shape[0]
    return read_logits(
        logits,
        SOFTCAP,
        Draw(
            temperature=torch.full((rows,), temperature),
            request_temperature=torch.full((rows,), request_temperature),
            top_k=torch.full((rows,), top_k, dtype=torch.int32),
            top_p=torch.full((rows,), top_p),
            min_p=torch.full((rows,), min_p),
            uniforms=torch.zeros(rows) if uniforms is None else uniforms,
            shaped=(request_temperature, top_k, top_p, min_p) != (1.0, 0, 1.0, 0.0),
            bias=bias,
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["noise", "peaked", "flat", "mixed"])
def test_statistics(kind: str, dtype: torch.dtype) -> None:
    logits = make_logits(3, kind).to(dtype)
    reading = read(logits, temperature=0.5)
    exact = ((logits.double() / SOFTCAP).tanh() * SOFTCAP / 0.5).softmax(-1)
    assert torch.equal(reading.best, logits.argmax(-1))
    assert reading.probabilities.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(reading.probabilities.double(), exact, atol=1e-6, rtol=rounding)
    torch.testing.assert_close(reading.entropy.double(), torch.special.entr(exact).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_logit_makes_its_rows_entropy_bad_and_no_others(bad: float) -> None:
    logits = make_logits(0, "noise")
    logits[5, 7] = bad
    assert read(logits).entropy.isfinite().tolist() == [row != 5 for row in range(C)]


@pytest.mark.parametrize("canvases", [1, 4])
def test_bias_is_added_to_the_softcapped_logits_of_its_canvas(canvases: int) -> None:
    logits = make_logits(8, "mixed")
    bias = torch.randn(canvases, V, generator=torch.Generator().manual_seed(2)) * 20
    bias[:, 3] = 90.0
    bias[-1, 3] = float("-inf")
    reading = read(logits, temperature=0.5, bias=bias)
    capped = (logits.double() / SOFTCAP).tanh() * SOFTCAP
    exact = ((capped + bias.repeat_interleave(C // canvases, 0)) / 0.5).softmax(-1)
    assert torch.equal(reading.best, exact.argmax(-1))
    torch.testing.assert_close(reading.probabilities.double(), exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(reading.entropy.double(), torch.special.entr(exact).sum(-1), atol=1e-5, rtol=1e-5)


def test_banned_ids_have_no_share_in_anything() -> None:
    logits = make_logits(9, "noise")
    bias = torch.zeros(1, V)
    bias[0, 1::2] = float("-inf")
    kept = bias[0] == 0
    reading = read(logits, torch.full((C,), 1 - 2.0**-24), bias=bias)
    alone = read(logits[:, kept].contiguous(), torch.full((C,), 1 - 2.0**-24))
    assert (reading.probabilities[:, ~kept] == 0).all()
    torch.testing.assert_close(reading.probabilities[:, kept], alone.probabilities)
    torch.testing.assert_close(reading.entropy, alone.entropy)
    assert torch.equal(reading.best, alone.best * 2)
    assert (reading.drawn % 2 == 0).all()
    for how in ({"request_temperature": 0.0}, {"top_k": 5}, {"top_p": 0.999}, {"min_p": 1e-6}):
        assert (read(logits, torch.rand(C), bias=bias, **how).drawn % 2 == 0).all()  # type: ignore[arg-type]


def test_only_one_id_allowed_and_none() -> None:
    bias = torch.full((1, V), float("-inf"))
    assert not read(make_logits(9, "noise"), bias=bias).entropy.isfinite().any()
    bias[0, 40] = -100.0
    reading = read(make_logits(9, "noise"), torch.rand(C), bias=bias)
    assert (reading.best == 40).all() and (reading.drawn == 40).all() and (reading.entropy == 0).all()


def test_a_banned_id_does_not_hide_that_its_logit_is_not_finite() -> None:
    logits, bias = make_logits(0, "noise"), torch.zeros(1, V)
    logits[5, 7], bias[0, 7] = float("inf"), float("-inf")
    assert read(logits, bias=bias).entropy.isfinite().tolist() == [row != 5 for row in range(C)]


def test_a_bias_of_zeros_is_none() -> None:
    logits = make_logits(4, "mixed")
    without, zeros = read(logits, temperature=0.7), read(logits, temperature=0.7, bias=torch.zeros(1, V))
    assert all(torch.equal(a, b) for a, b in zip(vars(without).values(), vars(zeros).values(), strict=True))


def test_what_the_softcap_makes_equal_is_a_tie() -> None:
    logits = torch.zeros(1, V)
    logits[0, 9], logits[0, 20] = 800.0, 900.0  # both 30 in float32
    assert read(logits).best.item() == 9


def drawn(rows: int = 4000, **how: float) -> tuple[Tensor, Tensor]:
    """Ids drawn many times from one row, and that row [V], softcapped."""
    row = make_logits(11, "noise")[0]
    uniforms = (torch.arange(rows) + 0.5) / rows  # stratified: frequencies are exact to 1 / rows
    ids = read(row.expand(rows, V).contiguous(), uniforms, **how).drawn  # type: ignore[arg-type]
    return ids, (row / SOFTCAP).tanh() * SOFTCAP


def frequencies(ids: Tensor) -> Tensor:
    return torch.bincount(ids, minlength=V) / len(ids)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_draw_follows_the_probabilities(temperature: float) -> None:
    ids, row = drawn(request_temperature=temperature)
    assert (frequencies(ids) - (row / temperature).softmax(-1)).abs().max() <= 1 / len(ids) + 1e-5


def test_temperature_zero_is_argmax_whatever_the_filters() -> None:
    ids, row = drawn(request_temperature=0.0, top_k=5, top_p=0.5)
    assert (ids == row.argmax()).all()


def test_top_k_keeps_the_k_best_in_proportion() -> None:
    ids, row = drawn(top_k=5)
    allowed = row.topk(5)
    expected = torch.zeros(V).scatter(0, allowed.indices, allowed.values.softmax(-1))
    assert (frequencies(ids) - expected).abs().max() <= 1 / len(ids) + 1e-5
    assert torch.equal(drawn(top_k=V + 10)[0], drawn()[0])


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float) -> None:
    ids, row = drawn(top_p=top_p)
    probabilities = row.softmax(-1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    allowed = order[(before < top_p) | (torch.arange(V) == 0)]
    expected = torch.zeros(V).scatter(0, allowed, probabilities[allowed] / probabilities[allowed].sum())
    assert (frequencies(ids) - expected).abs().max() <= 1 / len(ids) + 1e-5


def test_top_p_comes_after_top_k_and_temperature() -> None:
    ids, row = drawn(request_temperature=0.5, top_k=4, top_p=0.6)
    best = (row / 0.5).topk(4)
    share = best.values.softmax(-1)
    kept = best.indices[(share.cumsum(0) - share) < 0.6]
    assert set(ids.tolist()) == set(kept.tolist())


@pytest.mark.parametrize("min_p", [1e-3, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_likely_enough_beside_the_best(min_p: float) -> None:
    ids, row = drawn(min_p=min_p)
    probabilities = row.softmax(-1)
    allowed = probabilities.where(probabilities >= min_p * probabilities.max(), 0.0)
    assert 0 < (allowed > 0).sum() < V
    assert (frequencies(ids) - allowed / allowed.sum()).abs().max() <= 1 / len(ids) + 1e-5


def test_min_p_acts_at_the_requests_temperature_together_with_the_others() -> None:
    ids, row = drawn(request_temperature=2.0, min_p=0.3, top_p=0.9, top_k=20)
    shares = (row / 2.0).softmax(-1)
    best = shares.topk(20)
    ranked = best.values / best.values.sum()
    kept = best.indices[(ranked.cumsum(0) - ranked < 0.9) & (ranked >= 0.3 * ranked[0])]
    assert 1 < len(kept) < 20
    assert set(ids.tolist()) == set(kept.tolist())


def test_ties_stay_whatever_the_filter() -> None:
    row = torch.zeros(V)
    row[[4, 9, 30]] = 5.0
    uniforms = (torch.arange(300) + 0.5) / 300
    for how in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.0}, {"top_p": 0.1}, {"min_p": 1.0}):
        ids = read(row.expand(300, V).contiguous(), uniforms, **how).drawn  # type: ignore[arg-type]
        assert set(ids.tolist()) == {4, 9, 30}


def test_a_temperature_next_to_0_is_argmax() -> None:
    logits = make_logits(2, "noise")
    assert torch.equal(read(logits, torch.rand(C), request_temperature=1e-39).drawn, logits.argmax(-1))


def test_inverse_cdf_edges() -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    nearly_one = 1 - 2.0**-24
    uniforms = torch.tensor([0.0, 0.2499, 0.25, nearly_one])
    assert inverse_cdf(weights.expand(4, 5), uniforms).tolist() == [1, 1, 3, 3]
    for seed in range(50):  # totals that are not exactly 1
        row = torch.rand(40, generator=torch.Generator().manual_seed(seed))
        row[20:] = 0
        assert inverse_cdf(row[None], torch.tensor([nearly_one])).item() <= 19


def test_rows_that_are_drawn_in_different_ways_do_not_touch_each_other() -> None:
    logits = make_logits(5, "mixed")
    generator = torch.Generator().manual_seed(1)
    draw = Draw(
        temperature=0.4 + 0.4 * torch.rand(C, generator=generator),
        request_temperature=torch.tensor([0.0, 1.0, 0.7, 2.0]).repeat(C // 4),
        top_k=torch.tensor([0, 9, 0, 3, 1000], dtype=torch.int32).repeat(4)[:C],
        top_p=torch.tensor([1.0, 0.8, 0.0]).repeat(6)[:C],
        min_p=torch.tensor([0.0] * 5 + [0.2, 1.0]).repeat(3)[:C],
        uniforms=torch.rand(C, generator=generator),
        shaped=True,
    )
    together = read_logits(logits, SOFTCAP, draw)
    for row in range(C):
        alone = slice(row, row + 1)
        how = tuple(float(each[row]) for each in (draw.request_temperature, draw.top_k, draw.top_p, draw.min_p))
        one = read_logits(
            logits[alone].clone(),
            SOFTCAP,
            Draw(
                temperature=draw.temperature[alone],
                request_temperature=draw.request_temperature[alone],
                top_k=draw.top_k[alone],
                top_p=draw.top_p[alone],
                min_p=draw.min_p[alone],
                uniforms=draw.uniforms[alone],
                shaped=how != (1.0, 0.0, 1.0, 0.0),
            ),
        )
        for mine, theirs in zip(vars(one).values(), vars(together).values(), strict=True):
            assert torch.equal(mine[0], theirs[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_embedding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(6, 11, generator=generator).softmax(-1).to(dtype)
    embedding = torch.randn(11, 8, generator=generator).to(dtype)
    out = soft_embedding(probabilities, embedding, 2.0)
    assert out.dtype == dtype
    expected = probabilities.float() @ embedding.float() * 2.0
    assert (out.float() - expected).norm() / expected.norm() <= (1e-5 if dtype == torch.float32 else 1e-2)
