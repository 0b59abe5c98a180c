"""OpenAI's agents SDK: an agent with a tool, run and streamed, over responses and over chat."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

agents = pytest.importorskip("agents")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")


@pytest.fixture(
    params=[(model, strict) for model in ("OpenAIResponsesModel", "OpenAIChatCompletionsModel") for strict in (0, 1)]
)
def agent(request: pytest.FixtureRequest, address: str) -> Any:
    client = openai.AsyncOpenAI(base_url=address, api_key="key", max_retries=0)
    name, strict = request.param
    model = getattr(agents, name)(model="easel-demo", openai_client=client)

    @agents.function_tool(strict_mode=bool(strict))
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"{city}: sunny"

    return agents.Agent(name="Bot", instructions="Be kind.", model=model, tools=[get_weather])


def test_a_tool_loop_to_the_end(agent: Any) -> None:
    result = asyncio.run(agents.Runner.run(agent, "Weather in Paris?"))
    assert result.final_output == "It is sunny."
    assert any(item.type == "tool_call_output_item" and item.output == "Paris: sunny" for item in result.new_items)


class Weather(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    """What is wanted."""

    city: str
    degrees: int


def test_a_typed_result(agent: Any) -> None:
    typed = agents.Agent(name="Bot", model=agent.model, output_type=Weather)
    result = asyncio.run(agents.Runner.run(typed, "Weather in Paris, in this form?"))
    assert result.final_output == Weather(city="Paris", degrees=21)


def test_a_streamed_tool_loop(agent: Any) -> None:
    async def run() -> Any:
        result = agents.Runner.run_streamed(agent, "Weather in Paris?")
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(run()) == "It is sunny."
