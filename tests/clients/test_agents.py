"""OpenAI's agents SDK: an agent with a tool, run and streamed, over responses and over chat."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

agents = pytest.importorskip("agents")
openai = pytest.importorskip("openai")


@pytest.fixture(params=["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
def agent(request: pytest.FixtureRequest, address: str) -> Any:
    client = openai.AsyncOpenAI(base_url=address, api_key="key", max_retries=0)
    model = getattr(agents, request.param)(model="easel-demo", openai_client=client)

    @agents.function_tool(strict_mode=False)
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"{city}: sunny"

    return agents.Agent(name="Bot", instructions="Be kind.", model=model, tools=[get_weather])


def test_a_tool_loop_to_the_end(agent: Any) -> None:
    result = asyncio.run(agents.Runner.run(agent, "Weather in Paris?"))
    assert result.final_output == "It is sunny."
    assert any(item.type == "tool_call_output_item" and item.output == "Paris: sunny" for item in result.new_items)


def test_a_streamed_tool_loop(agent: Any) -> None:
    async def run() -> Any:
        result = agents.Runner.run_streamed(agent, "Weather in Paris?")
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(run()) == "It is sunny."
