"""Reading logits in Triton against the same computed exactly, in float64, and against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from engine.kernels import output_filters, reference_output
from engine.kernels import soft_embedding as adaptive
from engine.kernels.output import read_logits, soft_embedding, tile_size
from engine.kernels.reference_output import Draw, Reading
from tests.engine.conftest import GPU

CAP = 30.0
NEARLY_ONE = 1 - 2.0**-24
BANNED = float("-inf")
# A height is right to 2 units of the last place of 30, odds are an exponential of that over a temperature of 0.4.
NOISE = 1e-5
RELATIVE = 4e-5
# numpy, which the interpreter computes with, warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


def make_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[rows, vocab] of eight sorts, one after the other: noise, wide noise, one sure id, two, flat, all equal, tiny
    numbers, numbers that the softcap makes all but equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 4
    logits[1::8] *= 5
    logits[2::8, vocab // 3] = 90.0
    logits[3::8, 1] = logits[3::8, vocab - 1] = 70.0
    logits[4::8] *= 0.01
    logits[5::8] = -7.0
    logits[6::8] *= 1e-9
    logits[7::8] = torch.where(logits[7::8] > 5, 500.0, -500.0)
    return logits.to(dtype)


def make_draw(rows: int, device: torch.device, *, shaped: bool = False, seed: int = 0, **how: object) -> Draw:
    """Random temperatures of the schedule and uniforms; `how`: a value or one for each row."""
    generator = torch.Generator().manual_seed(seed)
    default = {"request_temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    values = {
        name: torch.as_tensor(how.get(name, value), dtype=torch.int32 if name == "top_k" else torch.float32)
        .expand(rows)
        .contiguous()
        for name, value in default.items()
    }
    values["temperature"] = 0.4 + 0.4 * torch.rand(rows, generator=generator)
    values["uniforms"] = torch.rand(rows, generator=generator)
    values |= {name: value for name, value in how.items() if isinstance(value, Tensor) and name in ("uniforms", "bias")}
    return Draw(**{name: value.to(device) for name, value in values.items()}, shaped=shaped)


@dataclass(frozen=True)
class Exact:
    """A row in float64."""

    heights: Tensor  # [R, V], softcapped and biased
    probabilities: Tensor
    entropy: Tensor
    draw: Draw

    def kept(self, row: int, slack: float) -> Tensor:
        """Weights [V] of what may be drawn; a threshold is passed by what misses it by less than `slack`."""
        draw = self.draw
        top = self.heights[row].max()
        rate = (draw.request_temperature[row].double() * draw.temperature[row].double()).clamp(min=1e-30)
        odds = ((self.heights[row] - top) / rate).exp()
        order = odds.argsort(descending=True)
        k, p = int(draw.top_k[row]), draw.top_p[row].double()
        keep = torch.ones_like(odds, dtype=torch.bool)
        if 0 < k < len(odds):
            keep &= odds >= (odds[order[k - 1]] * (1 - slack)).clamp(max=1)
        if p < 1:
            left = odds[order] * keep[order]
            before = (left.cumsum(0) - left) / left.sum()
            least = odds[order[max(int((before < p + slack).sum()) - 1, 0)]]
            keep &= odds >= (least * (1 - slack)).clamp(max=1)
        keep &= odds >= (draw.min_p[row].double() * (1 - slack)).clamp(max=1)
        return odds * keep


def exact(logits: Tensor, draw: Draw) -> Exact:
    heights = (logits.double() / CAP).tanh() * CAP
    if draw.bias is not None:
        heights += draw.bias.double().repeat_interleave(len(heights) // len(draw.bias), 0)
    probabilities = (heights / draw.temperature[:, None].double()).softmax(-1)
    return Exact(heights, probabilities, torch.special.entr(probabilities).sum(-1), draw)


def assert_reads(logits: Tensor, draw: Draw, reading: Reading) -> None:
    truth, rows = exact(logits, draw), torch.arange(len(logits))
    best, drawn = reading.best, reading.drawn
    assert best.dtype == drawn.dtype == torch.int64
    assert reading.probabilities.dtype == logits.dtype
    assert (truth.heights[rows, best] >= truth.heights.amax(-1) - NOISE).all()
    torch.testing.assert_close(reading.entropy.double(), truth.entropy, atol=1e-5, rtol=RELATIVE)
    rounding = RELATIVE + (2**-8 if logits.dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(reading.probabilities.double(), truth.probabilities, atol=1e-30, rtol=rounding)
    for row in range(len(logits)):
        if draw.request_temperature[row] == 0:
            assert drawn[row] == best[row]
        else:
            assert_drawn(truth, row, int(drawn[row]))


def assert_drawn(truth: Exact, row: int, drawn: int) -> None:
    """`drawn` is where the uniform falls in the running sum, with either of the sets that rounding may have kept."""
    uniform = truth.draw.uniforms[row].double()
    fits = []
    for slack in (-2e-5, 0.0, 2e-5):
        weights = truth.kept(row, slack)
        running = weights.cumsum(0) / weights.sum()
        before = running[drawn] - weights[drawn] / weights.sum()
        fits.append(bool(weights[drawn] > 0 and before - 1e-4 <= uniform <= running[drawn] + 1e-4))
    assert any(fits), (row, drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [61, 256, 777])
def test_reading(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = make_logits(8, vocab, dtype).to(device)
    draw = make_draw(8, device)
    reading = read_logits(logits, CAP, draw)
    assert_reads(logits, draw, reading)
    expected = reference_output.read_logits(logits, CAP, draw)
    settled = exact(logits, draw).heights.topk(2, -1).values.diff(dim=-1)[:, 0].abs() > NOISE
    assert torch.equal(reading.best[settled], expected.best[settled]) and settled.sum() >= 4
    assert (reading.drawn == expected.drawn).sum() >= 7


@pytest.mark.parametrize(("vocab", "canvases"), [(512, 2), (400, 1)])
def test_bias_of_each_canvas(vocab: int, canvases: int, device: torch.device) -> None:
    """Large enough to decide; banned ids, one by one and whole tiles of them."""
    bias = torch.randn(canvases, vocab, generator=torch.Generator().manual_seed(3)) * 20
    bias[:, 5::3] = BANNED
    bias[-1, : 2 * tile_size(vocab)] = BANNED
    logits = make_logits(8, vocab, torch.bfloat16).to(device)
    draw = make_draw(8, device, bias=bias)
    reading = read_logits(logits, CAP, draw)
    assert_reads(logits, draw, reading)
    banned = (bias == BANNED).repeat_interleave(8 // canvases, 0)
    assert (reading.probabilities.cpu()[banned] == 0).all()
    assert not banned[torch.arange(8), reading.drawn.cpu()].any()


def test_only_one_id_allowed_and_none(device: torch.device) -> None:
    logits = make_logits(4, 300).to(device)
    bias = torch.full((2, 300), BANNED)
    bias[1, 299] = -100.0
    for shaped in (False, True):
        reading = read_logits(logits, CAP, make_draw(4, device, bias=bias, shaped=shaped, top_p=0.9))
        assert not reading.entropy[:2].isfinite().any()
        assert (reading.entropy[2:] == 0).all()
        assert (reading.best[2:] == 299).all() and (reading.drawn[2:] == 299).all()
        assert ((reading.drawn >= 0) & (reading.drawn < 300)).all()
        assert ((reading.best >= 0) & (reading.best < 300)).all()


@pytest.mark.parametrize(
    ("bad", "filters"),
    [(float("nan"), {}), (float("inf"), {}), (float("-inf"), {}), (float("nan"), {"top_k": 3, "top_p": 0.5})],
)
def test_one_bad_logit_spoils_its_row_and_no_other(bad: float, filters: dict[str, float], device: torch.device) -> None:
    clean = make_logits(3, 200).to(device)
    spoiled = clean.clone()
    spoiled[1, 190] = bad
    bias = torch.zeros(1, 200)
    bias[0, 190] = BANNED  # which does not hide it
    for how in ({}, {"bias": bias}):
        draw = make_draw(3, device, shaped=bool(filters), **filters, **how)
        before, after = read_logits(clean, CAP, draw), read_logits(spoiled, CAP, draw)
        assert after.entropy.isfinite().tolist() == [True, False, True]
        assert 0 <= after.best[1] < 200 and 0 <= after.drawn[1] < 200
        others = torch.tensor([0, 2], device=device)
        for mine, theirs in zip(vars(before).values(), vars(after).values(), strict=True):
            assert torch.equal(mine[others], theirs[others])


def test_ties_go_to_the_lowest_id(device: torch.device) -> None:
    """In one tile and across them; also where only the softcap's rounding makes the tie."""
    logits = torch.zeros(6, 777)
    for row, ids in enumerate(([3, 4], [700, 20], [130, 600, 250], [127, 128])):
        logits[row, ids] = 9.0
    logits[4, 500], logits[4, 90] = 900.0, 800.0  # both 30 in float32
    expected = [3, 20, 130, 127, 90, 0]
    assert read_logits(logits.to(device), CAP, make_draw(6, device)).best.tolist() == expected
    assert reference_output.read_logits(logits, CAP, make_draw(6, torch.device("cpu"))).best.tolist() == expected
    greedy = make_draw(6, device, shaped=True, request_temperature=0.0, top_k=5, top_p=0.5)
    assert read_logits(logits.to(device), CAP, greedy).drawn.tolist() == expected


@pytest.mark.parametrize("uniform", [0.0, NEARLY_ONE])
def test_the_ends_of_the_draw(uniform: float, device: torch.device) -> None:
    """An id of no probability is never drawn, whatever surrounds the others."""
    likely = torch.full((1, 300), -1000.0)  # whose odds are far below what float32 has
    likely[0, [130, 200]] = 0.0
    draw = make_draw(
        4,
        device,
        bias=likely,
        uniforms=torch.full((4,), uniform),
        shaped=True,
        request_temperature=torch.tensor([1.0, 0.5, 1.0, 1.0]),
        top_k=torch.tensor([0, 0, 2, 250]),
        min_p=torch.tensor([0.0, 0.0, 0.5, 0.0]),
    )
    drawn = read_logits(torch.zeros(4, 300, device=device), CAP, draw).drawn
    assert (drawn == (130 if uniform == 0 else 200)).all()
    logits = make_logits(8, 300).to(device)
    draw = make_draw(8, device, uniforms=torch.full((8,), uniform))
    reading = read_logits(logits, CAP, draw)
    assert (reading.probabilities[torch.arange(8), reading.drawn] > 0).all()
    assert_reads(logits, draw, reading)


# (temperature, top_k, top_p, min_p) of a request
FILTERS = [
    (0.0, 5, 0.5, 0.5), (0.3, 0, 1.0, 0.0), (2.0, 0, 1.0, 0.0), (1e-39, 0, 1.0, 0.0), (1e-39, 9, 0.9, 0.1),
    (1.0, 1, 1.0, 0.0), (1.0, 20, 1.0, 0.0), (1.0, 299, 1.0, 0.0), (1.0, 300, 1.0, 0.0), (1.0, 4000, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0), (1.0, 0, 1e-6, 0.0), (1.0, 0, 0.7, 0.0), (1.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 1e-6), (1.0, 0, 1.0, 0.05), (1.0, 0, 1.0, 1.0),
    (0.5, 0, 0.8, 0.01), (1.5, 250, 0.95, 0.0), (2.0, 20, 0.9, 0.2), (0.8, 200, 1.0, 1e-3), (1.5, 3, 0.6, 0.0),
]  # fmt: skip
SORTS = (0, 1, 4, 5, 7)  # of logits, where filters have something to do


def rows_of(draw: Draw, rows: Tensor | slice) -> Draw:
    """Some rows of a draw of one canvas."""
    rowwise = {name: value for name, value in vars(draw).items() if isinstance(value, Tensor) and name != "bias"}
    return replace(draw, **{name: value[rows] for name, value in rowwise.items()})


def filtered(listed: int, device: torch.device) -> tuple[Tensor, Draw]:
    """Logits and draw: a row a filter, the sorts in turn."""
    names = ("request_temperature", "top_k", "top_p", "min_p")
    values = torch.tensor(FILTERS).T
    sorts = [SORTS[(row + listed) % len(SORTS)] for row in range(len(FILTERS))]
    draw = make_draw(len(FILTERS), device, shaped=True, seed=listed, **dict(zip(names, values, strict=True)))
    return make_logits(8, 300)[sorts].to(device), draw


@pytest.mark.parametrize("listed", [32, 4])
def test_filters(listed: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """With a shortlist of the whole row, and with one that often is too short."""
    monkeypatch.setattr(output_filters, "GROUPS", listed)
    logits, draw = filtered(listed, device)
    reading = read_logits(logits, CAP, draw)
    assert_reads(logits, draw, reading)
    expected = reference_output.read_logits(logits, CAP, draw)
    assert (reading.drawn == expected.drawn).sum() >= len(FILTERS) - 1


def test_a_shortlist_is_enough_for_few_ids(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """What reads the row again is not needed: 8 of 19 groups hold all that these filters keep."""
    monkeypatch.setattr(output_filters, "GROUPS", 8)

    class Never:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *_, left=None, **__: None

    monkeypatch.setattr(output_filters, "long_kernel", Never())
    draw = make_draw(
        6,
        device,
        shaped=True,
        top_k=torch.tensor([8, 1, 0, 0, 0, 5]),
        top_p=torch.tensor([1.0, 1.0, 0.9, 0.0, 1.0, 0.7]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.2, 0.1]),
    )
    logits = make_logits(8, 300)[[0, 4, 1, 4, 0, 4]].to(device)
    assert_reads(logits, draw, read_logits(logits, CAP, draw))


def test_a_row_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """To the bit: alone, in another order, and with neighbours that are drawn in other ways."""
    monkeypatch.setattr(output_filters, "GROUPS", 4)
    everything, every_draw = filtered(3, device)
    some = torch.tensor([0, 6, 12, 18], device=device)
    logits, draw = everything[some], rows_of(every_draw, some)
    together = read_logits(logits, CAP, draw)
    for order in ([2, 3, 0, 1], [1]):
        chosen = torch.tensor(order, device=device)
        alone = read_logits(logits[chosen], CAP, rows_of(draw, chosen))
        for mine, theirs in zip(vars(alone).values(), vars(together).values(), strict=True):
            assert torch.equal(mine, theirs[chosen])
    plain = rows_of(make_draw(len(FILTERS), device, seed=3), some)
    rest = read_logits(logits, CAP, plain)
    for name in ("best", "entropy", "probabilities"):
        assert torch.equal(getattr(rest, name), getattr(together, name))
    beside = replace(plain, shaped=True, top_p=draw.top_p)
    unshaped = draw.top_p == 1
    assert torch.equal(read_logits(logits, CAP, beside).drawn[unshaped], rest.drawn[unshaped])


def test_what_it_cannot_read_is_said(device: torch.device) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        read_logits(torch.zeros(4, 8, device=device)[:, ::2], CAP, make_draw(4, device))
    halves = replace(make_draw(4, device), bias=torch.zeros(1, 8, dtype=torch.bfloat16, device=device))
    with pytest.raises(ValueError, match=r"float32 and contiguous, not torch\.bfloat16"):
        read_logits(torch.zeros(4, 8, device=device), CAP, halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_embedding(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = (torch.randn(6, 300, generator=generator) * 3).softmax(-1).to(device, dtype)
    embedding = torch.randn(300, 24, generator=generator).to(device, dtype)
    result = soft_embedding(probabilities, embedding, 2.0)
    expected = probabilities.double() @ embedding.double() * 2.0
    assert result.dtype == dtype
    assert (result - expected).norm() / expected.norm() <= (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("device", [GPU], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_at_the_models_size(dtype: torch.dtype, biased: bool, device: torch.device) -> None:
    rows, vocab = 256, 262144
    logits = make_logits(rows, vocab, dtype).to(device)
    bias = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5))
    bias[0, 100:9000] = BANNED
    more: dict[str, object] = {"bias": bias} if biased else {}
    plain = make_draw(rows, device, **more)
    values = torch.tensor(FILTERS).repeat(12, 1)[:rows].T
    names = ("request_temperature", "top_k", "top_p", "min_p")
    shaped = make_draw(rows, device, shaped=True, **dict(zip(names, values, strict=True)), **more)
    for draw in (plain, shaped):
        reading = read_logits(logits, CAP, draw)
        again = read_logits(logits, CAP, draw)
        assert all(torch.equal(a, b) for a, b in zip(vars(reading).values(), vars(again).values(), strict=True))
        for first in range(0, rows, 16):  # float64 needs room
            part = slice(first, first + 16)
            fields = {name: value[part] for name, value in vars(reading).items()}
            assert_reads(logits[part], rows_of(draw, part), Reading(**fields))


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_a_captured_reading_is_the_same(device: torch.device) -> None:
    """Nothing in it waits for the host; and it follows its inputs."""
    logits, draw = filtered(3, device)
    embedding = torch.randn(300, 64, device=device, dtype=torch.bfloat16)

    def read() -> tuple[Reading, Tensor, Tensor]:
        reading = read_logits(logits, CAP, draw)
        shares = reading.probabilities.bfloat16()
        return reading, soft_embedding(shares, embedding, 2.0), adaptive.soft_embedding(shares, embedding, 2.0)

    read()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, *embedded = read()
    logits.copy_(make_logits(8, 300, seed=1)[[0, 1, 4] * 8][: len(FILTERS)])
    graph.replay()
    expected, *products = read()
    for mine, theirs in zip(vars(captured).values(), vars(expected).values(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(embedded, products, strict=True))
