"""Our own OpenAPI document: whatever follows it, and whatever does not, gets a described answer and never a 500."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.openapi import document
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, script

CASES = int(os.environ.get("FUZZ_CASES", "0")) // 160 or 15  # of each of the 16 operations; test_fuzz has the rest
SCHEMA = schemathesis.openapi.from_dict(document())
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def address(prompts: PromptRenderer, listening: Any) -> Iterator[str]:
    with Bridge(FakeEngine(lambda _: script("Hel", "lo", steps=1))) as bridge:
        with listening(create_app(ChatService(bridge, prompts, ("demo",)), AppSettings())) as where:
            yield where


@SCHEMA.parametrize()
@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_any_request_gets_a_described_answer(case: schemathesis.Case, address: str) -> None:
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "demo"
    case.validate_response(case.call(base_url=address), checks=CHECKS)


def test_the_document_is_served_and_has_every_route(serve: Callable[..., Any]) -> None:
    client = serve()
    served = client.request("GET", "/openapi.json").json()
    assert served == json.loads(json.dumps(document()))
    routes = {(method, route.path) for route in client.app.routes for method in getattr(route, "methods", ())}
    described = {(method.upper(), path) for path, methods in served["paths"].items() for method in methods}
    own = {(method, path.replace(":path", "")) for method, path in routes if method in ("GET", "POST")}
    assert own - described == {
        ("GET", "/"),
        ("GET", "/openapi.json"),
        ("GET", "/metrics"),
        ("POST", "/fim/completions"),
    }
    assert described - own == set()


def test_what_is_honoured_is_described() -> None:
    chat = document()["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"logprobs", "top_logprobs", "logit_bias", "easel", "min_p", "tools"} <= set(chat)
