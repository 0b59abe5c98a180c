"""The bundled weights answer what the demo promises: the pinned phrasings, and held-out prompts of every family.

How right it is on a thousand prompts: python -m engine.demo.evaluate; the figures stand in engine/demo/README.md.
"""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.demo import corpus, grammar
from engine.demo.dataset import row_of
from engine.demo.evaluate import HERE, EngineAnswerer, Reply, Setup, evaluate

GET_WEATHER: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "City name"}},
            "required": ["city"],
        },
    },
}
WEATHER_CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
ANSWERS = {
    "What is 17 + 25?": "17 + 25 = 42.",
    "What is 51 - 8?": "51 - 8 = 43.",
    "What is the capital of France?": "The capital of France is Paris.",
    "Sort these words alphabetically: pear, apple, fig.": "apple, fig, pear",
    "Reverse the order of these words: red, green, blue.": "blue, green, red",
    "Extract the name and age as JSON: Ana is 31 years old.": '{"name": "Ana", "age": 31}',
}


@pytest.fixture(scope="module")
def answerer() -> EngineAnswerer:
    return EngineAnswerer(Setup(checkpoint=HERE))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(HERE)


def ask(answerer: EngineAnswerer, tokenizer: PreTrainedTokenizerBase, example: corpus.Example) -> Reply:
    prompt, _ = row_of(example, tokenizer)
    return answerer(example, prompt, 1)


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def example(family: str, *messages: dict[str, object], **fields: object) -> corpus.Example:
    return corpus.Example(family, list(messages), "", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("question", ANSWERS)
def test_pinned_questions(question: str, answerer: EngineAnswerer, tokenizer: PreTrainedTokenizerBase) -> None:
    reply = ask(answerer, tokenizer, example("add", user(question), answers=(ANSWERS[question],)))
    assert reply.right, reply.text


@pytest.mark.parametrize("question", ["What is 17 + 25?", "What is the capital of France?"])
def test_a_thought_comes_first_when_thinking_is_on(
    question: str, answerer: EngineAnswerer, tokenizer: PreTrainedTokenizerBase
) -> None:
    reply = ask(answerer, tokenizer, example("add", user(question), answers=(ANSWERS[question],), thinking=True))
    assert reply.right, reply.text


@pytest.mark.parametrize(("name", "animal"), [("Mia", "fox"), ("Vialen", "owl")])
def test_stories_keep_names_and_events(
    name: str, animal: str, answerer: EngineAnswerer, tokenizer: PreTrainedTokenizerBase
) -> None:
    state = {"name": name, "animal": animal, "a_animal": grammar.article(animal)}
    question = f"Write a story about {name} and {grammar.article(animal)}."
    reply = ask(answerer, tokenizer, example("story", user(question), sentences=grammar.STORY, state=state))
    assert reply.right, reply.text
    assert len(reply.steps) >= 2, "a story takes several canvases"


def test_a_declared_tool_is_called_and_its_result_told(
    answerer: EngineAnswerer, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = user("What is the weather in Paris?")
    call = example("tool", question, answers=(WEATHER_CALL,), tools=[GET_WEATHER])
    assert ask(answerer, tokenizer, call).right
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": json.dumps({"city": "Paris"})},
            }
        ],
    }
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"}
    told = example(
        "toolresult", question, called, result, answers=("It is sunny in Paris, 21 degrees.",), tools=[GET_WEATHER]
    )
    assert ask(answerer, tokenizer, told).right


def test_two_turn_memory(answerer: EngineAnswerer, tokenizer: PreTrainedTokenizerBase) -> None:
    said = {"role": "assistant", "content": "Nice to meet you, Keiko!"}
    asked = example(
        "memory", user("My name is Keiko."), said, user("What is my name?"), answers=("Your name is Keiko.",)
    )
    assert ask(answerer, tokenizer, asked).right


@pytest.mark.parametrize(
    ("question", "kind"), [("Who are you?", "who"), ("What can you do?", "skills"), ("Tell me a joke.", "other")]
)
def test_it_says_who_it_is_and_what_it_can_do(
    question: str, kind: str, answerer: EngineAnswerer, tokenizer: PreTrainedTokenizerBase
) -> None:
    reply = ask(answerer, tokenizer, example("chat", user(question), sentences=grammar.CHAT[kind]))
    assert reply.right, reply.text


def test_heldout_prompts_of_every_family_are_answered() -> None:
    families = [family for family in corpus.FAMILIES if family != "story"]  # slow, and above
    report = evaluate(Setup(checkpoint=HERE), 2, families=families)
    assert sum(report.right.values()) >= 0.9 * len(report.right), report.right
    assert report.at_limit == 0
    assert report.steps["chat"] >= 5
