"""engine.constrain: replies are what a constraint allows, whatever the model wants. Scripted models, a trie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import EngineOptions, build_engine
from engine.engine import DiffusionEngine
from engine.interface import CanvasDone, ConstraintError, Finished, GenerationRequest, Sampling
from tests.scripted_engine import Choose, babble, scripted_engine

C, V, EOS = 8, 40, 1
CLOSERS = {39}


class Trie:
    """A constraint that allows some sequences of ids and nothing else."""

    def __init__(self, *sequences: Iterable[int]) -> None:
        self.sequences = [tuple(each) for each in sequences]
        self.at: tuple[int, ...] = ()

    def _next(self) -> set[int]:
        length = len(self.at)
        return {each[length] for each in self.sequences if each[:length] == self.at and len(each) > length}

    def advance(self, token_ids: Sequence[int]) -> int:
        for taken, token_id in enumerate(token_ids):
            if token_id not in self._next():
                return taken
            self.at += (token_id,)
        return len(token_ids)

    def rollback(self, count: int) -> None:
        self.at = self.at[: len(self.at) - count]

    def forced(self) -> tuple[int, ...]:
        before, ids = self.at, []
        while not self.ends() and len(self._next()) == 1:
            ids += self._next()
            self.at += tuple(self._next())
        self.at = before
        return tuple(ids)

    def allowed(self) -> bytes:
        mask = bytearray(32)
        for token_id in [*self._next(), *self.ends()]:
            mask[token_id // 8] |= 1 << token_id % 8
        if not any(mask):
            raise ConstraintError("nowhere to go")
        return bytes(mask)

    def closing(self) -> bytes:
        mask = bytearray(32)
        for token_id in self._next() & CLOSERS:
            mask[token_id // 8] |= 1 << token_id % 8
        return bytes(mask)

    def ends(self) -> tuple[int, ...]:
        return (EOS,) if self.at in self.sequences else ()

    @property
    def must_end(self) -> bool:
        return bool(self.ends()) and not self._next()


def sure(*ids: int) -> Tensor:
    return torch.zeros(C, V).scatter(1, torch.tensor(ids)[:, None], 30.0)


def engine(choose: Choose, **options: int) -> DiffusionEngine:
    return scripted_engine(choose, canvas_length=C, vocab_size=V, **options)


def reply(
    subject: DiffusionEngine, constraint: Trie | None, max_tokens: int = 60, seed: int = 1, temperature: float = 1.0
) -> tuple[list[int], list[int], Finished]:
    """The ids of a reply, the steps of each of its canvases, and how it ended."""
    sampling = Sampling(seed=seed, temperature=temperature)
    subject.submit(
        GenerationRequest(id="a", prompt_ids=(5,), max_tokens=max_tokens, sampling=sampling, constraint=constraint)
    )
    ids: list[int] = []
    steps: list[int] = []
    while subject.has_work:
        for event in subject.step():
            if isinstance(event, CanvasDone):
                ids += event.token_ids
                steps.append(event.steps)
            else:
                assert isinstance(event, Finished)
                end = event
    return ids, steps, end


def free(*starts: int, length: int = 5) -> Trie:
    """All sequences of ids 10 and 11 behind one of some ids."""
    bodies: list[tuple[int, ...]] = [()]
    for _ in range(length):
        bodies = [(*body, token_id) for body in bodies for token_id in (10, 11)]
    return Trie(*((start, *body) for start in starts for body in bodies))


def test_what_is_allowed_anyway_costs_no_step() -> None:
    wanted = (20, 10, 11, 10, 10, 11, EOS, 0)
    plain = reply(engine(lambda *_: sure(*wanted)), None)
    held = reply(engine(lambda *_: sure(*wanted)), free(20, 21))
    assert plain[:2] == held[:2] == ([20, 10, 11, 10, 10, 11], [2])


def test_what_stands_behind_the_end_does_not_count() -> None:
    """The model never makes up its mind there; unconstrained this canvas would never converge."""
    noise = babble(V)

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        logits = sure(20, 10, 11, 10, 10, 11, EOS, 0)
        logits[7] = noise(committed, canvas)[7]
        return logits

    assert reply(engine(choose), free(20, 21))[:2] == ([20, 10, 11, 10, 10, 11], [2])


def test_the_likeliest_allowed_id_replaces_one_that_is_not() -> None:
    """And the model goes on from it: what it wants behind depends on what stands there."""

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        body = (11,) * 5 if canvas[0] == 21 else (10,) * 5
        logits = sure(30, *body, EOS, 0)
        logits[0, 21] = 20.0
        return logits

    ids, _, end = reply(engine(choose), free(20, 21))
    assert (ids, end.reason, end.stop_id) == ([21, 11, 11, 11, 11, 11], "stop", EOS)


def test_what_is_wrong_several_times_is_put_right_in_one_pass() -> None:
    """Also where what is behind moves each time: the model leaves an id out twice."""
    first, second = (10,) * 5, (11,) * 5
    allowed = Trie(*((a, *first, b, *second) for a in (20, 22) for b in (21, 23)))

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        ids = canvas.tolist()[:12] if canvas[0] == 22 else [*first, *second]
        logits = torch.zeros(24, V).scatter(1, torch.tensor([*ids, *[EOS] * (24 - len(ids))])[:, None], 30.0)
        logits[:, 22] += 1.0
        logits[:, 23] += 1.0
        return logits

    subject = scripted_engine(choose, canvas_length=24, vocab_size=V)
    assert reply(subject, allowed)[:2] == ([22, *first, 23, *second], [2])


@pytest.mark.parametrize("wanted", [EOS, 0])
def test_a_model_that_wants_to_end_is_helped_to(wanted: int) -> None:
    """What closes is not what the model finds likeliest among what is allowed."""

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        logits = sure(20, wanted, 0, 0, 0, 0, 0, 0)
        logits[:, 10] = 20.0
        return logits

    assert reply(engine(choose), Trie((20, 39), (20, 10, 10, 10, 39), (20, 10, 39)))[0] == [20, 39]


def test_what_is_forced_takes_no_step() -> None:
    only = (*range(10, 30), 30)
    subject = engine(babble(V))
    ids, steps, end = reply(subject, Trie(only))
    assert (ids, steps, end.reason, end.usage.denoise_steps) == (list(only), [0, 0, 0], "stop", 0)
    assert subject._model.passes == 0  # type: ignore[attr-defined]


def test_a_reply_that_fills_its_canvas_ends_in_the_next() -> None:
    ids, steps, end = reply(engine(babble(V)), Trie(range(10, 10 + C)))
    assert (ids, steps, end.reason) == (list(range(10, 10 + C)), [0, 0], "stop")


def test_forced_ids_stand_in_the_canvas_from_the_first_pass_on() -> None:
    seen: list[list[int]] = []

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        seen.append(canvas[:2].tolist())
        return sure(20, 21, 10, 10, EOS, 0, 0, 0)

    two = Trie((20, 21, 10, 10), (20, 21, 11, 11))
    assert reply(engine(choose), two)[0] == [20, 21, 10, 10]
    assert all(ids == [20, 21] for ids in seen)


def test_text_behind_an_inserted_id_moves_on() -> None:
    """The model leaves 20 out and is sure of the rest: nothing of the rest is lost."""
    rest = (14, 13, 12, 11, 10)  # among ids that are equally likely the lowest is taken, which is wrong here
    allowed = Trie((20, *rest), (20, *reversed(rest)), (21, *rest))

    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        if canvas[0].item() not in (20, 21):
            logits = sure(*rest, EOS, 0, 0)
            logits[0, 20] = 10.0
            return logits
        ids = [*canvas.tolist()[:6], EOS, 0]  # it keeps what it finds
        return sure(*ids)

    assert reply(engine(choose), allowed)[0] == [20, *rest]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_model_ends_within_its_passes_and_says_what_is_allowed(seed: int, temperature: float) -> None:
    allowed = free(20, 21, length=9)
    ids, steps, end = reply(engine(babble(V), steps=8), allowed, seed=seed, temperature=temperature)
    assert tuple(ids) in allowed.sequences
    assert end.reason == "stop"
    assert len(steps) == 2
    assert max(steps) <= 8
    assert end.usage.redrawn_canvases == 0


def test_a_cut_reply_says_so_and_is_the_beginning_of_one_that_is_allowed() -> None:
    allowed = free(20, 21, length=9)
    ids, _, end = reply(engine(babble(V)), allowed, max_tokens=6)
    assert (len(ids), end.reason) == (6, "length")
    assert any(each[:6] == tuple(ids) for each in allowed.sequences)


def test_a_constraint_that_cannot_go_on_ends_its_request_only() -> None:
    class Broken(Trie):
        def allowed(self) -> bytes:
            raise ConstraintError("too complex")

    subject = engine(babble(V), slots=2)
    ids, _, end = reply(subject, Broken((20, 21), (21, 20)))
    assert (ids, end.reason, end.error) == ([], "error", "too complex")
    assert reply(subject, Trie((20, 21)))[0] == [20, 21]


def test_a_real_model_with_random_weights_on_every_device(small_checkpoint: Path, device: torch.device) -> None:
    """On a GPU its passes are CUDA graphs, and pins are set between their replays."""
    subject = build_engine(EngineOptions(model=str(small_checkpoint), device=str(device), progress=False))
    allowed = free(20, 21, length=9)
    for seed in range(3):
        ids, steps, end = reply(subject, free(20, 21, length=9), seed=seed)  # type: ignore[arg-type]
        assert tuple(ids) in allowed.sequences
        assert end.reason == "stop"
        assert max(steps) <= 48
    subject.close()


def test_constrained_and_free_replies_share_passes() -> None:
    def choose(committed: list[int], canvas: Tensor) -> Tensor:
        return sure(30, 10, 10, 10, 10, 10, EOS, 0)

    subject = engine(choose, slots=2)
    for name, constraint in (("free", None), ("held", free(20))):
        subject.submit(
            GenerationRequest(id=name, prompt_ids=(5,), max_tokens=30, sampling=Sampling(seed=1), constraint=constraint)
        )
    found = {}
    while subject.has_work:
        for event in subject.step():
            if isinstance(event, CanvasDone):
                found[event.request_id] = list(event.token_ids)
    assert found == {"free": [30, 10, 10, 10, 10, 10], "held": [20, 10, 10, 10, 10, 10]}


def test_a_reply_that_lost_its_slot_goes_on_where_it_was() -> None:
    """Its canvas was pinned in part; the new one begins where the given up one began."""
    allowed = free(20, 21, length=10)
    subject = engine(babble(V), slots=2)
    constraints = {name: free(20, 21, length=10) for name in ("first", "second")}
    for name, constraint in constraints.items():
        subject.submit(
            GenerationRequest(
                id=name,
                prompt_ids=(5,),
                max_tokens=40,
                sampling=Sampling(seed=1),
                constraint=constraint,
            )
        )
    found: dict[str, list[int]] = {"first": [], "second": []}
    while subject.has_work:
        guide = subject._seating.seats[1].guide
        if subject.stats().preemptions == 0 and guide is not None and guide._ahead:
            subject._seating.vacate(subject._scheduler.preempt())  # as if the memory had run out
        for event in subject.step():
            if isinstance(event, CanvasDone):
                found[event.request_id] += event.token_ids
    assert subject.stats().preemptions == 1
    assert all(tuple(ids) in allowed.sequences for ids in found.values())


def test_a_ban_gives_way_to_the_constraint() -> None:
    sampling = Sampling(seed=1, logit_bias=((20, -100.0), (21, -100.0)))
    subject = engine(babble(V))
    subject.submit(
        GenerationRequest(id="a", prompt_ids=(5,), max_tokens=9, sampling=sampling, constraint=Trie((20, 9), (21, 9)))
    )
    events = [event for _ in range(40) if subject.has_work for event in subject.step()]
    (canvas,) = [event for event in events if isinstance(event, CanvasDone)]
    assert canvas.token_ids in ((20, 9), (21, 9))
