"""Random submits, cancels, edits and shortage of pages on a whole engine, against a plain model: each request alone.

The scripted model's text is a function of the committed ids and the noise, so any id that is lost, mixed up or
committed twice changes a reply. TRAFFIC_OPERATIONS=10000 makes the long walk longer.
"""

from __future__ import annotations

import os
from functools import cache
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.interface import CanvasDone, Finished, GenerationRequest, QueueFull, Sampling
from tests.engine.test_engine import ScriptedModel, make, run

CONTEXT = 300


@cache
def alone(prompt: tuple[int, ...], max_tokens: int, seed: int) -> tuple[int, ...]:
    """The reply of an engine that has seen nothing else."""
    engine = make(ScriptedModel(), context=CONTEXT, commit_chunk=64)
    engine.submit(asked("alone", prompt, max_tokens, seed))
    return tuple(token for event in run(engine) if isinstance(event, CanvasDone) for token in event.token_ids)


def asked(name: str, prompt: tuple[int, ...], max_tokens: int, seed: int) -> GenerationRequest:
    return GenerationRequest(id=name, prompt_ids=prompt, max_tokens=max_tokens, sampling=Sampling(seed=seed))


class Traffic:
    """An engine and what each of its requests is owed."""

    def __init__(self, *, slots: int, pages: int, chunk: int) -> None:
        self.engine = make(
            ScriptedModel(), context=CONTEXT, slots=slots, pages=pages, commit_chunk=chunk, max_waiting=4
        )
        self.requests: dict[str, GenerationRequest] = {}
        self.said: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.finished: dict[str, Finished] = {}
        self.pasts: list[tuple[int, ...]] = []

    def submit(self, past: int, cut: int, more: int, letter: int, max_tokens: int, seed: int) -> None:
        """A prompt like an earlier conversation up to some point."""
        base = self.pasts[past % len(self.pasts)] if self.pasts else ()
        prompt = (*base[: cut % (len(base) + 1)], 2 + letter, *(2 + letter + n % 3 for n in range(more)))[
            : CONTEXT - 20
        ]
        request = asked(f"r{len(self.requests)}", prompt, max_tokens, seed)
        try:
            self.engine.submit(request)
        except QueueFull:
            assert len(self.engine.stats().waiting) >= 4
            return
        self.requests[request.id] = request
        self.said[request.id] = []

    def step(self) -> None:
        for event in self.engine.step():
            assert event.request_id not in self.finished, "an event after the end"
            if isinstance(event, CanvasDone):
                self.said[event.request_id] += event.token_ids
            elif isinstance(event, Finished):
                self.end(event)

    def end(self, event: Finished) -> None:
        request = self.requests[event.request_id]
        self.finished[event.request_id] = event
        said = tuple(self.said[event.request_id])
        expected = alone(request.prompt_ids, request.max_tokens, request.sampling.seed)
        assert event.usage.cached_tokens <= len(request.prompt_ids)
        if event.reason == "cancelled":
            assert event.request_id in self.cancelled
            assert said == expected[: len(said)]
        else:
            assert said == expected
            self.pasts.append((*request.prompt_ids, *said))

    def cancel(self, pick: int) -> None:
        if self.requests:
            name = f"r{pick % len(self.requests)}"
            self.cancelled.add(name)
            self.engine.cancel(name)

    def check(self) -> None:
        self.engine._seating.check_integrity()
        assert (len(self.finished) < len(self.requests)) <= self.engine.has_work

    def drain(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step()
            self.check()
        assert self.finished.keys() == self.requests.keys(), "a request was lost"
        assert [pool.held for pool in self.engine.stats().pools.values()] == [0, 0]


class AnyTraffic(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 4), pages=st.sampled_from([5, 7, 40]), chunk=st.sampled_from([4, 64, 100]))
    def build(self, slots: int, pages: int, chunk: int) -> None:
        self.traffic = Traffic(slots=slots, pages=pages, chunk=chunk)

    @rule(
        past=st.integers(0, 9),
        cut=st.integers(0, 300),
        more=st.sampled_from([0, 5, 70, 200]),
        letter=st.integers(0, 3),
        max_tokens=st.sampled_from([1, 6, 13, 90]),
        seed=st.integers(0, 2),
    )
    def submit(self, **fields: int) -> None:
        self.traffic.submit(**fields)

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.traffic.step()

    @rule(pick=st.integers(0, 40))
    def cancel(self, pick: int) -> None:
        self.traffic.cancel(pick)

    @invariant()
    def books_are_in_order(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.check()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.drain()


AnyTraffic.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase


@pytest.mark.parametrize(("slots", "pages"), [(3, 6), (4, 30)])
def test_a_long_walk(slots: int, pages: int, one_thread: None) -> None:
    random = Random(slots)
    traffic = Traffic(slots=slots, pages=pages, chunk=64)
    for _ in range(int(os.environ.get("TRAFFIC_OPERATIONS", "600")) // 2):
        action = random.choice(("submit", "step", "step", "step", "step", "cancel"))
        if action == "submit":
            traffic.submit(
                random.randrange(100),
                random.randrange(300),
                random.choice((0, 5, 70, 200)),
                random.randrange(4),
                random.choice((1, 6, 13, 90)),
                random.randrange(3),
            )
        elif action == "step":
            traffic.step()
        elif random.random() < 0.3:
            traffic.cancel(random.randrange(max(1, len(traffic.requests))))
        traffic.check()
    traffic.drain()
    stats = traffic.engine.stats()
    assert stats.cached_tokens > 0
    assert stats.pools["full"].evictions > 0
    assert stats.preemptions > 0 or pages > 6
