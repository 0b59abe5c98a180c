"""The one thread that owns the engine, and the way from asyncio to it and back.

Knows the engine's interface and asyncio, not text, HTTP or prompts. Callers put messages in an inbox, the thread
steps the engine and hands events to the caller's loop. Invariants: only that thread touches the engine after
`start`; every accepted request gets exactly one `Finished`, also when the engine dies or the server stops.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from engine import CanvasDraft, Engine, EngineError, EngineInfo, EngineStats, Event, Finished, Request, Usage
from server.metrics import Metrics, Timeline

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0
T = TypeVar("T")


class EngineUnavailable(Exception):
    """The engine thread is not running: not started, shutting down, or dead. The message says which."""


@dataclass
class _Seat:
    """One request's place on the asyncio side."""

    request: Request
    loop: asyncio.AbstractEventLoop
    accepted: asyncio.Future[None]
    timeline: Timeline = field(default_factory=Timeline)
    # What follows is read and written on the loop only. Unread events; at most one is a draft, the latest.
    events: deque[Event] = field(default_factory=deque)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    finished: bool = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self.events:
            if self.finished:
                raise StopAsyncIteration
            self.came.clear()
            await self.came.wait()
        return self.events.popleft()

    def deliver(self, event: Event) -> None:
        self._on_loop(self._receive, event)

    def answer(self, error: Exception | None) -> None:
        self._on_loop(self._answer, error)

    def _receive(self, event: Event) -> None:
        self.finished = self.finished or isinstance(event, Finished)
        if isinstance(event, CanvasDraft):  # whoever reads slowly sees fewer of them
            unread = next((place for place, each in enumerate(self.events) if isinstance(each, CanvasDraft)), None)
            if unread is not None:
                del self.events[unread]
        self.events.append(event)
        self.came.set()

    def _answer(self, error: Exception | None) -> None:
        if self.accepted.done():  # the caller gave up waiting
            return
        if error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)

    def _on_loop(self, call: Callable[[T], None], argument: T) -> None:
        try:
            self.loop.call_soon_threadsafe(call, argument)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            logger.debug("request %s: its event loop is gone", self.request.id)


@dataclass(frozen=True)
class _Submit:
    seat: _Seat


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class _Stop:
    """Wakes the thread so that it sees `_closing`."""


class _GivenUp(Exception):
    """The step came back after the watchdog had ended everything."""


class Bridge:
    """Owns an engine from `start` to `close`; also a context manager that does both."""

    def __init__(
        self,
        engine: Engine,
        *,
        step_seconds: float | None = None,
        on_failure: Callable[[], None] | None = None,
        on_end: Callable[[Request, Timeline], None] | None = None,
    ) -> None:
        """`step_seconds`: a step that takes longer is given up, and the engine with it. `on_failure` is called once,
        from some thread, when the engine is gone and all requests were told; `on_end` when a caller leaves its request.
        """
        self._engine = engine
        self._step_seconds, self._on_failure, self._on_end = step_seconds, on_failure, on_end
        self._info = engine.info
        self._stats = engine.stats()
        self.metrics = Metrics(self._info, lambda: self._stats)
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._seats: dict[str, _Seat] = {}  # touched by the engine thread only
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # guards the fields below, against a submit or a step slipping past the end
        self._step_began: float | None = None
        self._given_up = False
        self._over = threading.Event()
        self._closing = False
        self._dead = False
        self._failure: str | None = None
        self._deadline = 0.0

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded model."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """What the engine was at after its last step, and its counts. May be read from any thread."""
        return self._stats

    @property
    def failure(self) -> str | None:
        """Why the engine is gone; None while it is there or was closed."""
        return self._failure

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return self._thread is not None and not self._closing and not self._dead

    def start(self) -> None:
        """Start the engine thread."""
        if self._thread is not None:
            raise RuntimeError("a bridge starts once")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        if self._step_seconds is not None:
            threading.Thread(
                target=self._watch, args=(self._step_seconds,), name="engine watchdog", daemon=True
            ).start()

    def close(self, drain_seconds: float = DRAIN_SECONDS, wait_seconds: float | None = None) -> bool:
        """Take no more requests, let the running ones end, cancel those that take longer, free the engine.

        False if the engine's thread still runs: because the watchdog gave its step up, or after `wait_seconds`. May be
        called again, to wait longer or to give the running ones less time.
        """
        with self._lock:
            first = not self._closing
            self._closing = True
            deadline = time.monotonic() + drain_seconds
            self._deadline = deadline if first else min(self._deadline, deadline)
        if self._thread is None:
            if first:
                self._engine.close()
            return True
        self._inbox.put(_Stop())
        if not self._over.wait(wait_seconds) or self._given_up:
            return False
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def __enter__(self) -> Bridge:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[AsyncIterator[Event]]:
        """Run a request; leaving the block early cancels it within one step.

        Raises RequestTooLong or QueueFull (the engine refused) or EngineUnavailable. The events end with `Finished`.
        """
        loop = asyncio.get_running_loop()
        seat = _Seat(request, loop, loop.create_future())
        self._send(_Submit(seat))
        accepted = False
        try:
            await seat.accepted
            accepted = True
            yield seat
        finally:
            if not seat.finished:
                self.cancel(request.id)
            if accepted:
                if not seat.finished:
                    self.metrics.cancelled()
                if self._on_end is not None:
                    self._on_end(request, seat.timeline)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; its `Finished` still arrives. Unknown ids are ignored."""
        self._inbox.put(_Cancel(request_id))

    def _send(self, message: _Submit) -> None:
        with self._lock:
            if self._failure is not None:
                raise EngineUnavailable(f"the engine stopped: {self._failure}")
            if self._closing or self._dead:
                raise EngineUnavailable("the server is shutting down")
            if self._thread is None:
                raise EngineUnavailable("the engine is not started yet")
            self._inbox.put(message)

    # Everything below runs on the engine thread.

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            if self._given_up:
                return  # nobody waits for it any more, and what the engine is like now nobody knows
            logger.exception("the engine thread died")
            self._fail(f"{type(error).__name__}: {error}")
            try:
                self._engine.close()
            except Exception:  # a device that failed may not even let go of its memory
                logger.exception("the engine could not be closed")
            return
        with self._lock:
            self._dead = True
        self._finish_all("the server is shutting down")
        self._over.set()
        self._engine.close()

    def _fail(self, failure: str) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure, self._dead = failure, True
        self._finish_all(failure)
        self._over.set()
        if self._on_failure is not None:
            self._on_failure()

    def _watch(self, limit: float) -> None:
        """On a thread of its own: give up a step that does not end. The engine's thread then touches nothing more."""
        while not self._over.wait(min(1.0, limit / 4)):
            with self._lock:
                began = self._step_began
                self._given_up = began is not None and time.monotonic() - began > limit
            if self._given_up:
                logger.critical("a step of the engine did not end within %g seconds", limit)
                self._fail(f"a step did not end within {limit:g} seconds")

    def _step(self) -> list[Event]:
        with self._lock:
            self._step_began = time.monotonic()
        events = self._engine.step()
        with self._lock:
            self._step_began = None
            if self._given_up:
                raise _GivenUp
        return events

    def _turn(self) -> bool:
        """Read the inbox, advance the engine by one step. False when the bridge is closed and drained."""
        self._read_inbox(wait=not (self._engine.has_work or self._seats or self._closing))
        if self._closing and time.monotonic() >= self._deadline:
            for request_id in self._seats:
                self._engine.cancel(request_id)
        if self._engine.has_work:
            began = time.monotonic()
            events = self._step()
            self._stats = self._engine.stats()
            for request_id in self._stats.running:
                self._seat_given(request_id, began)
            for event in events:
                if not (isinstance(event, Finished) and event.reason == "cancelled"):  # perhaps still in line
                    self._seat_given(event.request_id, began)
                self._deliver(event)
        elif self._seats:
            raise RuntimeError(f"the engine is idle but never finished {', '.join(sorted(self._seats))}")
        return not (self._closing and not self._seats and self._inbox.empty())

    def _read_inbox(self, *, wait: bool) -> None:
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            wait = False
            if isinstance(message, _Submit):
                self._submit(message.seat)
            elif isinstance(message, _Cancel) and message.request_id in self._seats:
                self._engine.cancel(message.request_id)

    def _submit(self, seat: _Seat) -> None:
        if seat.accepted.cancelled():  # reading a flag: the caller left while the message was waiting
            return
        try:
            self._engine.submit(seat.request)
        except Exception as error:
            if isinstance(error, EngineError):  # a refusal: the caller's answer
                seat.answer(error)
                return
            seat.answer(EngineUnavailable(f"the engine stopped: {error}"))
            raise
        self._seats[seat.request.id] = seat
        seat.answer(None)

    def _deliver(self, event: Event) -> None:
        seat = self._seats.get(event.request_id)
        if seat is None:
            return
        if isinstance(event, Finished):
            del self._seats[event.request_id]
        self.metrics.happened(seat.timeline, event)
        seat.deliver(event)

    def _seat_given(self, request_id: str, began: float) -> None:
        """A request that a step left in a slot, or heard of, got it when the step began at the latest."""
        seat = self._seats.get(request_id)
        if seat is not None and seat.timeline.seated is None:
            self.metrics.seated(seat.timeline, began)

    def _finish_all(self, error: str) -> None:
        for seat in self._seats.values():
            usage = Usage(prompt_tokens=len(seat.request.prompt_ids))
            finished = Finished(request_id=seat.request.id, reason="error", usage=usage, error=error)
            self.metrics.happened(seat.timeline, finished)
            seat.deliver(finished)
        self._seats.clear()
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Submit):
                message.seat.answer(EngineUnavailable(error))
