"""`easel serve` with handles for `faults.py`: errors on demand, and what the process holds.

    python tests/bench/faulty_server.py --port 8123 [flags of easel serve]

Everything is the real server on the real engine; three limits are shortened, so that slow clients are cut off in
seconds. Below /faults it tells what it holds, arms an error inside the engine, moves the clock and fills the disk.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine import Engine, EngineOptions
from server import launch
from server.app import AppSettings, create_app
from server.chat import ChatService
from server.cli import main
from server.connections import Connection

SECONDS = 2.0  # for a head, a body, and for reading what was sent
ERRORS: dict[str, Callable[[], Exception]] = {
    "memory": lambda: torch.OutOfMemoryError("no memory, on demand"),
    "bug": lambda: ValueError("a bug, on demand"),
    "device": lambda: torch.AcceleratorError("a device-side assert, on demand"),
}


@dataclass
class Faults:
    """What goes wrong next: `error` at `stage`, once."""

    stage: str = ""
    error: str = ""
    hit: int = 0
    clock: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def arm(self, stage: str, error: str) -> None:
        with self._lock:
            self.stage, self.error, self.hit = stage, error, 0

    def at(self, *stages: str) -> None:
        """Called at a place in the engine: raise what is armed for it."""
        with self._lock:
            if self.stage not in stages:
                return
            self.stage, self.hit = "", 1
        if self.error == "hang":
            threading.Event().wait()
        raise ERRORS[self.error]()


def faulty(engine: Any, faults: Faults) -> Engine:
    """The engine, with the places at which `faults` strike."""
    denoiser = engine.parts.denoiser
    step, logprobs, reserve = denoiser.step, denoiser.logprobs, type(engine.parts.caches[0]).reserve

    def stepping(canvases: Any, caches: Any, commits: Any = ()) -> None:
        faults.at(*(_kind(engine, cache) for _, cache in commits)) if commits else faults.at("denoise")
        step(canvases, caches, commits)

    def reading(canvas: Any) -> Any:
        faults.at("logprobs")
        return logprobs(canvas)

    def reserving(cache: Any, count: int) -> None:
        faults.at("allocation")
        reserve(cache, count)

    denoiser.step, denoiser.logprobs = stepping, reading
    type(engine.parts.caches[0]).reserve = reserving
    return engine  # type: ignore[no-any-return]


def _kind(engine: Any, cache: Any) -> str:
    """What is committed to a slot's cache: part of a prompt, or a canvas of a reply, which may have ended."""
    owners = (slot for slot in engine._scheduler.running if engine._seating.seats[slot.index].cache is cache)
    slot = next(owners, None)
    return "prefill" if slot is not None and not slot.reply.canvases else "commit"


def held(service: ChatService, engine: Any) -> dict[str, Any]:
    """What the process holds while nobody asks anything."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is only kept by the allocator is no leak
    stats = service.bridge.stats
    idle = not (stats.running or stats.waiting or engine.has_work)
    books = "agree"
    if idle:
        try:
            engine._seating.check_integrity()
        except AssertionError as error:
            books = f"do not agree: {error}"  # or a last commit is under way: whoever asks asks again
    pages = Path("/proc/self/statm").read_text().split()[1]
    return {
        "idle": idle,
        "books": books,
        "slots": len(stats.running) + len(stats.waiting),
        "pages": sum(pool.held for pool in stats.pools.values()),
        "tasks": len(asyncio.all_tasks()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "memory": int(pages) * resource.getpagesize(),
    }


def with_handles(faults: Faults, engines: list[Any]) -> Callable[[ChatService, AppSettings], FastAPI]:
    """`create_app`, with the handles."""

    def create(service: ChatService, settings: AppSettings) -> FastAPI:
        app = create_app(service, replace(settings, send_seconds=SECONDS, body_seconds=SECONDS))

        @app.get("/faults/held")
        async def tell() -> dict[str, Any]:
            return held(service, engines[-1])

        @app.post("/faults/arm/{stage}/{error}")
        async def arm(stage: str, error: str) -> dict[str, Any]:
            faults.arm(stage, error)
            return {}

        @app.get("/faults/hit")
        async def hit() -> dict[str, int]:
            return {"hit": faults.hit}

        @app.post("/faults/clock/{seconds}")
        async def move(seconds: float) -> dict[str, Any]:
            faults.clock = seconds
            return {"now": time.time()}

        @app.post("/faults/disk/{full}")
        async def fill(full: bool) -> dict[str, int]:
            """Whether the log, which standard error goes to, may grow no more. Its size, from then on."""
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(2).st_size if full else hard, hard))
            return {"size": os.fstat(2).st_size}  # after that: a line may have come in between

        return app

    return create


def serve() -> None:
    """Run it."""
    faults, engines = Faults(), []
    build, now, now_ns = launch.build_engine, time.time, time.time_ns

    def build_faulty(options: EngineOptions) -> Engine:
        engines.append(build(options))
        return faulty(engines[-1], faults)

    time.time = lambda: now() + faults.clock
    time.time_ns = lambda: now_ns() + int(faults.clock * 1e9)
    Connection.head_seconds = SECONDS
    launch.build_engine = build_faulty
    launch.create_app = with_handles(faults, engines)  # type: ignore[assignment]
    main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    serve()
