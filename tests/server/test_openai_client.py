"""The official Python client against a live server: sync, async, streaming, its `.stream()` helper, its errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from engine import GenerationRequest
from server.access import Keys
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Script, byte_tokenizer, script

MESSAGES: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = script("<|channel>thought\nhm\n<channel|>", '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>')
TOKENIZER = byte_tokenizer()


def say(request: GenerationRequest) -> Script:
    """A call when a tool is declared, an answer otherwise, an error when asked for one."""
    prompt = TOKENIZER.decode(list(request.prompt_ids), skip_special_tokens=False)
    if "fail" in prompt:
        return script("a", reason="error", error="it failed")
    if "declaration" in prompt and "<|tool_response>" not in prompt:
        return CALL
    return script("It is ", "sunny.")


@pytest.fixture(scope="module")
def address(listening: Any) -> Iterator[str]:
    from tests.fakes import Template

    with Bridge(FakeEngine(say, context_length=500)) as bridge:
        service = ChatService(bridge, PromptRenderer(TOKENIZER, Template()), ["demo"])
        with listening(create_app(service, AppSettings(keys=Keys(["k"])))) as url:
            yield f"{url}/v1"


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="k", max_retries=0) as client:
        yield client


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, seed=5, temperature=0)
    assert answer.choices[0].message.content == "It is sunny."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.model_extra is not None
    assert answer.model_extra["easel"]["seed"] == 5


def test_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "It is sunny."
    assert chunks[-1].usage is not None
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["easel"]["canvases"] == 2


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("include_usage", [False, True])
def test_the_stream_helper(client: openai.OpenAI, n: int, include_usage: bool) -> None:
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, n=n, stream_options={"include_usage": include_usage}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.delta") == 3 * n  # the role chunk's empty content, then two canvases
    assert [choice.message.content for choice in final.choices] == ["It is sunny."] * n
    assert [choice.message.role for choice in final.choices] == ["assistant"] * n
    assert (final.usage is not None) == include_usage


def test_a_tool_round(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="demo", messages=MESSAGES, tools=[WEATHER], reasoning_effort="low")
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "hm"
    (call,) = message.tool_calls or []
    assert call.type == "function"
    assert call.function.arguments == '{"city": "Paris"}'
    history = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = client.chat.completions.create(model="demo", messages=history, tools=[WEATHER])
    assert second.choices[0].message.content == "It is sunny."


def test_a_tool_call_through_the_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=MESSAGES, tools=[WEATHER]) as stream:
        final = stream.until_done().get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    assert final.choices[0].finish_reason == "tool_calls"


def test_the_async_client(address: str) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=address, api_key="k", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="demo", messages=MESSAGES) for _ in range(4))
            )
            assert {answer.choices[0].message.content for answer in answers} == {"It is sunny."}
            stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == "It is sunny."
            async with client.chat.completions.stream(model="demo", messages=MESSAGES) as helper:
                final = await helper.get_final_completion()
            assert final.choices[0].message.content == "It is sunny."

    asyncio.run(run())


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "easel"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_clients_own(client: openai.OpenAI, address: str) -> None:
    create: Callable[..., Any] = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="demo", messages=MESSAGES, functions=[{"name": "f"}])
    assert (caught.value.param, caught.value.code) == ("functions", "unsupported_value")
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="demo", messages=[{"role": "user", "content": "x" * 1000}])
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 500 tokens. However, you requested" in str(caught.value)
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError, match="it failed"):
        create(model="demo", messages=[{"role": "user", "content": "fail"}])
    with pytest.raises(openai.APIError, match="it failed"):
        list(create(model="demo", messages=[{"role": "user", "content": "fail"}], stream=True))
    with openai.OpenAI(base_url=address, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
