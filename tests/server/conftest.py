"""A whole server around the scripted engine: in-process for most tests, live for timing and disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Script, Template, byte_tokenizer

NAMES = ("demo", "easel")


@pytest.fixture(scope="session")
def prompts() -> PromptRenderer:
    return PromptRenderer(byte_tokenizer(), Template())


class Client:
    """Talks to an app without a socket; the app runs to completion before an answer is seen."""

    def __init__(self, engine: FakeEngine, app: Any) -> None:
        self.engine, self.app = engine, app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def chat(self, content: str = "Hi", **fields: Any) -> httpx.Response:
        body = {"model": "demo", "messages": [{"role": "user", "content": content}], **fields}
        return self.request("POST", "/v1/chat/completions", json=body)


@pytest.fixture
def serve(prompts: PromptRenderer) -> Iterator[Callable[..., Client]]:
    """serve(script, ..., context_length=…, api_key=…) -> Client"""
    with contextlib.ExitStack() as stack:

        def build(*scripts: Script, settings: AppSettings | None = None, **options: Any) -> Client:
            engine = FakeEngine(scripts, **options)
            bridge = stack.enter_context(Bridge(engine))
            service = ChatService(bridge, prompts, NAMES)
            return Client(engine, create_app(service, settings or AppSettings()))

        yield build


@pytest.fixture(scope="session")
def listening() -> Callable[[Any], contextlib.AbstractContextManager[str]]:
    """`with listening(app) as address:` is a real uvicorn on a free port."""
    return _listening


@contextlib.contextmanager
def _listening(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
