"""The canvas after every pass, for a request that asks: what is shown is what the denoiser holds."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.interface import CanvasDone, CanvasDraft, Event, Finished, GenerationRequest, Sampling
from tests.scripted_engine import babble, scripted_engine

C, V = 8, 64


def run(choose: object, *, drafts: bool) -> list[Event]:
    engine = scripted_engine(choose, canvas_length=C, vocab_size=V, steps=5)  # type: ignore[arg-type]
    sampling = Sampling(seed=3)
    engine.submit(GenerationRequest(id="a", prompt_ids=(5, 6), max_tokens=2 * C, sampling=sampling, drafts=drafts))
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def surer(committed: list[int], canvas: Tensor) -> Tensor:
    """Sure of the left half at once, of the right half once the left one stands."""
    logits = torch.zeros(C, V)
    known = C if canvas[: C // 2].eq(20).all() else C // 2
    logits[range(known), 20] = 50.0
    return logits


def test_each_pass_has_a_draft_before_the_canvas_is_delivered() -> None:
    events = run(surer, drafts=True)
    assert [type(event) for event in events[-2:]] == [CanvasDone, Finished]
    for index in (0, 1):
        done = next(event for event in events if isinstance(event, CanvasDone) and event.index == index)
        drafts = [event for event in events if isinstance(event, CanvasDraft) and event.index == index]
        assert [draft.step for draft in drafts] == list(range(1, done.steps + 1))
        assert events.index(drafts[-1]) < events.index(done)
        assert drafts[-1].token_ids == done.token_ids
        first, second = drafts[0], drafts[1]
        assert first.accepted[: C // 2] == tuple(range(C // 2))
        assert len(first.accepted) < C  # at least one unsure position is noise again
        assert second.accepted == tuple(range(C))
        assert max(first.entropy[: C // 2]) < 0.01 < min(first.entropy[C // 2 :])


def test_nobody_else_sees_them_and_nothing_else_changes() -> None:
    plain = run(surer, drafts=False)
    assert plain == [event for event in run(surer, drafts=True) if not isinstance(event, CanvasDraft)]
    assert not [event for event in plain if isinstance(event, CanvasDraft)]


def test_a_redrawn_canvas_has_none_for_the_pass_that_used_it_up() -> None:
    events = run(babble(V), drafts=True)
    steps = [event.step for event in events if isinstance(event, CanvasDraft)]
    assert steps == [1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_logits_that_are_no_numbers_are_no_draft() -> None:
    events = run(lambda committed, canvas: torch.full((C, V), float("nan")), drafts=True)
    assert [type(event) for event in events] == [Finished]
