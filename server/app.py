"""The HTTP side: routes, authentication, limits, error bodies, and what happens when a client leaves.

Knows FastAPI and one wire format per route, not prompts or the engine. Invariants: every answer, whatever went
wrong, is a JSON body in the shape its clients parse, with an `x-request-id`; a client that leaves stops its work
within one step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from server import errors, metrics, openapi, page
from server.access import Keys, Names
from server.chat import ChatService
from server.dialects import anthropic, completions, decisions, editors, openai_chat, responses, tokens
from server.dialects.response_store import ResponseStore
from server.dialects.wire import Asked
from server.errors import ApiError
from server.infill import open_reply
from server.middleware import NamesOnly, RequestRecord, SpanAround, error_response
from server.sse import ChunkStream

logger = logging.getLogger(__name__)
T = TypeVar("T")

_CLIENT_GONE = 499  # nobody reads it; it tells the access log why there is no answer


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """What the HTTP side can be told."""

    keys: Keys = field(default_factory=lambda: Keys(()))
    names: Names | None = None  # None: any name and origin
    cors_origins: tuple[str, ...] = ()
    heartbeat_seconds: float = 10.0
    drain_seconds: float = 10.0  # how long a running stream may go on after the server was told to stop
    body_seconds: float = 60.0  # how long a client may take to send its body
    request_seconds: float | None = None  # how long an answer may take altogether
    send_seconds: float = 60.0  # how long a client may take to read what a stream sent it
    max_body_bytes: int = 10_000_000
    max_messages: int = 10_000
    log_content: bool = False
    response_tag: str = ""  # begins the ids of stored responses, where several servers have one address
    span: SpanAround | None = None


class _ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def create_app(service: ChatService, settings: AppSettings) -> FastAPI:
    """The application. It does not start or close the bridge: whoever built that does."""
    app = FastAPI(title="easel", docs_url=None, redoc_url=None, openapi_url=None)
    if settings.names is not None:
        app.add_middleware(NamesOnly, names=settings.names)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(
        RequestRecord, metrics=service.bridge.metrics, log_content=settings.log_content, span=settings.span
    )
    _handle_errors(app)
    _add_status_routes(app, service, settings)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        settings.keys.check(request.headers)
        return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.model_names]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        settings.keys.check(request.headers)
        if name not in service.model_names:
            raise errors.unknown_model(name, service.model_names)
        return JSONResponse(_card(service, name))

    _add_reply_route(app, service, settings, "/v1/chat/completions", openai_chat.read)
    _add_reply_route(app, service, settings, "/v1/completions", completions.read)
    _add_reply_route(app, service, settings, "/v1/messages", anthropic.read)
    for path in ("/v1/fim/completions", "/fim/completions"):
        _add_reply_route(app, service, settings, path, editors.read_fim)
    _add_reply_route(app, service, settings, "/infill", editors.read_llama)
    _add_responses(app, service, settings)
    _add_decisions(app, service, settings)
    for path, answer in (
        ("/v1/messages/count_tokens", anthropic.count_tokens),
        ("/tokenize", tokens.tokenize),
        ("/detokenize", tokens.detokenize),
        ("/apply-template", tokens.apply_template),
    ):
        _add_plain_route(app, service, settings, path, answer)
    return app


def _add_responses(app: FastAPI, service: ChatService, settings: AppSettings) -> None:
    store = ResponseStore(tag=settings.response_tag)
    _add_reply_route(app, service, settings, "/v1/responses", partial(responses.read, store))

    @app.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        settings.keys.check(request.headers)
        return JSONResponse(responses.retrieve(store, response_id))

    @app.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> Response:
        settings.keys.check(request.headers)
        return JSONResponse(responses.delete(store, response_id))


def _add_decisions(app: FastAPI, service: ChatService, settings: AppSettings) -> None:
    @app.post("/v1/decisions")
    async def decide(request: Request) -> Response:
        settings.keys.check(request.headers)
        document = await _json_body(request, settings)
        return JSONResponse(await _unless_gone(request, settings, decisions.decide(service, document)))


def _add_plain_route(
    app: FastAPI,
    service: ChatService,
    settings: AppSettings,
    path: str,
    answer: Callable[[ChatService, bytes], dict[str, Any]],
) -> None:
    """A route that generates nothing."""

    @app.post(path)
    async def plain(request: Request) -> Response:
        settings.keys.check(request.headers)
        document = await _json_body(request, settings)
        # Tokenising a long text takes a while; replies go on meanwhile.
        return JSONResponse(await asyncio.to_thread(answer, service, document))


def _add_reply_route(
    app: FastAPI, service: ChatService, settings: AppSettings, path: str, read: Callable[[bytes], Asked]
) -> None:
    """A route of one wire format: `read` checks the body and says how to answer it."""

    @app.post(path)
    async def reply(request: Request) -> Response:
        settings.keys.check(request.headers)
        asked = read(await _json_body(request, settings))
        if len(asked.task.messages) > settings.max_messages:
            raise errors.too_many_messages(len(asked.task.messages), settings.max_messages)
        if not asked.streamed:
            return JSONResponse(await _unless_gone(request, settings, _complete(service, asked)))
        reply = await open_reply(service, asked.task)
        return ChunkStream(
            _in_time(asked.chunks(reply), request, settings),
            framing=asked.framing,
            close=reply.close,
            heartbeat_seconds=settings.heartbeat_seconds,
            drain_seconds=settings.drain_seconds,
            send_seconds=settings.send_seconds,
        )


def _add_status_routes(app: FastAPI, service: ChatService, settings: AppSettings) -> None:
    page.add_assets(app)

    @app.get("/")
    async def root(request: Request) -> Response:
        if page.wants_page(request):
            return page.page()
        return JSONResponse({"easel": "POST /v1/chat/completions", "models": list(service.model_names)})

    @app.get("/openapi.json")
    async def description() -> Response:
        return JSONResponse(openapi.document())

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/stats")
    async def stats(request: Request) -> Response:
        if page.wants_page(request):
            return page.page()
        settings.keys.check(request.headers)
        about = {"model": service.model_names[0], "ready": service.bridge.ready}
        return JSONResponse(about | service.bridge.metrics.document())

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        settings.keys.check(request.headers)
        return Response(service.bridge.metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    @app.get("/ready")
    async def ready() -> Response:
        if not service.bridge.ready:
            raise errors.unavailable("The engine is not running")
        return JSONResponse({"status": "ready"})


async def _complete(service: ChatService, asked: Asked) -> dict[str, Any]:
    reply = await open_reply(service, asked.task)
    try:
        return await asked.body(reply)
    finally:
        await reply.close()


def _card(service: ChatService, name: str) -> dict[str, Any]:
    info = service.bridge.info
    return openai_chat.model_card(
        name, created=service.loaded_at, context_length=info.context_length, images=info.image_tokens > 0
    )


def _seconds_left(request: Request, settings: AppSettings) -> float | None:
    limit = settings.request_seconds
    return None if limit is None else limit - (time.monotonic() - request.scope["state"]["began"])


async def _in_time(
    chunks: AsyncGenerator[dict[str, Any], None], request: Request, settings: AppSettings
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks, until the time is up. Raises ApiError then."""
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout(_seconds_left(request, settings)):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise errors.timed_out(settings.request_seconds) from None
            yield chunk


async def _unless_gone(request: Request, settings: AppSettings, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but drop it when the client leaves or the time is up: nothing cancels a plain endpoint by itself."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        left = _seconds_left(request, settings)
        await asyncio.wait({doing, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        if leaving.done():
            raise _ClientGone
        raise errors.timed_out(settings.request_seconds)
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json_body(request: Request, settings: AppSettings) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        message = f"The body must be JSON, sent as 'Content-Type: application/json' (got '{kind[:100] or 'none'}')."
        raise ApiError(415, message, code="unsupported_media_type")
    declared, limit = request.headers.get("content-length", ""), settings.max_body_bytes
    body = bytearray()
    if not (declared.isdecimal() and int(declared) > limit):
        try:
            async with asyncio.timeout(settings.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        break
                else:
                    return bytes(body)
        except TimeoutError:
            message = f"The body did not arrive within {settings.body_seconds:g} seconds."
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
    raise ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(request.url.path, error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return error_response(request.url.path, ApiError(error.status_code, message, code=code, headers=error.headers))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return error_response(request.url.path, errors.invalid(f"{param}: {first['msg']}", param=param))

    @app.exception_handler(_ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def client_gone(_: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback; the client gets nothing that could show other people's text.
        response = error_response(request.url.path, ApiError(500, "Internal server error", code="internal_error"))
        response.headers["x-request-id"] = request.scope["state"]["request_id"]  # sent outside the middleware
        return response
