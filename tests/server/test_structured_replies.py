"""Structured output and forced calls from end to end: official client, HTTP, the demo model; and an untrained one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from engine import EngineOptions, build_engine
from engine.demo import corpus
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.config import DEMO_CHECKPOINT
from server.prompt import PromptRenderer
from tests.fakes import Template, byte_tokenizer
from tests.scripted_engine import babble, scripted_engine

ASK: Any = [{"role": "user", "content": "Extract the name and age as JSON: Mia is 31 years old."}]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
SCHEMA |= {"required": ["name", "age"], "additionalProperties": False}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    name: str
    age: int


class Town(BaseModel):
    name: str = Field(max_length=12)
    river: Literal["Tiber", "Seine"] | None


class Report(BaseModel):
    towns: list[Town] = Field(min_length=6, max_length=7)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def address(listening: Any) -> Iterator[str]:
    engine = build_engine(EngineOptions(model=str(DEMO_CHECKPOINT), device="cpu", progress=False))
    with Bridge(engine) as bridge:
        service = ChatService(bridge, PromptRenderer.from_folder(DEMO_CHECKPOINT), ["demo"])
        with listening(create_app(service, AppSettings())) as url:
            yield url


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0) as client:
        yield client


def test_pydantic_models_are_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="demo", messages=ASK, response_format=Person, seed=1)
    assert answer.choices[0].message.parsed == Person(name="Mia", age=31)
    again = client.responses.parse(model="demo", input=ASK, text_format=Person)
    assert again.output_parsed == Person(name="Mia", age=31)
    assert again.text is not None
    assert again.text.format is not None
    assert again.text.format.type == "json_schema"
    with client.chat.completions.stream(model="demo", messages=ASK, response_format=Person) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Mia", age=31)


def test_a_reply_goes_over_several_canvases_and_comes_as_they_are_done(client: openai.OpenAI) -> None:
    """The model knows nothing of rivers; what it says is a report all the same, whatever the seed and temperature."""
    for seed, temperature in ((1, 0.0), (2, 1.5)):
        with client.chat.completions.stream(
            model="demo", messages=ASK, response_format=Report, seed=seed, temperature=temperature
        ) as stream:
            pieces = [event.delta for event in stream if event.type == "content.delta" and event.delta]
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "stop"
        assert len(pieces) > 1
        assert isinstance(final.message.parsed, Report)


def test_a_cut_reply_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="demo", messages=ASK, response_format=Person, max_tokens=9)


def test_the_thought_comes_first(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=ASK, response_format=Person, reasoning_effort="low", seed=1
    )
    message = answer.choices[0].message
    assert message.parsed == Person(name="Mia", age=31)
    assert (message.model_extra or {})["reasoning_content"] == "The keys are name and age."


def test_most_json_takes_no_more_steps_than_without_a_constraint(client: openai.OpenAI) -> None:
    """Twelve held-out prompts; what is asked for is what the model says anyway."""
    more = 0
    for index in range(12):
        prompt = corpus.example("test", index, 5, "json")
        (wanted,) = prompt.answers
        kinds = {
            key: {"type": "integer" if isinstance(value, int) else "string"}
            for key, value in json.loads(wanted).items()
        }
        schema = {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}
        asked: Any = {"model": "demo", "messages": prompt.messages, "seed": index}
        free = client.chat.completions.create(**asked)
        held = client.chat.completions.create(**asked, extra_body={"guided_json": schema})
        jsonschema.validate(json.loads(held.choices[0].message.content or ""), schema)
        more += (held.model_extra or {})["easel"]["steps"] > (free.model_extra or {})["easel"]["steps"]
    assert more <= 3


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["red", "green"]}, r"red|green"),
        ({"structured_outputs": {"regex": r"[A-Z]{3}-\d{4}"}}, r"[A-Z]{3}-\d{4}"),
        ({"guided_grammar": 'start: A ("+" A)~1..3\nA: /[0-9]{1,2}/'}, r"\d{1,2}(\+\d{1,2}){1,3}"),
        ({"grammar": 'root ::= ("ab" | "cd")+ "."'}, r"(ab|cd)+\."),
    ],
)
def test_other_forms(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    answer = client.chat.completions.create(model="demo", messages=ASK, extra_body=fields, max_tokens=300)
    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(pattern, answer.choices[0].message.content or "")
    text = client.completions.create(model="demo", prompt="Hi", extra_body=fields, max_tokens=300)
    assert re.fullmatch(pattern, text.choices[0].text)


def test_a_single_choice_takes_no_step(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=ASK, extra_body={"guided_choice": ["Only this."]})
    assert answer.choices[0].message.content == "Only this."
    assert (answer.model_extra or {})["easel"]["steps"] == 0


@pytest.mark.parametrize("question", ["What is the weather in Rome?", "What is 3 + 4?"])
@pytest.mark.parametrize("named", [False, True])
def test_a_call_that_must_be(client: openai.OpenAI, question: str, named: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}} if named else "required"
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": question}],
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        seed=3,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    assert answer.choices[0].finish_reason == ("stop" if named else "tool_calls")
    assert answer.choices[0].message.content is None


def test_a_strict_tool_and_free_choice(client: openai.OpenAI) -> None:
    strict: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What is the weather in Rome?"}], tools=[strict]
    )
    for call in answer.choices[0].message.tool_calls or []:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    plain = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What is 17 + 25?"}], tools=[strict]
    )
    assert plain.choices[0].finish_reason in ("stop", "tool_calls")


def test_pydantic_tools_are_parsed(client: openai.OpenAI) -> None:
    """With a tool the model knows: one it does not may leave it in a string until its tokens are used up."""
    answer = client.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[openai.pydantic_function_tool(Weather, name="get_weather")],
        tool_choice="required",
        max_tokens=300,
        seed=1,
    )
    calls = answer.choices[0].message.tool_calls or []
    assert [call.function.parsed_arguments for call in calls] == [Weather(city="Paris")]


class Weather(BaseModel):
    city: str


def test_the_form_in_messages(address: str) -> None:
    body = {"model": "demo", "max_tokens": 100, "messages": ASK, "temperature": 0}
    asked = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = httpx.post(f"{address}/v1/messages", timeout=60, json={**body, "output_config": asked}).json()
    assert json.loads(answer["content"][0]["text"]) == {"name": "Mia", "age": 31}
    question = [{"role": "user", "content": "What is the weather in Rome?"}]
    tool = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    asked = {"messages": question, "tools": [tool], "tool_choice": {"type": "tool", "name": "get_weather"}}
    answer = httpx.post(f"{address}/v1/messages", timeout=60, json={**body, **asked}).json()
    assert answer["stop_reason"] == "tool_use"
    jsonschema.validate(answer["content"][0]["input"], tool["input_schema"])


def test_an_unsupported_keyword_is_named(client: openai.OpenAI, address: str) -> None:
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        client.chat.completions.create(
            model="demo",
            messages=ASK,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
    assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_value")
    body = {"model": "demo", "prompt": "a", "suffix": "b", "guided_regex": "c"}
    answer = httpx.post(f"{address}/v1/completions", timeout=60, json=body).json()
    assert (answer["error"]["param"], answer["error"]["code"]) == ("guided_regex", "unsupported_value")


def test_an_untrained_model_keeps_to_it_too(listening: Any) -> None:
    """Random logits, other ones at every pass, in all four formats."""
    small = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    }
    small |= {"required": ["a", "b"], "additionalProperties": False}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": small}}
    engine = scripted_engine(babble(512), canvas_length=32, vocab_size=512, eos_ids=(1, 106), context=1024)
    with Bridge(engine) as bridge:
        service = ChatService(bridge, PromptRenderer(byte_tokenizer(), Template()), ["demo"])
        with (
            listening(create_app(service, AppSettings())) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
        ):
            for seed in range(3):
                answer = client.chat.completions.create(
                    model="demo", messages=ASK, seed=seed, extra_body={"guided_json": small}
                )
                jsonschema.validate(json.loads(answer.choices[0].message.content or ""), small)
                text = client.completions.create(
                    model="demo", prompt="Hi", seed=seed, max_tokens=200, extra_body={"json_schema": small}
                )
                jsonschema.validate(json.loads(text.choices[0].text), small)
                answer = client.chat.completions.create(
                    model="demo",
                    messages=ASK,
                    seed=seed,
                    tools=[tool],
                    tool_choice="required",
                    parallel_tool_calls=False,
                )
                (call,) = answer.choices[0].message.tool_calls or []
                assert call.type == "function"
                jsonschema.validate(json.loads(call.function.arguments), small)
