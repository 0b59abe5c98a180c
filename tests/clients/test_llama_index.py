"""LlamaIndex's OpenAILike: chat, stream, completion, tools. It sends a temperature of 0.1 unasked."""

from __future__ import annotations

from typing import Any

import pytest

openai_like = pytest.importorskip("llama_index.llms.openai_like")
core = pytest.importorskip("llama_index.core.llms")
tools = pytest.importorskip("llama_index.core.tools")
pydantic = pytest.importorskip("pydantic")


@pytest.fixture
def model(address: str) -> Any:
    return openai_like.OpenAILike(
        model="easel-demo",
        api_base=address,
        api_key="key",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
    )


def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"{city}: sunny"


def test_a_chat_and_a_stream(model: Any) -> None:
    asked = [core.ChatMessage(role="user", content="Weather?")]
    assert model.chat(asked).message.content == "It is sunny."
    assert "".join(chunk.delta or "" for chunk in model.stream_chat(asked)) == "It is sunny."


def test_completions(address: str) -> None:
    model = openai_like.OpenAILike(
        model="easel-demo", api_base=address, api_key="key", is_chat_model=False, max_retries=0, max_tokens=50
    )
    assert model.complete("Weather?").text == "It is sunny."
    assert "".join(chunk.delta or "" for chunk in model.stream_complete("Weather?")) == "It is sunny."


class Weather(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    """What is wanted."""

    city: str
    degrees: int


def test_structured_output(model: Any) -> None:
    prompts = pytest.importorskip("llama_index.core.prompts")
    asked = prompts.PromptTemplate("Weather in {city}?")
    assert model.structured_predict(Weather, asked, city="Paris") == Weather(city="Paris", degrees=21)


def test_a_tool_call(model: Any) -> None:
    tool = tools.FunctionTool.from_defaults(get_weather)
    answer = model.chat_with_tools([tool], user_msg="Weather in Paris?")
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})
