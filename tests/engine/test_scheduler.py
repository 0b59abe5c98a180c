"""engine.scheduler: order, bounds and bookkeeping, and random operation sequences against a plain model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import engine
from engine.interface import (
    CanvasDone,
    EngineError,
    Event,
    Finished,
    GenerationRequest,
    QueueFull,
    RequestTooLong,
    Sampling,
    Usage,
)
from engine.pages import PAGE
from engine.scheduler import CommitChunk, Scheduler, Slot, cut

EOS = 1


def request(name: str, prompt: int = 5, max_tokens: int = 100) -> GenerationRequest:
    return GenerationRequest(
        id=name, prompt_ids=tuple(range(100, 100 + prompt)), max_tokens=max_tokens, sampling=Sampling(seed=0)
    )


def scheduler(*, slots: int = 1, max_waiting: int = 4, commit_chunk: int = 4, context_length: int = 64) -> Scheduler:
    return Scheduler(
        slots=slots,
        max_waiting=max_waiting,
        commit_chunk=commit_chunk,
        context_length=context_length,
        eos_ids=frozenset({EOS, 9}),
    )


def drain_commits(subject: Scheduler) -> list[CommitChunk]:
    return [chunk for chunks in iter(subject.next_commits, []) for chunk in chunks]


def admit(subject: Scheduler) -> list[Slot]:
    """Seat everybody there is a slot for."""
    return [subject.seat() for _ in iter(subject.next_in_line, None)]


def test_imports_no_torch() -> None:
    program = "import sys, engine.scheduler; sys.exit('torch' in sys.modules)"
    root = Path(engine.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (8, ((5, 6), EOS)),
        (3, ((5, 6), EOS)),  # the eos id is the last token that counts
        (2, ((5, 6), None)),  # it comes one too late
        (1, ((5,), None)),
    ],
)
def test_cut(room: int, expected: tuple[tuple[int, ...], int | None]) -> None:
    assert cut((5, 6, EOS, 9, 7), frozenset({EOS, 9}), room) == expected


def test_cut_takes_the_first_of_several_eos_ids() -> None:
    assert cut((9, EOS), frozenset({EOS, 9}), 2) == ((), 9)
    assert cut((5, 6), frozenset(), 9) == ((5, 6), None)


def test_prompt_is_committed_in_chunks_before_a_canvas_opens() -> None:
    subject = scheduler(commit_chunk=4)
    subject.submit(request("a", prompt=9))
    admit(subject)
    assert subject.ready() == []
    assert [chunk.token_ids for chunk in drain_commits(subject)] == [
        (100, 101, 102, 103),
        (104, 105, 106, 107),
        (108,),
    ]
    assert subject.ready() == [subject.slots[0]]


def test_canvases_until_eos() -> None:
    subject = scheduler()
    subject.submit(request("a"))
    (slot,) = admit(subject)
    drain_commits(subject)
    for _ in range(3):
        subject.passed(slot, redrawn=False)
    subject.deliver(slot, (20, 21, 22), steps=3)
    assert subject.collect() == [CanvasDone(request_id="a", index=0, token_ids=(20, 21, 22), steps=3)]
    assert subject.ready() == []
    assert drain_commits(subject) == [CommitChunk(0, (20, 21, 22))], "a canvas is committed before the next opens"
    subject.passed(slot, redrawn=True)
    subject.passed(slot, redrawn=False)
    subject.deliver(slot, (23, EOS, 24), steps=2)
    usage = Usage(prompt_tokens=5, completion_tokens=5, canvases=2, denoise_steps=5, redrawn_canvases=1)
    assert subject.collect() == [
        CanvasDone(request_id="a", index=1, token_ids=(23,), steps=2),
        Finished(request_id="a", reason="stop", usage=usage, stop_id=EOS),
    ]
    assert subject.has_work, "what belongs to the reply of the last canvas is committed when there is time"
    assert drain_commits(subject) == [CommitChunk(0, (23, EOS))]
    assert not subject.has_work


@pytest.mark.parametrize(("max_tokens", "context"), [(4, 64), (100, 9)])
def test_length_by_max_tokens_or_context(max_tokens: int, context: int) -> None:
    subject = scheduler(context_length=context)
    subject.submit(request("a", prompt=5, max_tokens=max_tokens))
    (slot,) = admit(subject)
    drain_commits(subject)
    subject.deliver(slot, (20, 21, 22), steps=1)
    drain_commits(subject)
    subject.deliver(slot, (23, 24, EOS), steps=1)
    *_, last, finished = subject.collect()
    assert last == CanvasDone(request_id="a", index=1, token_ids=(23,), steps=1)
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.stop_id, finished.usage.completion_tokens) == ("length", None, 4)


def test_an_eos_id_that_just_fits_stops() -> None:
    subject = scheduler()
    subject.submit(request("a", max_tokens=2))
    (slot,) = admit(subject)
    drain_commits(subject)
    subject.deliver(slot, (20, EOS, 22), steps=1)
    finished = subject.collect()[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.usage.completion_tokens) == ("stop", 2)


def test_failure_delivers_no_canvas() -> None:
    subject = scheduler()
    subject.submit(request("a"))
    (slot,) = admit(subject)
    subject.fail(slot, "error", "broken")
    (finished,) = subject.collect()
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.error) == ("error", "broken")
    assert subject.next_commits() == []
    assert not subject.has_work


def test_queue_bound_counts_waiting_requests_only() -> None:
    subject = scheduler(max_waiting=2)
    for name in "abc":  # one can be served, two wait
        subject.submit(request(name))
    with pytest.raises(QueueFull):
        subject.submit(request("d"))
    admit(subject)
    with pytest.raises(QueueFull):
        subject.submit(request("d"))
    subject.cancel("b")
    subject.submit(request("d"))


def test_refused_requests_leave_no_trace() -> None:
    subject = scheduler(max_waiting=0, context_length=10)
    with pytest.raises(RequestTooLong):
        subject.submit(request("a", prompt=10))
    assert not subject.has_work
    subject.submit(request("a", prompt=9))
    with pytest.raises(EngineError, match="already running"):
        subject.submit(request("a"))
    with pytest.raises(QueueFull):
        subject.submit(request("b"))
    subject.cancel("a")
    with pytest.raises(EngineError, match="already running"):
        subject.submit(request("a"))
    assert len(subject.collect()) == 1
    subject.submit(request("a"))


def test_first_come_first_served() -> None:
    subject = scheduler()
    for name in "abc":
        subject.submit(request(name))
    served = []
    while subject.has_work:
        for slot in admit(subject):
            assert slot.reply is not None
            served.append(slot.reply.request.id)
        drain_commits(subject)
        for slot in subject.ready():
            subject.deliver(slot, (EOS,), steps=1)
        subject.collect()
    assert served == ["a", "b", "c"]


def test_slots_take_turns_at_commits() -> None:
    subject = scheduler(slots=2, commit_chunk=2)
    subject.submit(request("a", prompt=6))
    subject.submit(request("b", prompt=3))
    admit(subject)
    assert [chunk.slot for chunk in drain_commits(subject)] == [0, 1, 0, 1, 0]


def test_prompts_share_a_pass_and_end_at_page_ends() -> None:
    subject = scheduler(slots=3, commit_chunk=2 * PAGE, context_length=4096)
    for name, prompt in (("a", 3 * PAGE), ("b", 20), ("c", 20)):
        subject.submit(request(name, prompt=prompt))
    admit(subject)
    sizes = [[(chunk.slot, len(chunk.token_ids)) for chunk in subject.next_commits()] for _ in range(3)]
    assert sizes == [[(0, 2 * PAGE)], [(1, 20), (2, 20), (0, PAGE)], []]


def test_a_long_prompt_takes_smaller_bites_beside_others() -> None:
    subject = Scheduler(
        slots=2,
        max_waiting=4,
        commit_chunk=8 * PAGE,
        chunk_beside=PAGE,
        context_length=10_000,
        eos_ids=frozenset({EOS}),
    )
    subject.submit(request("long", prompt=20 * PAGE))
    admit(subject)
    assert [len(chunk.token_ids) for chunk in subject.next_commits()] == [8 * PAGE]
    subject.submit(request("short", prompt=10))
    admit(subject)
    assert [(chunk.slot, len(chunk.token_ids)) for chunk in subject.next_commits()] == [(1, 10), (0, 7 * PAGE)]
    for _ in range(4):
        assert [len(chunk.token_ids) for chunk in subject.next_commits()] == [PAGE]
    (_, short) = subject.running
    subject.deliver(short, (20,) * 64, steps=1)
    assert [(chunk.slot, len(chunk.token_ids)) for chunk in subject.next_commits()] == [(1, 64), (0, PAGE)]


def test_what_is_reused_is_not_committed() -> None:
    subject = scheduler()
    subject.submit(request("a", prompt=9))
    (slot,) = admit(subject)
    subject.resumed(slot, 6)
    assert [chunk.token_ids for chunk in drain_commits(subject)] == [(106, 107, 108)]
    subject.deliver(slot, (EOS,), steps=1)
    *_, finished = subject.collect()
    assert isinstance(finished, Finished)
    assert (finished.usage.cached_tokens, subject.totals.cached_tokens, subject.totals.committed_tokens) == (6, 6, 3)


def test_who_lost_a_slot_goes_on_where_he_was() -> None:
    subject = scheduler(slots=2)
    for name in "abc":
        subject.submit(request(name))
    _, second = admit(subject)
    drain_commits(subject)
    subject.deliver(second, (20, 21), steps=1)
    assert subject.preempt() is second
    assert subject.waiting == ("b", "c")
    assert subject.next_in_line() is None, "not before somebody has left"
    subject.cancel("a")
    (slot, _) = admit(subject)
    assert slot.reply is not None
    assert slot.reply.request.id == "b"
    subject.resumed(slot, 3)
    assert [chunk.token_ids for chunk in drain_commits(subject)][:2] == [(103, 104, 20, 21), (100, 101, 102, 103)]
    subject.deliver(slot, (EOS,), steps=1)
    finished = subject.collect()[-1]
    assert isinstance(finished, Finished)
    assert (finished.usage.completion_tokens, finished.usage.cached_tokens) == (3, 0), "it counts from its first start"


def test_a_rest_waits_for_all_others_and_gives_way_to_them() -> None:
    subject = scheduler(slots=2)
    subject.submit(request("a"))
    subject.submit(request("b"))
    first, second = admit(subject)
    drain_commits(subject)
    subject.deliver(first, (20, EOS, 22), steps=1)
    assert first.rest == (20, EOS)
    assert subject.next_commits() == [], "b denoises"
    subject.submit(request("c"))
    admit(subject)
    assert (first.reply is None, first.rest) == (False, ())
    subject.cancel("c")
    subject.deliver(second, (30, EOS), steps=1)
    assert drain_commits(subject) == [CommitChunk(1, (30, EOS))]


def test_cancel_while_waiting_and_while_served() -> None:
    subject = scheduler()
    subject.submit(request("a"))
    subject.submit(request("b"))
    admit(subject)
    assert subject.cancel("b") is None
    assert subject.cancel("a") == 0
    assert subject.cancel("a") is None
    assert subject.cancel("nobody") is None
    assert subject.has_work, "the Finished events are still to be collected"
    assert [(event.request_id, event.reason) for event in subject.collect() if isinstance(event, Finished)] == [
        ("b", "cancelled"),
        ("a", "cancelled"),
    ]
    assert not subject.has_work
    assert subject.next_commits() == []


class AnyOrder(RuleBasedStateMachine):
    """Operations in any order on three sizes of scheduler; the plain model is a dict of what each request is owed."""

    def __init__(self) -> None:
        super().__init__()
        self.subject = scheduler(slots=2, max_waiting=3, commit_chunk=3, context_length=24)
        self.requests: dict[str, GenerationRequest] = {}
        self.order: list[str] = []  # accepted, not yet in a slot
        self.served: dict[int, str] = {}
        self.committed: dict[str, list[int]] = {}
        self.expected_commit: dict[str, list[int]] = {}
        self.received: dict[str, list[int]] = {}
        self.finished: dict[str, Finished] = {}
        self.ending: set[str] = set()  # a Finished is due at the next collect
        self.rests: dict[int, list[int]] = {}
        self.barred = False
        self.count = 0

    @rule(prompt=st.integers(1, 26), max_tokens=st.integers(1, 20))
    def submit(self, prompt: int, max_tokens: int) -> None:
        new = request(f"r{self.count}", prompt, max_tokens)
        self.count += 1
        if prompt >= 24:
            with pytest.raises(RequestTooLong):
                self.subject.submit(new)
        elif len(self.order) >= 3 + 2 - len(self.served):
            with pytest.raises(QueueFull):
                self.subject.submit(new)
        else:
            self.subject.submit(new)
            self.requests[new.id] = new
            self.order.append(new.id)
            self.committed[new.id], self.received[new.id] = [], []
            self.expected_commit[new.id] = list(new.prompt_ids)

    @rule(pick=st.integers(0, 30))
    def cancel(self, pick: int) -> None:
        name = f"r{pick % max(1, self.count)}"
        slot = self.subject.cancel(name)
        if name in self.order:
            assert slot is None
            self.order.remove(name)
            self.ending.add(name)
        elif name in self.served.values():
            assert slot is not None
            assert self.served.pop(slot) == name
            self.ending.add(name)
            self.barred = False
        else:
            assert slot is None

    @rule()
    def admit(self) -> None:
        for slot in admit(self.subject):
            assert slot.reply is not None
            assert slot.index not in self.served
            assert slot.reply.request.id == self.order.pop(0)
            self.served[slot.index] = slot.reply.request.id
            assert slot.rest == ()
            self.rests.pop(slot.index, None)
        assert len(self.served) == 2 or not self.order or self.barred

    @rule()
    def commit(self) -> None:
        chunks = self.subject.next_commits()
        owing = {name for name in self.served.values() if self.committed[name] != self.expected_commit[name]}
        if not owing:
            assert len(chunks) <= (not self.served and not self.order)
            for chunk in chunks:  # the end of a reply that is over
                assert self.rests[chunk.slot][: len(chunk.token_ids)] == list(chunk.token_ids)
                del self.rests[chunk.slot][: len(chunk.token_ids)]
            return
        assert chunks
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            assert 1 <= len(chunk.token_ids) <= 3
            name = self.served[chunk.slot]
            self.committed[name].extend(chunk.token_ids)
            assert self.committed[name] == self.expected_commit[name][: len(self.committed[name])]
            assert len(self.committed[name]) < 24

    @precondition(lambda self: self.subject.running)
    @rule()
    def preempt(self) -> None:
        """The last to have come goes back to the head of the line, and nobody is seated before somebody has left."""
        youngest = max(self.served, key=lambda index: int(self.served[index][1:]))
        assert self.subject.preempt().index == youngest
        name = self.served.pop(youngest)
        self.order.insert(0, name)
        self.committed[name].clear()
        self.barred = True

    @precondition(lambda self: self.subject.ready())
    @rule(
        ids=st.lists(st.sampled_from([EOS, *range(20, 40)]), min_size=4, max_size=4),
        outcome=st.sampled_from(["done", "done", "pass", "fail"]),
        data=st.data(),
    )
    def denoise(self, ids: list[int], outcome: str, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.subject.ready()))
        name = self.served[slot.index]
        assert self.committed[name] == self.expected_commit[name]
        self.subject.passed(slot, redrawn=False)
        if outcome == "fail":
            self.subject.fail(slot, "error", "broken")
        if outcome == "done":
            self.subject.deliver(slot, tuple(ids), steps=1)
            self.expected_commit[name].extend(ids)
        if slot.reply is None:
            del self.served[slot.index]
            self.ending.add(name)
            self.barred = False
            self.rests[slot.index] = list(slot.rest)

    @rule()
    def collect(self) -> None:
        for event in self.subject.collect():
            self.take(event)
        assert not self.ending, "a Finished that was due did not come"

    def take(self, event: Event) -> None:
        name = event.request_id
        assert name not in self.finished, "an event after Finished"
        if isinstance(event, CanvasDone):
            assert EOS not in event.token_ids
            self.received[name].extend(event.token_ids)
            return
        assert name in self.ending
        self.ending.remove(name)
        self.finished[name] = event
        assert event.usage.completion_tokens == len(self.received[name]) + (event.reason == "stop")
        limit = min(self.requests[name].max_tokens, 24 - len(self.requests[name].prompt_ids))
        assert event.usage.completion_tokens <= limit
        if event.reason == "length":
            assert event.usage.completion_tokens == limit
        assert (event.stop_id == EOS) == (event.reason == "stop")

    @invariant()
    def work_is_known(self) -> None:
        assert self.subject.has_work == bool(self.order or self.served or self.ending or any(self.rests.values()))
        assert self.subject.waiting == tuple(self.order)

    def teardown(self) -> None:
        for _ in range(100):
            self.admit()
            self.commit()
            for slot in self.subject.ready():
                self.subject.deliver(slot, (EOS,), steps=1)
                self.ending.add(self.served.pop(slot.index))
                self.barred = False
                self.rests[slot.index] = list(slot.rest)
            if self.barred and not self.served:
                return  # everybody lost his slot: the engine never takes the last one's
            self.collect()
        assert not self.subject.has_work
        assert self.finished.keys() == self.requests.keys()


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
