"""Every field of the request body: honoured, harmless, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import PRESETS, Schedule
from server.dialects.chat_schema import ChatRequest, parse_chat_request
from server.errors import ApiError

MESSAGES = [{"role": "user", "content": "Hi"}]


def parse(**fields: Any) -> ChatRequest:
    return parse_chat_request(json.dumps({"messages": MESSAGES, **fields}).encode())


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


# Everything official clients put into a body unasked (api.md 2.8, 2.9), with values that mean nothing or "off".
HARMLESS = {
    "frequency_penalty": 0,
    "repetition_penalty": 1.0,
    "min_p": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "functions": [],
    "function_call": "auto",
    "modalities": ["text"],
    "audio": None,
    "web_search_options": None,
    "moderation": None,
    "suffix": None,
    "best_of": 1,
    "echo": False,
    "metadata": {"a": "b"},
    "store": True,
    "user": "me",
    "safety_identifier": "x",
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "prediction": {"type": "content", "content": "x"},
    "service_tier": "auto",
    "verbosity": "low",
    "parallel_tool_calls": False,
    "tools": [],
    "tool_choice": "none",
    "stream": False,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "stop": None,
    "n": 1,
    "seed": None,
    "temperature": None,
    "an_unknown_extra": {"deep": [1, 2]},
}

REFUSED = {
    "repetition_penalty": 1.1,
    "response_format": {"type": "structural_tag"},
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "web_search_options": {"search_context_size": "low"},
    "suffix": "end",
    "best_of": 2,
    "echo": True,
    "min_tokens": 5,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "truncate_prompt_tokens": 5,
    "structured_outputs": {"structural_tag": "{}"},
    "tool_choice": "sometimes",
}


@pytest.mark.parametrize("field", HARMLESS)
def test_harmless_values_are_accepted(field: str) -> None:
    parse(**{field: HARMLESS[field]})


def test_all_harmless_values_together_are_accepted() -> None:
    parse(**HARMLESS)


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_would_change_the_reply_is_refused_by_name(field: str) -> None:
    error = refusal(**{field: REFUSED[field]})
    assert (error.param, error.code) == (field, "unsupported_value")
    assert field in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", "much"),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", [[5, 1]]),
        ("logit_bias", {str(number): 1 for number in range(1025)}),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("top_logprobs", 2),  # without logprobs
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", -1),
        ("n", 0),
        ("n", 9),
        ("seed", 2**64),
        ("seed", 1.5),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("reasoning_effort", "enormous"),
        ("stream", "perhaps"),
        ("chat_template_kwargs", []),
        ("messages", []),
        ("messages", "Hi"),
        ("tools", "x"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    assert refusal(**{field: value}).param == field


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"preset": "best"}, "easel.preset"),
        ({"max_denoising_steps": 0}, "easel.max_denoising_steps"),
        ({"max_denoising_steps": 257}, "easel.max_denoising_steps"),
        ({"max_denoising_steps": 4.0}, "easel.max_denoising_steps"),
        ({"entropy_bound": -0.1}, "easel.entropy_bound"),
        ({"confidence_threshold": "low"}, "easel.confidence_threshold"),
        ({"stability_threshold": -1}, "easel.stability_threshold"),
        ({"steps": 4}, "easel.steps"),
        ("fast", "easel"),
    ],
)
def test_options_of_this_server_are_checked(options: Any, param: str) -> None:
    assert refusal(easel=options).param == param


def test_presets_are_a_beginning() -> None:
    assert parse(easel={}).draw()["schedule"] == Schedule()
    assert parse(easel={"preset": "balanced"}).draw()["schedule"] == Schedule()
    fast = PRESETS["fast"]
    assert parse(easel={"preset": "fast"}).draw()["schedule"] == fast
    asked = {"preset": "fast", "max_denoising_steps": 12, "entropy_bound": 0.4}
    assert parse(easel=asked).draw()["schedule"] == replace(fast, max_denoising_steps=12, entropy_bound=0.4)


@pytest.mark.parametrize("value", [101, -100.5, "1", None])
def test_a_bias_out_of_range_is_refused_with_its_token(value: Any) -> None:
    assert refusal(logit_bias={"5": 1, "7": value}).param == "logit_bias[7]"


@pytest.mark.parametrize("value", [0, 0.1, 0.7, 1, 2, None])
def test_temperatures_clients_send_are_accepted(value: float | None) -> None:
    assert parse(temperature=value).temperature == value


def message_refusal(**message: Any) -> ApiError:
    return refusal(messages=[*MESSAGES, message])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "AAAA"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "f"}},
    ],
)
def test_other_parts_than_text_are_refused_by_name(part: dict[str, Any]) -> None:
    error = message_refusal(role="user", content=[{"type": "text", "text": "see"}, part])
    assert error.param == "messages[1].content[1]"
    assert part["type"] in error.message
    assert error.code == "unsupported_value"


def test_faults_in_messages_are_located() -> None:
    assert message_refusal(role="user").param == "messages[1].content"
    assert message_refusal(role="user", content=5).param == "messages[1].content"
    assert message_refusal(role="user", content=[{"type": "text"}]).param == "messages[1].content[0]"
    assert message_refusal(role="wizard", content="x").param == "messages[1]"
    assert message_refusal(content="x").param == "messages[1]"
    assert message_refusal(role="assistant", function_call={"name": "f"}).param == "messages[1].function_call"


def test_missing_messages_are_named() -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(b'{"model": "demo"}')
    assert (caught.value.param, caught.value.code) == ("messages", "missing_required_parameter")


def test_all_roles_and_text_parts_are_accepted() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    request = parse(
        messages=[
            {"role": "system", "content": parts},
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts, "name": "Ana"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "audio": None},
            {"role": "tool", "tool_call_id": "c1", "content": {"degrees": 7}},
            {"role": "tool", "tool_call_id": "c1", "content": parts},
            {"role": "assistant", "content": parts, "refusal": None},
            {"role": "assistant"},
        ]
    )
    assert [message.role for message in request.messages][-1] == "assistant"
    assert request.messages[4].content == '{"degrees": 7}'


def test_tools_are_checked() -> None:
    good = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    assert parse(tools=[good]).tools
    assert refusal(tools=[{"type": "custom", "custom": {"name": "x"}}]).param == "tools[0]"
    assert refusal(tools=[{"type": "function"}]).param == "tools[0]"
    assert refusal(tools=[{"type": "function", "function": {"name": "two words"}}]).param == "tools[0].function.name"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"messages": [', b"\xff\xfe", b'{"messages": "\\ud800"}', b"[" * 100_000],
)
def test_malformed_json_is_a_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"x"'])
def test_json_that_is_no_object_is_a_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body)
    assert caught.value.status == 400


def test_the_error_does_not_grow_with_the_request() -> None:
    error = refusal(messages=[{"role": "x" * 10_000, "content": "y" * 10_000}] * 1000)
    assert len(error.message) < 5_000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*ChatRequest.model_fields, *HARMLESS, *REFUSED})


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_json_is_a_request_or_a_400(fields: dict[str, Any]) -> None:
    try:
        parse_chat_request(json.dumps({"messages": MESSAGES, **fields}).encode())
    except ApiError as error:
        assert error.status == 400
        json.dumps(error.body())
