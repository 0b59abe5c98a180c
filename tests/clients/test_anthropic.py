"""The official Anthropic client: messages, streams, thoughts, a tool loop, counting, errors, leaving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic")

USER: Any = [{"role": "user", "content": "Weather in Paris?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def client(server: str, address: str) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server, api_key="key", max_retries=0) as client:
        yield client


def test_a_message(client: Any) -> None:
    message = client.messages.create(model="easel-demo", max_tokens=100, messages=USER, system="Be kind.")
    assert message.content[0].text == "It is sunny."
    assert (message.stop_reason, message.role, message.type) == ("end_turn", "assistant", "message")
    assert message.usage.input_tokens > 10


def test_a_stream_with_a_thought(client: Any) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    asked: Any = [{"role": "user", "content": "think"}]
    with client.messages.stream(model="easel-demo", max_tokens=2000, messages=asked, thinking=thinking) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "It is sunny."
    assert [part.type for part in final.content] == ["thinking", "text"]
    assert final.content[0].thinking == "hmm"
    assert final.usage.output_tokens > 5


def test_a_tool_loop_to_the_end(client: Any) -> None:
    with client.messages.stream(model="easel-demo", max_tokens=100, messages=USER, tools=[WEATHER]) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    text, call = first.content
    assert (text.text, call.name, call.input) == ("Let me see.", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    history = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    last = client.messages.create(model="easel-demo", max_tokens=100, messages=history, tools=[WEATHER])
    assert last.content[0].text == "It is sunny."


def test_counting(client: Any) -> None:
    counted = client.messages.count_tokens(model="easel-demo", messages=USER, tools=[WEATHER])
    message = client.messages.create(model="easel-demo", max_tokens=100, messages=USER, tools=[WEATHER])
    assert counted.input_tokens == message.usage.input_tokens


def test_errors_are_the_clients_own(client: Any, server: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.create(model="easel-demo", max_tokens=5, messages=[{"role": "user", "content": "x" * 30_000}])
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=5, messages=USER)
    with pytest.raises(anthropic.InternalServerError, match="it failed"):
        client.messages.create(model="easel-demo", max_tokens=5, messages=[{"role": "user", "content": "fail"}])
    with pytest.raises(anthropic.APIError, match="it failed"):
        list(
            client.messages.create(
                model="easel-demo", max_tokens=5, messages=[{"role": "user", "content": "fail"}], stream=True
            )
        )
    with anthropic.Anthropic(base_url=server, api_key="wrong") as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(model="easel-demo", max_tokens=5, messages=USER)


def test_leaving_a_stream_stops_the_work(client: Any, stops_working: Callable[[], None]) -> None:
    slow: Any = [{"role": "user", "content": "slow"}]
    with client.messages.stream(model="easel-demo", max_tokens=5000, messages=slow) as stream:
        next(iter(stream.text_stream))
    stops_working()
