"""LangChain's ChatOpenAI: chat, stream, thoughts, a tool loop, the error it looks for when a prompt is too long."""

from __future__ import annotations

from typing import Any

import pytest

langchain_openai = pytest.importorskip("langchain_openai")
messages = pytest.importorskip("langchain_core.messages")
tools = pytest.importorskip("langchain_core.tools")
pydantic = pytest.importorskip("pydantic")


@pytest.fixture
def model(address: str) -> Any:
    return langchain_openai.ChatOpenAI(model="easel-demo", base_url=address, api_key="key", max_retries=0)


def get_weather(city: str, days: int | None = None) -> str:
    """Weather of a city."""
    return f"{city}: sunny"


def test_a_chat_and_a_stream(model: Any) -> None:
    answer = model.invoke("Weather?")
    assert answer.content == "It is sunny."
    assert answer.usage_metadata["output_tokens"] > 5
    assert answer.response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.content for chunk in model.stream("Weather?")) == "It is sunny."


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_loop_to_the_end(model: Any, streamed: bool) -> None:
    bound = model.bind_tools([tools.tool(get_weather)])
    history: list[Any] = [messages.HumanMessage("Weather in Paris?")]
    if streamed:
        answer = None
        for chunk in bound.stream(history):
            answer = chunk if answer is None else answer + chunk
    else:
        answer = bound.invoke(history)
    assert answer is not None
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    history += [answer, messages.ToolMessage("sunny", tool_call_id=call["id"])]
    assert bound.invoke(history).content == "It is sunny."


class Weather(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    """What is wanted."""

    city: str
    degrees: int


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(model: Any, method: str) -> None:
    answer = model.with_structured_output(Weather, method=method).invoke("Weather in Paris, in JSON?")
    assert answer == Weather(city="Paris", degrees=21)


def test_logprobs(model: Any) -> None:
    answer = model.bind(logprobs=True, top_logprobs=1).invoke("Weather?")
    tokens = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == "It is sunny."


def test_responses(address: str) -> None:
    model = langchain_openai.ChatOpenAI(
        model="easel-demo", base_url=address, api_key="key", max_retries=0, use_responses_api=True
    )
    answer = model.invoke("Weather?")
    assert "It is sunny." in str(answer.content)
    assert "It is sunny." in "".join(str(chunk.text) for chunk in model.stream("Weather?"))


def test_a_prompt_that_is_too_long_is_recognised(model: Any) -> None:
    exceptions = pytest.importorskip("langchain_core.exceptions")
    with pytest.raises(exceptions.ContextOverflowError):
        model.invoke("x" * 30_000)
