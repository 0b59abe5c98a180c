"""LiteLLM in front of the server: chat, stream, thoughts, tools, and its mapping of errors. Anthropic's route too."""

from __future__ import annotations

from typing import Any

import pytest

litellm = pytest.importorskip("litellm")

WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def ask(address: str, content: str = "Weather in Paris?", **fields: Any) -> Any:
    return litellm.completion(
        **{
            "model": "openai/easel-demo",
            "api_base": address,
            "api_key": "key",
            "messages": [{"role": "user", "content": content}],
            "num_retries": 0,
            "max_retries": 0,
            **fields,
        }
    )


def test_a_chat_with_a_thought(address: str) -> None:
    message = ask(address, "think").choices[0].message
    assert (message.content, message.reasoning_content) == ("It is sunny.", "hmm")


def test_a_stream(address: str) -> None:
    chunks = list(ask(address, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "It is sunny."
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens > 5


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_loop_to_the_end(address: str, streamed: bool) -> None:
    answer = ask(address, tools=[WEATHER], stream=streamed)
    if streamed:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    history = [
        {"role": "user", "content": "Weather in Paris?"},
        message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert ask(address, tools=[WEATHER], messages=history).choices[0].message.content == "It is sunny."


def test_structured_output(address: str) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
    assert ask(address, response_format=form).choices[0].message.content == '{"city": "Paris", "degrees": 21}'
    call = ask(address, tools=[WEATHER], tool_choice="required").choices[0].message.tool_calls[0]
    assert call.function.arguments == '{"city": "Paris"}'


def test_logprobs(address: str) -> None:
    tokens = ask(address, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == "It is sunny."


def test_anthropics_route(server: str, address: str) -> None:
    answer = ask(server, model="anthropic/easel-demo", max_tokens=100)
    assert answer.choices[0].message.content == "It is sunny."


def test_errors(address: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(address, "x" * 30_000)
    with pytest.raises(litellm.AuthenticationError):
        ask(address, api_key="wrong")
    with pytest.raises(litellm.NotFoundError):
        ask(address, model="openai/other")
    with pytest.raises(litellm.InternalServerError, match="it failed"):
        ask(address, "fail")
