"""Canvases with held positions, through the engine: read after one pass, or denoised to their end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.interface import CanvasRead, CanvasRequest, EngineError, Event, Finished, Sampling
from tests.engine.test_engine import EOS, C, ScriptedModel, V, make, reply, request, run, sure

ODDS = torch.tensor([0.1, 0.2, 0.3, 0.4])  # of ids 10..13, at every position


def asked(**changes: object) -> CanvasRequest:
    whole = CanvasRequest(id="r", prompt_ids=(5, 6, 7), canvas=(None, 20, None), sampling=Sampling(seed=3))
    return replace(whole, **changes)  # type: ignore[arg-type]


def read(events: list[Event]) -> tuple[CanvasRead, Finished]:
    found, finished = (event for event in events if event.request_id == "r")
    assert isinstance(found, CanvasRead)
    assert isinstance(finished, Finished)
    assert finished.reason == "stop"
    return found, finished


class Watching(ScriptedModel):
    """Finds ODDS everywhere and remembers the canvases it saw."""

    def __init__(self) -> None:
        super().__init__(self.look)
        self.seen: list[list[int]] = []

    def look(self, prefix: list[int], canvas: Tensor) -> Tensor:
        self.seen.append(canvas.tolist())
        logits = torch.full((C, V), -100.0)
        logits[:, 10:14] = ODDS.log()
        return logits


def test_one_pass_and_the_odds_of_what_is_allowed() -> None:
    model = Watching()
    engine = make(model)
    engine.submit(asked(allowed=((10, 13), (12,))))
    found, finished = read(run(engine))
    assert model.passes == found.steps == 1
    assert found.token_ids == (13, 20, 13), "the likeliest of all, allowed or not"
    assert [pytest.approx(row, abs=1e-3) for row in found.allowed] == [
        ODDS[[0, 3]].log().tolist(),
        ODDS[[2]].log().tolist(),
    ]
    assert found.logprobs[0] == pytest.approx(ODDS[3].log().item(), abs=1e-3)
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens, finished.usage.denoise_steps) == (3, 2, 1)


def test_what_is_held_is_on_the_canvas_and_what_is_allowed_is_not() -> None:
    for seed in range(60):
        model = Watching()
        engine = make(model)
        allowed = tuple(range(1, V - 1))  # all but two ids
        engine.submit(asked(sampling=Sampling(seed=seed), allowed=(allowed, (10,))))
        read(run(engine))
        ((first, held, last, pad),) = model.seen
        assert (held, pad) == (20, 0)
        assert first not in allowed
        assert last != 10


def test_the_noise_of_a_read_is_the_seeds() -> None:
    seen = []
    for _ in range(2):
        model = Watching()
        engine = make(model)
        engine.submit(asked(allowed=((10,), (10,))))
        read(run(engine))
        seen += model.seen
    assert seen[0] == seen[1]


def fill(prefix: list[int], canvas: Tensor) -> Tensor:
    """Sure that a free position holds the id that comes after the one before it."""
    before = [prefix[-1], *canvas.tolist()[:-1]]
    return sure([(each + 1) % V for each in before])


def test_infill_is_denoised_around_what_is_held() -> None:
    engine = make(ScriptedModel(fill))
    engine.submit(asked(prompt_ids=(17,), canvas=(None, None, 30)))
    found, _ = read(run(engine))
    assert found.token_ids == (18, 19, 30)
    assert found.allowed == ()
    assert found.steps > 1
    assert found.logprobs[1] == pytest.approx(0.0, abs=1e-3)
    assert found.logprobs[2] < -20, "the id held is not what the model finds there"


def test_a_banned_id_does_not_fill_a_gap() -> None:
    engine = make(ScriptedModel(lambda prefix, canvas: sure([EOS] * C) + sure([9] * C) / 2))
    engine.submit(asked(sampling=Sampling(seed=1, logit_bias=((EOS, -100.0),))))
    assert read(run(engine))[0].token_ids == (9, 20, 9)


def test_one_that_never_converges_says_so() -> None:
    engine = make(ScriptedModel(lambda prefix, canvas: torch.randn(C, V)))
    engine.submit(asked())
    (finished,) = run(engine)
    assert isinstance(finished, Finished)
    assert finished.reason == "length"
    assert finished.error is not None


def test_replies_beside_it_are_untouched() -> None:
    alone = make(ScriptedModel(), slots=2)
    alone.submit(request())
    expected = reply(run(alone))[0]
    engine = make(ScriptedModel(), slots=2)
    engine.submit(request())
    engine.submit(asked(allowed=((10, 11), (12,))))
    events = run(engine)
    assert reply([event for event in events if event.request_id == "a"])[0] == expected
    read(events)


BAD = [
    ({"canvas": ()}, "canvas must have"),
    ({"canvas": (None,) * (C + 1)}, "canvas must have"),
    ({"canvas": (None, V)}, "canvas has an id"),
    ({"canvas": (5, 6)}, "no free position"),
    ({"allowed": ((1,),)}, "allowed must be for each"),
    ({"allowed": ((1,), ())}, "allowed must have ids"),
    ({"allowed": ((1,), (V,))}, "allowed must have ids"),
    ({"allowed": ((1,), tuple(range(V)))}, "not all of these"),
]


@pytest.mark.parametrize(("changes", "named"), BAD)
def test_refusals(changes: dict[str, object], named: str) -> None:
    engine = make(ScriptedModel())
    with pytest.raises(EngineError, match=named):
        engine.submit(asked(**changes))
    assert not engine.has_work
