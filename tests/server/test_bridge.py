"""The engine thread: acceptance, events, cancellation, death, draining."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from engine import CanvasDone, Event, Finished, GenerationRequest, QueueFull, RequestTooLong, Sampling
from server.bridge import Bridge, EngineUnavailable
from tests.fakes import FakeEngine, Script

LONG = Script([[173]] * 10_000, steps=1, step_seconds=0.001)
SLOW = Script([[173]] * 10_000, steps=1, step_seconds=0.1)  # steps long enough to do much in, on a busy machine too


def request(name: str = "r", prompt: int = 3) -> GenerationRequest:
    return GenerationRequest(id=name, prompt_ids=(7,) * prompt, max_tokens=1000, sampling=Sampling(seed=0))


async def collect(bridge: Bridge, wanted: GenerationRequest) -> list[Event]:
    async with bridge.generate(wanted) as events:
        return [event async for event in events]


async def until(condition: object, seconds: float = 5.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.001)


def test_events_arrive_in_order_and_end_with_finished() -> None:
    with Bridge(FakeEngine([Script([[1, 2], [3]])])) as bridge:
        events = asyncio.run(collect(bridge, request()))
    assert [type(event) for event in events] == [CanvasDone, CanvasDone, Finished]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "stop"


def test_many_requests_each_get_their_own_events_and_end_once() -> None:
    engine = FakeEngine(lambda wanted: Script([[int(wanted.id)]] * 3))

    async def run() -> list[list[Event]]:
        return await asyncio.gather(*(collect(bridge, request(str(number))) for number in range(30)))

    with Bridge(engine) as bridge:
        for number, events in enumerate(asyncio.run(run())):
            assert {event.request_id for event in events} == {str(number)}
            assert sum(isinstance(event, Finished) for event in events) == 1
    assert sorted(engine.ended, key=int) == [str(number) for number in range(30)]


def test_refusals_reach_the_caller() -> None:
    engine = FakeEngine([LONG], context_length=10, max_waiting=0)

    async def run() -> None:
        with pytest.raises(RequestTooLong):
            await collect(bridge, request(prompt=10))
        async with bridge.generate(request("a")):
            with pytest.raises(QueueFull):
                await collect(bridge, request("b"))

    with Bridge(engine) as bridge:
        asyncio.run(run())
        assert bridge.ready


def test_leaving_the_block_cancels_within_one_step() -> None:
    engine = FakeEngine([SLOW])

    async def run() -> None:
        async with bridge.generate(request()) as events:
            await anext(events)
            steps = engine.steps
        await until(lambda: engine.ended)
        assert engine.steps - steps <= 3  # the step running now, one that was due, and the one that cancels

    with Bridge(engine) as bridge:
        asyncio.run(run())
    assert engine.cancelled == ["r"]


def test_a_caller_that_leaves_before_acceptance_leaves_nothing_behind() -> None:
    engine = FakeEngine([LONG])

    async def run() -> None:
        task = asyncio.create_task(collect(bridge, request()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not engine.has_work)

    with Bridge(engine) as bridge:
        asyncio.run(run())


def test_a_finished_request_is_not_cancelled() -> None:
    engine = FakeEngine([Script([[1]])])
    with Bridge(engine) as bridge:
        asyncio.run(collect(bridge, request()))
    assert engine.cancelled == []


def test_a_dying_engine_ends_every_request_and_takes_no_more() -> None:
    engine = FakeEngine([SLOW], crash_at_step=5)

    async def run() -> None:
        results = await asyncio.gather(*(collect(bridge, request(str(number))) for number in range(3)))
        for events in results:
            last = events[-1]
            assert isinstance(last, Finished)
            assert last.reason == "error"
            assert "the fake engine broke" in (last.error or "")
        await until(lambda: not bridge.ready)
        with pytest.raises(EngineUnavailable, match="the fake engine broke"):
            await collect(bridge, request("late"))

    with Bridge(engine) as bridge:
        asyncio.run(run())
    assert engine.closed


def test_an_engine_that_breaks_while_taking_a_request_is_dead() -> None:
    def broken(_: GenerationRequest) -> Script:
        raise KeyError("no script")

    async def run() -> None:
        with pytest.raises(EngineUnavailable, match="no script"):
            await collect(bridge, request())
        await until(lambda: not bridge.ready)

    with Bridge(FakeEngine(broken)) as bridge:
        asyncio.run(run())


def test_an_engine_that_forgets_a_request_is_dead() -> None:
    class Forgetful(FakeEngine):
        def step(self) -> list[Event]:
            self._queue.clear()
            return []

    async def run() -> None:
        events = await collect(bridge, request())
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == "error"

    with Bridge(Forgetful([LONG])) as bridge:
        asyncio.run(run())


def test_closing_lets_running_requests_end() -> None:
    engine = FakeEngine([Script([[1]] * 20, steps=1, step_seconds=0.005)])

    async def run() -> None:
        async with bridge.generate(request()) as events:
            await anext(events)
            closing = asyncio.create_task(asyncio.to_thread(bridge.close, 5.0))
            await until(lambda: not bridge.ready)
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await collect(bridge, request("late"))
            last = [event async for event in events][-1]
            assert isinstance(last, Finished)
            assert last.reason == "stop"
            await closing

    bridge = Bridge(engine)
    bridge.start()
    asyncio.run(run())
    assert engine.closed


def test_closing_cancels_what_takes_too_long() -> None:
    engine = FakeEngine([LONG])

    async def run() -> None:
        async with bridge.generate(request()) as events:
            await anext(events)
            await asyncio.to_thread(bridge.close, 0.05)
            last = [event async for event in events][-1]
            assert isinstance(last, Finished)
            assert last.reason == "cancelled"

    bridge = Bridge(engine)
    bridge.start()
    asyncio.run(run())
    assert engine.closed


def test_closing_twice_or_without_a_start_is_fine() -> None:
    engine = FakeEngine([LONG])
    bridge = Bridge(engine)
    bridge.close()
    bridge.close()
    assert engine.closed
    with pytest.raises(EngineUnavailable):
        asyncio.run(collect(bridge, request()))


def test_it_starts_once_and_is_not_ready_before() -> None:
    bridge = Bridge(FakeEngine([LONG]))
    assert not bridge.ready
    with pytest.raises(EngineUnavailable, match="not started"):
        asyncio.run(collect(bridge, request()))
    with bridge, pytest.raises(RuntimeError, match="once"):
        bridge.start()


def test_stats_say_who_runs_and_who_waits_in_which_place() -> None:
    engine = FakeEngine([LONG])

    async def run() -> None:
        async with bridge.generate(request("a")), bridge.generate(request("b")), bridge.generate(request("c")):
            await until(lambda: bridge.stats.running == ("a",) and bridge.stats.waiting == ("b", "c"))
        await until(lambda: not (bridge.stats.running or bridge.stats.waiting))

    with Bridge(engine) as bridge:
        assert (bridge.stats.running, bridge.stats.waiting) == ((), ())
        asyncio.run(run())


def test_what_an_engine_does_when_idle_is_stepped_and_gives_way() -> None:
    """The end of a reply is committed after it was delivered, when nobody waits for anything."""

    class Tidy(FakeEngine):
        left = 3
        idle_steps = 0

        @property
        def has_work(self) -> bool:
            return bool(self._queue) or (self.left > 0 and bool(self.ended))

        def step(self) -> list[Event]:
            if not self._queue:
                self.left -= 1
                self.idle_steps += 1
            return super().step()

    engine = Tidy([Script([[1]])])
    with Bridge(engine) as bridge:
        asyncio.run(collect(bridge, request()))
        asyncio.run(until(lambda: engine.idle_steps == 3))
        assert not engine.has_work


def test_an_idle_engine_is_not_stepped() -> None:
    engine = FakeEngine([Script([[1]])])
    with Bridge(engine) as bridge:
        asyncio.run(collect(bridge, request()))
        steps = engine.steps
        time.sleep(0.05)
        assert engine.steps == steps


def test_a_loop_that_closed_does_not_kill_the_engine() -> None:
    engine = FakeEngine([Script([[1]] * 50, steps=1, step_seconds=0.002)])

    async def leave() -> None:
        await bridge.generate(request("gone")).__aenter__()

    with Bridge(engine) as bridge:
        thread = threading.Thread(target=lambda: asyncio.run(leave()))
        thread.start()
        thread.join()
        events = asyncio.run(collect(bridge, request("next")))
        assert isinstance(events[-1], Finished)
        assert bridge.ready
