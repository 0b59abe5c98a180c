"""The HTTP side: routes, authentication, limits, error bodies, and what happens when a client leaves.

Knows FastAPI and one wire format per route, not prompts or the engine. Invariants: every answer, whatever went
wrong, is a JSON body in the shape its clients parse, with an `x-request-id`; a client that leaves stops its work
within one step.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors, metrics, openapi, page
from server.chat import ChatService
from server.dialects import anthropic, completions, decisions, editors, openai_chat, responses, tokens
from server.dialects.response_store import ResponseStore
from server.dialects.wire import Asked
from server.errors import ApiError
from server.infill import open_reply
from server.sse import ChunkStream

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ANTHROPIC = "/v1/messages"  # what is below it has errors of another shape
_CLIENT_GONE = 499  # nobody reads it; it tells the access log why there is no answer


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """What the HTTP side can be told."""

    api_key: str | None = field(default=None, repr=False)  # None: no authentication
    heartbeat_seconds: float = 10.0
    drain_seconds: float = 10.0  # how long a running stream may go on after the server was told to stop
    max_body_bytes: int = 10_000_000


class _ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def create_app(service: ChatService, settings: AppSettings) -> FastAPI:
    """The application. It does not start or close the bridge: whoever built that does."""
    app = FastAPI(title="easel", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_RequestId)
    _handle_errors(app)
    _add_status_routes(app, service, settings)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _authenticate(request, settings)
        return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.model_names]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        _authenticate(request, settings)
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
    store = ResponseStore()
    _add_reply_route(app, service, settings, "/v1/responses", partial(responses.read, store))

    @app.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        _authenticate(request, settings)
        return JSONResponse(responses.retrieve(store, response_id))

    @app.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> Response:
        _authenticate(request, settings)
        return JSONResponse(responses.delete(store, response_id))


def _add_decisions(app: FastAPI, service: ChatService, settings: AppSettings) -> None:
    @app.post("/v1/decisions")
    async def decide(request: Request) -> Response:
        _authenticate(request, settings)
        document = await _json_body(request, settings.max_body_bytes)
        return JSONResponse(await _unless_gone(request, decisions.decide(service, document)))


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
        _authenticate(request, settings)
        document = await _json_body(request, settings.max_body_bytes)
        # Tokenising a long text takes a while; replies go on meanwhile.
        return JSONResponse(await asyncio.to_thread(answer, service, document))


def _add_reply_route(
    app: FastAPI, service: ChatService, settings: AppSettings, path: str, read: Callable[[bytes], Asked]
) -> None:
    """A route of one wire format: `read` checks the body and says how to answer it."""

    @app.post(path)
    async def reply(request: Request) -> Response:
        _authenticate(request, settings)
        asked = read(await _json_body(request, settings.max_body_bytes))
        if not asked.streamed:
            return JSONResponse(await _unless_gone(request, _complete(service, asked)))
        reply = await open_reply(service, asked.task)
        return ChunkStream(
            asked.chunks(reply),
            framing=asked.framing,
            close=reply.close,
            heartbeat_seconds=settings.heartbeat_seconds,
            drain_seconds=settings.drain_seconds,
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
        _authenticate(request, settings)
        about = {"model": service.model_names[0], "ready": service.bridge.ready}
        return JSONResponse(about | service.bridge.metrics.document())

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        _authenticate(request, settings)
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
    length = service.bridge.info.context_length
    return openai_chat.model_card(name, created=service.loaded_at, context_length=length)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but drop it when the client leaves: nothing cancels a plain endpoint by itself."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise _ClientGone
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _authenticate(request: Request, settings: AppSettings) -> None:
    if settings.api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("x-api-key", "")  # Anthropic's clients
    # Digests, so that the time taken tells nothing about the key, its length included.
    expected, actual = (hashlib.sha256(key.encode()).digest() for key in (settings.api_key, given.strip()))
    if not hmac.compare_digest(expected, actual):
        message = "Incorrect or missing API key. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def _json_body(request: Request, limit: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        message = f"The body must be JSON, sent as 'Content-Type: application/json' (got '{kind[:100] or 'none'}')."
        raise ApiError(415, message, code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    body = bytearray()
    if not (declared.isdecimal() and int(declared) > limit):
        async for part in request.stream():
            body += part
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _error_response(request, error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return _error_response(request, ApiError(error.status_code, message, code=code, headers=error.headers))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return _error_response(request, errors.invalid(f"{param}: {first['msg']}", param=param))

    @app.exception_handler(_ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def client_gone(_: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback; the client gets nothing that could show other people's text.
        response = _error_response(request, ApiError(500, "Internal server error", code="internal_error"))
        response.headers["x-request-id"] = request.scope["state"]["request_id"]  # sent outside the middleware
        return response


def _error_response(request: Request, error: ApiError) -> Response:
    """The error in the shape of the wire format that was spoken."""
    body = anthropic.error_body(error) if request.url.path.startswith(_ANTHROPIC) else error.body()
    return JSONResponse(body, status_code=error.status, headers=error.headers)


class _RequestId:
    """Gives every answer an `x-request-id`: the client's own, if it sent a sane one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        sane = 0 < len(given) <= 128 and given.isascii() and given.decode().isprintable()
        request_id = given.decode() if sane else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        await self._app(scope, receive, send_with_id)
