"""The HTTP layer alone: a scripted engine streams canvases at a fixed rate to many clients, all on this machine.

Each canvas carries the time at which the engine gave it away, so what a client reads off it is the overhead of bridge,
detokenizer, wire format, events and socket. Beside it, in the same run, a bare starlette stream of the same events.
`python tests/bench/http_layer.py [--clients 100] [--rate 500] [--seconds 10]`; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
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

TEXT = " " + "x" * 200  # what a canvas says beside its time
PATHS = {"easel": "/v1/chat/completions", "bare starlette": "/bare"}


class Paced(FakeEngine):
    """Gives every open request a canvas in turn, so many a second over all."""

    def __init__(self, rate: float, each: int) -> None:
        super().__init__([Script()], max_waiting=10_000, context_length=1_000_000)
        self.rate, self.each, self.tokenizer = rate, each, byte_tokenizer()
        self.due = 0.0

    def step(self) -> list[Event]:
        cancelled = [running for running in self._queue if running.request.id in self._cancel]
        if cancelled:
            self._cancel.clear()
            return [self._finish(running, "cancelled") for running in cancelled]
        self.due = max(self.due + 1 / self.rate, time.monotonic() - 0.05)
        time.sleep(max(0.0, self.due - time.monotonic()))
        running = self._queue[0]
        self._queue.rotate(-1)
        if running.canvas == self.each:
            self._queue.remove(running)
            return [Finished(request_id=running.request.id, reason="stop", usage=Usage(prompt_tokens=1), stop_id=106)]
        running.canvas += 1
        ids = tuple(self.tokenizer.encode(f"{time.monotonic_ns()}{TEXT}", add_special_tokens=False).ids)
        return [CanvasDone(request_id=running.request.id, index=running.canvas - 1, token_ids=ids, steps=1)]


def bare(rate: float, each: int, clients: int) -> Starlette:
    """Streams of the same events at the same rate, and nothing else."""

    async def events() -> AsyncIterator[str]:
        for _ in range(each):
            await asyncio.sleep(clients / rate)
            chunk = {"choices": [{"index": 0, "delta": {"content": f"{time.monotonic_ns()}{TEXT}"}}]}
            yield f"data: {json.dumps(chunk)}\n\n"

    async def stream(_: Any) -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/bare", stream, methods=["POST"])])


def serve(kind: str, port: Any, rate: float, each: int, clients: int) -> None:
    """A server of one kind; sends its port."""
    if kind == "easel":
        bridge = Bridge(Paced(rate, each))
        bridge.start()
        service = ChatService(bridge, PromptRenderer(byte_tokenizer(), Template()), ["scripted"])
        app: Any = create_app(service, AppSettings())
    else:
        app = bare(rate, each, clients)
    config = uvicorn.Config(app, port=0, log_level="error", access_log=False, lifespan="off", http=Connection)
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port.send(server.servers[0].sockets[0].getsockname()[1])
        await serving

    asyncio.run(run())


async def listen(address: str, clients: int) -> tuple[list[float], float]:
    """Overheads in ms of all canvases, and canvases a second."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 900_000}
    overheads: list[float] = []

    async def one(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", address, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if '"content":' in line and TEXT.strip() in line:
                    content = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]
                    overheads.append((time.monotonic_ns() - int(content.split()[0])) / 1e6)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        began = time.monotonic()
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return sorted(overheads), len(overheads) / (time.monotonic() - began)


def main() -> None:
    """Measure both, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rate", type=float, default=500, help="canvases a second over all clients")
    parser.add_argument("--seconds", type=float, default=10)
    told = parser.parse_args()
    each = max(1, round(told.rate * told.seconds / told.clients))
    found = {}
    for kind, path in PATHS.items():
        here, there = multiprocessing.get_context("spawn").Pipe()
        arguments = (kind, there, told.rate, each, told.clients)
        process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        process.start()
        overheads, rate = asyncio.run(listen(f"http://127.0.0.1:{here.recv()}{path}", told.clients))
        process.terminate()
        process.join()
        assert len(overheads) == each * told.clients, f"{len(overheads)} canvases of {each * told.clients} came"
        at = {f"p{share}_ms": round(overheads[int(len(overheads) * share / 100)], 2) for share in (50, 95, 99)}
        found[kind] = {"canvases_per_second": round(rate, 1), **at}
    print(json.dumps({"clients": told.clients, "rate": told.rate, "canvases_each": each, **found}))


if __name__ == "__main__":
    main()
