"""Histories as clients really send them, and the prompt the model is given for each (see `histories/make.py`)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from server.dialects.chat_schema import parse_chat_request
from server.errors import ApiError

HERE = Path(__file__).with_name("histories")
SPEC = importlib.util.spec_from_file_location("make_histories", HERE / "make.py")
assert SPEC is not None
assert SPEC.loader is not None
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)
SOURCES = sorted(HERE.glob("*.json"))


def test_there_are_histories() -> None:
    assert len(SOURCES) >= 8


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_prompt_of_a_history(source: Path) -> None:
    body = json.loads(source.read_text(encoding="utf-8"))
    prompt = make.prompt_of(body, make.TEMPLATE.read_text(encoding="utf-8"))
    assert prompt == source.with_suffix(".txt").read_text(encoding="utf-8")


def refusal(*messages: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(json.dumps({"messages": messages, **fields}).encode())
    assert (caught.value.status, caught.value.code) == (400, "unsupported_value")
    return caught.value


def test_retired_forms_say_what_to_send_instead() -> None:
    user = {"role": "user", "content": "x"}
    call = {"name": "f", "arguments": "{}"}
    error = refusal(user, {"role": "assistant", "content": None, "function_call": call})
    assert error.param == "messages[1].function_call"
    assert "'tool_calls'" in error.message
    error = refusal(user, {"role": "function", "name": "f", "content": "sunny"})
    assert error.param == "messages[1].role"
    assert "'tool'" in error.message
    assert "'tools'" in refusal(user, functions=[{"name": "f"}]).message
    assert "'tool_choice'" in refusal(user, function_call={"name": "f"}).message
