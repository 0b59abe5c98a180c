"""The one address before several replicas: each request goes to the replica it belongs to, and its answer back.

Knows ASGI and which replica holds what (`sessions.py`), not how replicas are reached (whoever builds it says so) nor
what is asked: keys, limits and errors of a request are the replica's, which runs the same app as a single server.
Invariants: every message of an answer is passed on as it comes; a request whose replica is lost ends with an error in
the shape its client parses, and a client that leaves stops the work at the replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics, page
from server.app import AppSettings
from server.dialects import anthropic
from server.dialects.responses import error_event
from server.errors import ApiError
from server.middleware import NamesOnly, error_response
from server.sessions import Wish, wish_of
from server.sse import Framing, ending, typed

logger = logging.getLogger(__name__)

REPLICA_HEADER = "x-easel-replica"  # which replica answered
REFUSED: Message = {"type": "easel.refused"}  # instead of an answer: the replica's engine is gone
_CHOOSE_SECONDS = 30.0  # how long a request may wait for a replica to come
_LATE_SECONDS = 30.0  # how long after a request's time its replica may still say so itself
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


class ReplicaGone(Exception):
    """The replica died, or was taken away, before its answer ended."""


class Chosen(Protocol):
    """A replica that has room for a request."""

    @property
    def replica(self) -> str:
        """Its id."""
        ...

    def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """Its ASGI messages, or REFUSED. Raises ReplicaGone; closing the generator stops the work."""
        ...


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a replica says of itself."""

    replica: str
    ready: bool
    stats: dict[str, Any]  # as in `GET /stats`
    exposition: bytes  # as in `GET /metrics`


class Replicas(Protocol):
    """The way to the replicas."""

    def choose(self, wish: Wish) -> AbstractAsyncContextManager[Chosen]:
        """Waits until there is one. The answer must be read inside."""
        ...

    async def reports(self) -> Sequence[Report]:
        """Of all that answer within some seconds."""
        ...


async def run(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """An app's messages for a request that was read elsewhere, as they come. Closing the generator stops the work."""
    said: asyncio.Queue[Message | None] = asyncio.Queue()
    asked: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    left = asyncio.Event()

    async def receive() -> Message:
        if asked:
            return asked.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def answer() -> None:
        try:
            await app(dict(scope), receive, said.put)
        except Exception:  # its client has been told; a web server would do no more
            logger.exception("a request failed")
        finally:
            said.put_nowait(None)

    answering = asyncio.ensure_future(answer())
    try:
        while (message := await said.get()) is not None:
            yield message
    finally:
        left.set()
        answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering


def create_door(replicas: Replicas, settings: AppSettings) -> Starlette:
    """The application before the replicas; `settings` are those of the replicas' own apps."""
    forward = _Forward(replicas, settings)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        if not any(report.ready for report in await replicas.reports()):
            raise _unavailable("No replica is ready.")
        return JSONResponse({"status": "ready"})

    async def prometheus(request: Request) -> Response:
        settings.keys.check(request.headers)
        expositions = {report.replica: report.exposition for report in await replicas.reports()}
        return Response(metrics.merged(expositions), media_type=metrics.CONTENT_TYPE)

    async def stats(request: Request) -> Response:
        if page.wants_page(request):
            return page.page()
        settings.keys.check(request.headers)
        return JSONResponse(_stats(await replicas.reports(), request.query_params.get("replica")))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(request.url.path, error)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", prometheus),
            Route("/stats", stats),
            Route("/{path:path}", forward),
        ],
        middleware=[Middleware(NamesOnly, names=settings.names)] if settings.names is not None else [],
        exception_handlers={ApiError: refused},
    )


class _Forward:
    """Everything that a replica answers."""

    def __init__(self, replicas: Replicas, settings: AppSettings) -> None:
        self._replicas, self._settings = replicas, settings
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._body(Request(scope, receive))
        except ClientDisconnect:
            return
        # A long body takes a while to read; other answers go on meanwhile.
        wish = await asyncio.to_thread(wish_of, scope["path"], Headers(scope=scope), body)
        answering = asyncio.ensure_future(self._answer(scope, body, wish, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _body(self, request: Request) -> bytes:
        """The body as far as it may go; the replica refuses what is longer."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self._settings.max_body_bytes:
                        break
        except TimeoutError:
            message = f"The body did not arrive within {self._settings.body_seconds:g} seconds."
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
        return bytes(body)

    async def _answer(self, scope: Scope, body: bytes, wish: Wish, send: Send) -> None:
        plain = {name: scope[name] for name in _SCOPE if name in scope}
        plain |= {"client": scope.get("client"), "server": scope.get("server"), "asgi": {"version": "3.0"}}
        relay = _Relay(scope["path"], send)
        limit = self._settings.request_seconds
        try:
            async with asyncio.timeout(None if limit is None else limit + _LATE_SECONDS):
                avoid: frozenset[str] = frozenset()
                while refused_by := await self._try(plain, body, self._asking(wish, avoid), relay):
                    if refused_by in avoid:
                        raise _unavailable("No replica's engine is running.")
                    avoid |= {refused_by}
        except ReplicaGone as error:
            logger.warning("%s %s: its replica is gone: %s", scope["method"], ascii(scope["path"]), error)
            await relay.lost(_unavailable("The replica that served this request is gone. Please retry."))
        except TimeoutError:
            await relay.lost(ApiError(504, "The replica did not answer in time.", code="request_timeout"))

    def _asking(self, wish: Wish, avoid: frozenset[str]) -> Wish:
        return Wish(replica=wish.replica, key=wish.key, avoid=avoid, running=dict(+self._running))

    async def _try(self, scope: Scope, body: bytes, wish: Wish, relay: _Relay) -> str | None:
        """Have one replica answer. The one that refused to, if so."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(_CHOOSE_SECONDS):
                    chosen = await stack.enter_async_context(self._replicas.choose(wish))
            except TimeoutError:
                raise _unavailable(f"No replica came free within {_CHOOSE_SECONDS:g} seconds.") from None
            self._running[chosen.replica] += 1
            stack.callback(self._running.subtract, [chosen.replica])
            messages = await stack.enter_async_context(aclosing(chosen.answer(scope, body)))
            async for message in messages:
                if message["type"] == REFUSED["type"]:
                    return chosen.replica
                await relay.pass_on(message, chosen.replica)
        if not relay.ended:
            raise ReplicaGone("its answer broke off")
        return None


class _Relay:
    """One answer on its way to the client."""

    def __init__(self, path: str, send: Send) -> None:
        self._path, self._send = path, send
        self._events: int | None = None  # that were sent, once the answer has turned out to be a stream
        self.ended = False

    async def pass_on(self, message: Message, replica: str) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=list(message["headers"]))
            self._events = 0 if headers.get("content-type", "").startswith("text/event-stream") else None
            own = (REPLICA_HEADER.encode(), replica.encode())
            # The request's id is added again by whoever brought the request here.
            kept = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            message = {**message, "headers": [*kept, own]}
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
            if self._events is not None and b"data:" in message.get("body", b""):
                self._events += 1
        await self._send(message)

    async def lost(self, error: ApiError) -> None:
        """The answer will not go on. Raises the error where it can be the answer.

        Behind half a body it cannot: the connection breaks then, or what came would look whole.
        """
        if self._events is None:
            raise error
        text = ending(error, _framing(self._path, self._events))
        await self._send({"type": "http.response.body", "body": text, "more_body": False})


def _framing(path: str, events: int) -> Framing:
    """How the wire format that has this path frames its errors."""
    if path == "/v1/messages":
        return Framing(name=typed, done=False, error=anthropic.error_body)
    if path == "/v1/responses":
        return Framing(name=typed, error=lambda error: error_event(error, events))
    return Framing(done=path != "/infill")


def _stats(reports: Sequence[Report], wanted: str | None) -> dict[str, Any]:
    """One replica's document, the first one's if none is named, and the names of all."""
    by_id = {report.replica: report for report in sorted(reports, key=lambda report: report.replica)}
    if not by_id:
        raise _unavailable("No replica answers.")
    if wanted is not None and wanted not in by_id:
        raise ApiError(404, f"There is no replica '{wanted[:100]}'; there are {', '.join(by_id)}.", param="replica")
    report = by_id[wanted or next(iter(by_id))]
    return report.stats | {"replica": report.replica, "replicas": list(by_id)}


def _unavailable(message: str) -> ApiError:
    """503, and unlike a single server's worth another try: there are other replicas, or there will be."""
    return ApiError(503, message, code="service_unavailable", headers={"Retry-After": "1"})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
