"""OpenTelemetry traces: one span for each HTTP request, below it the wait for a slot and each canvas.

Only imported when an endpoint is set; needs the extra `tracing`. Knows ASGI scopes and timelines, not what is asked
or answered, so a span cannot hold it. Invariant: tracing never delays or fails a request: spans are sent in batches, by
a thread of the exporter's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import Scope

from engine import Request
from server.metrics import Timeline


class Tracing:
    """Makes spans; `close` sends what is left."""

    def __init__(self, endpoint: str, *, version: str, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create({"service.name": "easel", "service.version": version})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("easel")

    @contextmanager
    def span(self, scope: Scope, request_id: str) -> Iterator[None]:
        """A span around one HTTP request, in the caller's trace if it sent one."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        facts = {"http.request.method": scope["method"], "url.path": scope["path"], "easel.request_id": request_id}
        with self._tracer.start_as_current_span(
            scope["method"],
            propagate.extract(carrier),
            SpanKind.SERVER,
            attributes=facts,
            record_exception=False,  # its words may be a client's
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            status = scope["state"].get("status", 500)
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_status(StatusCode.ERROR)

    def record(self, request: Request, timeline: Timeline) -> None:
        """Spans of one engine request, below the current one. For `Bridge(on_end=...)`."""
        now, ahead = time.monotonic(), time.time_ns() - time.monotonic_ns()

        def at(moment: float) -> int:
            return int(moment * 1e9) + ahead

        end = timeline.ended or now
        facts = {"easel.prompt_tokens": len(request.prompt_ids), "easel.reason": timeline.reason or "cancelled"}
        reply = self._tracer.start_span("reply", attributes=facts, start_time=at(timeline.submitted))
        below = trace.set_span_in_context(reply)
        seated = timeline.seated or end
        wait = self._tracer.start_span("wait for a slot", below, start_time=at(timeline.submitted))
        wait.end(at(seated))
        began = seated
        for index, (delivered, steps) in enumerate(timeline.canvases):
            canvas = self._tracer.start_span(
                "canvas",
                below,
                attributes={"easel.canvas": index, "easel.steps": steps},
                start_time=at(began),
            )
            canvas.end(at(delivered))
            began = delivered
        if timeline.reason == "error":
            reply.set_status(StatusCode.ERROR)
        reply.end(at(end))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
