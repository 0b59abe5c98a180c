"""The official client for chat, completions and responses, where its own tests of `tests/server` do not go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK: Any = [{"role": "user", "content": "Weather in Paris?"}]


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=address, api_key="key", max_retries=0) as client:
        yield client


def test_a_tool_loop_to_the_end(client: Any) -> None:
    messages = list(ASK)
    first = client.chat.completions.create(model="easel-demo", messages=messages, tools=[WEATHER])
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    last = client.chat.completions.create(model="easel-demo", messages=messages, tools=[WEATHER])
    assert last.choices[0].message.content == "It is sunny."


def test_leaving_a_stream_stops_the_work(client: Any, stops_working: Callable[[], None]) -> None:
    slow: Any = [{"role": "user", "content": "slow"}]
    with client.chat.completions.create(model="easel-demo", messages=slow, stream=True) as stream:
        next(iter(stream))
    stops_working()


def test_completions(client: Any) -> None:
    answer = client.completions.create(model="easel-demo", prompt=["one", "two"], max_tokens=50, echo=True)
    assert [choice.text for choice in answer.choices] == ["oneIt is sunny.", "twoIt is sunny."]
    stream = client.completions.create(model="easel-demo", prompt="one", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "It is sunny."


def test_responses(client: Any) -> None:
    answer = client.responses.create(model="easel-demo", input="think", reasoning={"effort": "low"})
    assert answer.output_text == "It is sunny."
    assert answer.output[0].content[0].text == "hmm"
    again = client.responses.create(model="easel-demo", input="Sure?", previous_response_id=answer.id)
    assert again.previous_response_id == answer.id
    assert client.responses.retrieve(answer.id).output_text == "It is sunny."
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_responses_through_the_stream_helper(client: Any) -> None:
    tool = {"type": "function", "strict": False, **WEATHER["function"]}
    with client.responses.stream(model="easel-demo", input="Weather in Paris?", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    message, call = final.output
    assert message.content[0].text == "Let me see."
    assert json.loads(call.arguments) == {"city": "Paris"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    last = client.responses.create(model="easel-demo", input=[result], previous_response_id=final.id, tools=[tool])
    assert last.output_text == "It is sunny."


class Weather(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    """What is wanted."""

    city: str
    degrees: int


def test_a_parsed_object(client: Any) -> None:
    chat = client.chat.completions.parse(model="easel-demo", messages=ASK, response_format=Weather)
    assert chat.choices[0].message.parsed == Weather(city="Paris", degrees=21)
    response = client.responses.parse(model="easel-demo", input="Weather in Paris?", text_format=Weather)
    assert response.output_parsed == Weather(city="Paris", degrees=21)
    with client.chat.completions.stream(model="easel-demo", messages=ASK, response_format=Weather) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Weather(city="Paris", degrees=21)


def test_a_call_that_is_forced(client: Any) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(model="easel-demo", messages=ASK, tools=[WEATHER], tool_choice=choice)
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(model="easel-demo", messages=ASK, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == "It is sunny."
    assert bytes(byte for token in tokens for byte in token.bytes) == b"It is sunny."
    assert {len(token.top_logprobs) for token in tokens} == {2}
    with client.chat.completions.stream(model="easel-demo", messages=ASK, logprobs=True, top_logprobs=2) as stream:
        assert stream.get_final_completion().choices[0].logprobs.content == tokens


def test_options_of_this_server(client: Any) -> None:
    fast = {"easel": {"preset": "fast", "max_denoising_steps": 8}}
    assert client.chat.completions.create(model="easel-demo", messages=ASK, extra_body=fast).choices[0].message.content
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="easel-demo", messages=ASK, extra_body={"easel": {"preset": "best"}})
    assert caught.value.param == "easel.preset"


def test_infill(client: Any) -> None:
    answer = client.completions.create(model="easel-demo", prompt="It is", suffix=".", max_tokens=20)
    assert answer.choices[0].text == "sunny"


def test_errors_of_responses(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="easel-demo", input="x" * 30_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIError, match="it failed"):
        list(client.responses.create(model="easel-demo", input="fail", stream=True))
