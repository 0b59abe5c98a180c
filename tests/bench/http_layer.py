"""The HTTP layer alone: a scripted engine gives canvases of 256 tokens to many clients, all on this machine.

Each canvas carries the time at which it was due, so what the client reads off it is the whole way: the engine's thread
coming to its turn, bridge, detokenizer, wire format, event, socket. Beside it, in the same run, the same canvases as
ready text from a thread through a bare starlette stream. The engine begins when all clients have been let in; letting
them in, all at once, is a figure of its own. Overheads are measured at an offered load that is stated; what can be
carried at most, at an offered load that nothing could carry, of which only the rate that arrives is told.

Server and clients are a process each, so the clients use up a core too. CPU time is that of the server's process, its
scripted engine included, and hardly depends on what else this machine is at.

    python tests/bench/http_layer.py [--clients 100] [--rate 500] [--seconds 10] [--profile FILE]

The last line is one JSON object. `--profile` writes what cProfile found on the server's event loop, which slows it.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine import CanvasDone, Event, Finished, Usage
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.connections import Connection
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Script, Template, byte_tokenizer

CANVAS = 256  # tokens
STAMP = 20  # of them: digits of a time, in nanoseconds
SENTENCE = " The quick brown fox jumps over the lazy dog, and the dog did not mind it at all."
TEXT = (SENTENCE * 4)[: CANVAS - STAMP]
PATHS = {"easel": "/v1/chat/completions", "bare starlette": "/bare"}
UNBOUNDED = 1e6  # canvases a second that nothing here could carry


@dataclass(frozen=True)
class Load:
    """What one server is asked for."""

    clients: int
    rate: float  # canvases a second over all clients
    each: int  # canvases a client


class Pace:
    """When the next canvas is due. After a pause it does not catch up more than a twentieth of a second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._due: float | None = None

    def wait(self) -> int:
        """Sleep until then; the time it was due, in nanoseconds."""
        now = time.monotonic()
        self._due = now if self._due is None else max(self._due + 1 / self._rate, now - 0.05)
        time.sleep(max(0.0, self._due - time.monotonic()))
        return int(self._due * 1e9)


class Paced(FakeEngine):
    """Gives every open request a canvas in turn, once all are there."""

    def __init__(self, load: Load, began: Callable[[], None]) -> None:
        super().__init__([Script()], max_waiting=10_000, context_length=1_000_000)
        self._load, self._began, self._pace = load, began, Pace(load.rate)
        tokenizer = byte_tokenizer()
        self._digits = [tokenizer.token_to_id(str(digit)) for digit in range(10)]
        self._text = [tokenizer.token_to_id("\u2581" if sign == " " else sign) for sign in TEXT]
        self._all_there = False

    def step(self) -> list[Event]:
        cancelled = [running for running in self._queue if running.request.id in self._cancel]
        if cancelled:
            self._cancel.clear()
            return [self._finish(running, "cancelled") for running in cancelled]
        if not self._all_there:
            self._all_there = len(self._queue) == self._load.clients
            time.sleep(0.05 if not self._all_there else 1.0)  # their first bytes come before the first canvas
            if self._all_there:
                self._began()
            return []
        due = self._pace.wait()
        running = self._queue[0]
        self._queue.rotate(-1)
        running.canvas += 1
        ids = (*(self._digits[int(digit)] for digit in f"{due:0{STAMP}}"), *self._text)
        events: list[Event] = [
            CanvasDone(request_id=running.request.id, index=running.canvas - 1, token_ids=ids, steps=8)
        ]
        if running.canvas == self._load.each:
            self._queue.remove(running)
            usage = Usage(prompt_tokens=1, completion_tokens=CANVAS * self._load.each)
            events.append(Finished(request_id=running.request.id, reason="stop", usage=usage, stop_id=106))
        return events


def bare(load: Load, began: Callable[[], None]) -> Starlette:
    """Streams of the same text from a thread, and nothing else."""
    queues: list[asyncio.Queue[str | None]] = []

    def feed(loop: asyncio.AbstractEventLoop) -> None:
        time.sleep(1.0)
        began()
        pace = Pace(load.rate)
        for index in range(load.each):
            for queue in queues:
                chunk = {"choices": [{"index": 0, "delta": {"content": f"{pace.wait():0{STAMP}}{TEXT}"}}]}
                loop.call_soon_threadsafe(queue.put_nowait, f"data: {json.dumps(chunk)}\n\n")
                if index == load.each - 1:
                    loop.call_soon_threadsafe(queue.put_nowait, None)

    async def events() -> AsyncIterator[str]:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        queues.append(queue)
        if len(queues) == load.clients:
            threading.Thread(target=feed, args=(asyncio.get_running_loop(),), daemon=True).start()
        yield ": here\n\n"
        while (event := await queue.get()) is not None:
            yield event

    async def stream(_: Any) -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/bare", stream, methods=["POST"])])


def serve(kind: str, pipe: Pipe, load: Load, profile: str | None) -> None:
    """A server of one kind; sends its port and, when it is told to end, the CPU seconds since the first canvas."""
    before = [0.0]

    def began() -> None:
        before[0] = time.process_time()

    if kind == "easel":
        bridge = Bridge(Paced(load, began))
        bridge.start()
        service = ChatService(bridge, PromptRenderer(byte_tokenizer(), Template()), ["scripted"])
        app: Any = create_app(service, AppSettings())
    else:
        app = bare(load, began)
    config = uvicorn.Config(app, port=0, log_level="error", access_log=False, lifespan="off", http=Connection)
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        await asyncio.to_thread(pipe.recv)
        pipe.send(time.process_time() - before[0])
        server.should_exit = True
        await serving

    if profile and kind == "easel":
        with cProfile.Profile() as found:
            asyncio.run(run())
        found.dump_stats(profile)
    else:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(run())


@dataclass
class Heard:
    """What one client got, and when."""

    first: float = 0.0
    parts: list[tuple[int, bytes]] = field(default_factory=list)


class Listener(asyncio.Protocol):
    """One client. It notes what comes and looks at it later, so that it takes as little of the machine as it can."""

    def __init__(self, request: bytes, heard: Heard, done: asyncio.Future[None]) -> None:
        self._request, self._heard, self._done = request, heard, done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._heard.parts.append((time.monotonic_ns(), data))
        self._heard.first = self._heard.first or time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done.set_result(None)


async def listen(port: int, path: str, clients: int) -> tuple[list[Heard], float]:
    """Everything all clients got, and the seconds until each of them had its first bytes."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 900_000}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    loop = asyncio.get_running_loop()
    heard = [Heard() for _ in range(clients)]
    ends = [loop.create_future() for _ in range(clients)]
    began = time.monotonic()
    await asyncio.gather(
        *(
            loop.create_connection(lambda each=each, end=end: Listener(request, each, end), "127.0.0.1", port)
            for each, end in zip(heard, ends, strict=True)
        )
    )
    await asyncio.gather(*ends)
    return heard, max(each.first for each in heard) - began


def canvases(heard: Heard) -> list[tuple[int, float]]:
    """When each canvas came, and how many ms after it was due."""
    found = []
    mark = b'"content":"' if b'"content":"' in b"".join(data for _, data in heard.parts) else b'"content": "'
    rest = b""
    for at, data in heard.parts:
        rest += data
        while (place := rest.find(b"\n\n")) >= 0:
            event, rest = rest[:place], rest[place + 2 :]
            stamp = event.partition(mark)[2][:STAMP]
            if stamp.isdigit():
                found.append((at, (at - int(stamp)) / 1e6))
    return found


def measure(kind: str, load: Load, profile: str | None = None) -> dict[str, float]:
    """One server under one load."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(kind, there, load, profile), daemon=True)
    process.start()
    port = here.recv()
    used = resource.getrusage(resource.RUSAGE_SELF)
    heard, let_in = asyncio.run(listen(port, PATHS[kind], load.clients))
    now = resource.getrusage(resource.RUSAGE_SELF)
    here.send("end")
    cpu = here.recv()
    process.join()
    found = sorted(canvas for each in heard for canvas in canvases(each))
    assert len(found) == load.each * load.clients, f"{len(found)} canvases of {load.each * load.clients} came"
    seconds = (found[-1][0] - found[0][0]) / 1e9
    overheads = sorted(overhead for _, overhead in found)
    clients = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {
        "canvases_per_second": round(len(found) / seconds, 1),
        "server_cpu_ms_a_canvas": round(1000 * cpu / len(found), 3),
        "clients_cpu_ms_a_canvas": round(1000 * clients / len(found), 3),
        "let_in_ms": round(1000 * let_in, 1),
        **{f"p{share}_ms": round(overheads[int(len(overheads) * share / 100)], 2) for share in (50, 95, 99)},
        "most_ms": round(overheads[-1], 2),
    }


def main() -> None:
    """Measure both, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rate", type=float, default=500, help="canvases a second over all clients")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--profile", help="where to write what cProfile finds in easel's server")
    told = parser.parse_args()
    each = max(1, round(told.rate * told.seconds / told.clients))
    stated, unbounded = (Load(told.clients, rate, each) for rate in (told.rate, UNBOUNDED))
    found: dict[str, Any] = {"clients": told.clients, "offered": told.rate, "canvases_each": each}
    for kind in PATHS:
        found[kind] = measure(kind, stated, told.profile)
        if not told.profile:
            most = measure(kind, unbounded)
            found[kind]["most_canvases_per_second"] = most["canvases_per_second"]
    for kind in PATHS:
        print(f"{kind}:", ", ".join(f"{name} {value:g}" for name, value in found[kind].items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
