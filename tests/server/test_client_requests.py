"""The first requests of every client in `tests/clients`, as recorded there: the odd fields they send are accepted.

RECORD_REQUESTS=tests/clients/requests make test-clients      # records those that are missing
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import script

REQUESTS = sorted((Path(__file__).parent.parent / "clients" / "requests").glob("*.json"))


def test_there_are_requests() -> None:
    clients = {path.name.partition("-")[0] for path in REQUESTS}
    assert clients >= {
        "node",
        "openai",
        "anthropic",
        "langchain",
        "litellm",
        "instructor",
        "pydantic_ai",
        "llama_index",
        "agents",
    }


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: path.stem)
def test_a_clients_request_is_answered(serve: Callable[..., Any], path: Path) -> None:
    recorded = json.loads(path.read_text(encoding="utf-8"))
    body = {**recorded["body"], "model": "demo"}
    answer = serve(script("Hello")).request("POST", recorded["path"], json=body)
    assert answer.status_code == 200, answer.text
    if "count_tokens" not in recorded["path"]:
        assert "Hello" in answer.text
