"""What happens to every request, whatever its route: its id, names that are refused, the log line, the counts.

Knows ASGI, not what is asked or answered. Invariants: every answer has an `x-request-id`, and is logged and counted
once, when its last byte is out; prompts and replies are logged only if the settings ask for it.
"""

from __future__ import annotations

import logging
import time
import uuid
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.access import Names
from server.dialects import anthropic
from server.errors import ApiError
from server.metrics import Metrics

access_log = logging.getLogger("easel.access")
content_log = logging.getLogger("easel.content")

_ANTHROPIC = "/v1/messages"  # what is below it has errors of another shape
_ASKED_OFTEN = frozenset({"/health", "/ready", "/metrics", "/stats"})  # by machines, which nobody wants to read of
_OTHER_ROUTE = "other"  # paths that do not exist must not become labels


def error_response(path: str, error: ApiError) -> Response:
    """The error in the shape of the wire format that was spoken."""
    body = anthropic.error_body(error) if path.startswith(_ANTHROPIC) else error.body()
    return JSONResponse(body, status_code=error.status, headers=error.headers)


class NamesOnly:
    """Refuses names and origins that are not known."""

    def __init__(self, app: ASGIApp, names: Names) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._names.check(Headers(scope=scope))
            except ApiError as error:
                await error_response(scope["path"], error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class SpanAround(Protocol):
    """Traces one request while the context is open."""

    def __call__(self, scope: Scope, request_id: str) -> AbstractContextManager[None]: ...


class RequestRecord:
    """Gives every answer an `x-request-id`, the client's own if it sent a sane one; logs, counts and traces it."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, log_content: bool = False, span: SpanAround | None = None
    ) -> None:
        self._app, self._metrics = app, metrics
        self._log_content, self._span = log_content, span

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        scope["state"]["began"] = began = time.monotonic()
        status = 500  # what is sent where nothing was answered
        said = _Content() if self._log_content else None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = scope["state"]["status"] = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            elif said is not None:
                said.answer += message.get("body", b"")
            await send(message)

        async def receive_noted() -> Message:
            message = await receive()
            if said is not None:
                said.question += message.get("body", b"")
            return message

        token = logs.request_id.set(request_id)
        try:
            with self._span(scope, request_id) if self._span else nullcontext():
                await self._app(scope, receive_noted, send_with_id)
        finally:
            self._record(scope, status, time.monotonic() - began)
            if said is not None and said.question:
                said.log()
            logs.request_id.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        route = getattr(scope.get("route"), "path", _OTHER_ROUTE)
        self._metrics.http(route=route, method=method, status=status, seconds=seconds)
        client = scope.get("client")
        fields = {
            "client": client[0] if client else None,
            "method": method,
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }
        level = logging.DEBUG if scope["path"] in _ASKED_OFTEN and status < 500 else logging.INFO
        # %r: a path may hold line ends, which must not look like lines of the log.
        text = '%s "%s %s" %d, %.3f s, %s'
        shown = (fields["client"], method, ascii(scope["path"])[1:-1], status, seconds, scope["state"]["request_id"])
        access_log.log(level, text, *shown, extra=fields)


class _Content:
    """What was asked and answered, gathered for the log."""

    def __init__(self) -> None:
        self.question, self.answer = bytearray(), bytearray()

    def log(self) -> None:
        question, answer = (text.decode(errors="replace") for text in (self.question, self.answer))
        content_log.info("asked %s; answered %s", ascii(question), ascii(answer))


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _request_id(scope: Scope) -> str:
    given: bytes = dict(scope["headers"]).get(b"x-request-id", b"")
    sane = 0 < len(given) <= 128 and given.isascii() and given.decode().isprintable()
    return given.decode() if sane else f"req_{uuid.uuid4().hex}"
