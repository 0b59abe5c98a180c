"""Pydantic AI: an agent with a tool, run and streamed, over chat and over responses, and its view of errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pydantic_ai = pytest.importorskip("pydantic_ai")
pydantic = pytest.importorskip("pydantic")
openai_models = pytest.importorskip("pydantic_ai.models.openai")
providers = pytest.importorskip("pydantic_ai.providers.openai")


def get_weather(city: str, days: int | None = None) -> str:
    """Weather of a city."""
    return f"{city}: sunny"


@pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel"])
def agent(request: pytest.FixtureRequest, address: str) -> Any:
    model = getattr(openai_models, request.param)(
        "easel-demo", provider=providers.OpenAIProvider(base_url=address, api_key="key")
    )
    return pydantic_ai.Agent(model, instructions="Be kind.", tools=[pydantic_ai.Tool(get_weather, strict=False)])


def test_a_tool_loop_to_the_end(agent: Any) -> None:
    result = agent.run_sync("Weather in Paris?")
    assert result.output == "It is sunny."
    (call,) = [
        part
        for message in result.all_messages()
        for part in message.parts
        if isinstance(part, pydantic_ai.messages.ToolCallPart)
    ]
    assert call.args_as_dict() == {"city": "Paris"}


class Weather(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    """What is wanted."""

    city: str
    degrees: int


@pytest.mark.parametrize("output", ["ToolOutput", "NativeOutput"])
def test_a_typed_result(agent: Any, output: str) -> None:
    typed = pydantic_ai.Agent(agent.model, output_type=getattr(pydantic_ai, output)(Weather))
    asked = "Weather in Paris, in this form?" if output == "NativeOutput" else "Weather in Paris?"
    assert typed.run_sync(asked).output == Weather(city="Paris", degrees=21)


def test_a_stream(agent: Any) -> None:
    async def run() -> list[str]:
        async with agent.run_stream("think") as stream:
            return [text async for text in stream.stream_text(delta=True, debounce_by=None)]

    assert asyncio.run(run()) == ["It is ", "sunny."]  # one piece per canvas


def test_a_thought(agent: Any) -> None:
    parts = agent.run_sync("think").all_messages()[-1].parts
    assert [type(part).__name__ for part in parts] == ["ThinkingPart", "TextPart"]
    assert parts[1].content == "It is sunny."


def test_errors(agent: Any) -> None:
    with pytest.raises(pydantic_ai.exceptions.ModelHTTPError, match="maximum context length") as caught:
        agent.run_sync("x" * 30_000)
    assert caught.value.status_code == 400
