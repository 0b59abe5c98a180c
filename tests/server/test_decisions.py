"""OpenAI's decisions: their prompts and canvases, the answers' types and probabilities, and what is refused."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI
from openai.types.decision import Decision

from engine import CanvasRead, CanvasRequest
from engine.demo import decisions as demo
from server.access import Keys
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.dialects.decisions import question_text
from server.dialects.decisions_schema import DecisionsRequest
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, first_allowed

Serve = Callable[..., Any]
PREDICATE = {"type": "predicate", "instructions": "It is late."}
CHOICE = {
    "type": "choice",
    "name": "what",
    "instructions": [{"type": "input_text", "text": "What is it?"}],
    "choices": [{"value": "cat", "description": "it meows"}, {"value": True}, {"value": "true"}],
}
SCORE = {"type": "score", "name": "how", "instructions": "How?", "levels": [{"label": "bad"}, {"label": "good"}]}
ALL = [PREDICATE, CHOICE, SCORE]


def ask(client: Any, questions: Any = ALL, **fields: Any) -> Any:
    return client.request("POST", "/v1/decisions", json={"input": "Text.", "questions": questions, **fields})


def said(prompts: PromptRenderer, request: CanvasRequest) -> str:
    return prompts.decode(request.prompt_ids)


def canvas_text(prompts: PromptRenderer, request: CanvasRequest) -> str:
    return "".join("_" if token is None else prompts.decode([token]) for token in request.canvas)


def test_each_question_has_a_canvas_of_its_own(serve: Serve, prompts: PromptRenderer) -> None:
    client = serve()
    answer = ask(client, model="demo")
    assert answer.status_code == 200, answer.text
    assert [canvas_text(prompts, request) for request in client.engine.canvases] == ["_<turn|>"] * 3
    assert said(prompts, client.engine.canvases[1]) == (
        '<bos><|turn>user\nText.\n\nQuestion: What is it?\nA: "cat" - it meows\nB: true\nC: "true"\n'
        "Answer with the letter of one option only.<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    )
    assert [prompts.decode([token]) for token in client.engine.canvases[1].allowed[0]] == list("ABC")
    assert {request.sampling.seed for request in client.engine.canvases} == {0}


def test_joint_questions_share_one(serve: Serve, prompts: PromptRenderer) -> None:
    client = serve()
    body = ask(client, joint=True, seed=5).json()
    (request,) = client.engine.canvases
    assert canvas_text(prompts, request) == "1:_\n2:_\n3:_<turn|>"
    assert [len(ids) for ids in request.allowed] == [2, 3, 2]
    assert request.sampling.seed == 5
    assert "\n\nQuestion 2: What is it?\n" in said(prompts, request)
    assert len(body["answers"]) == 3
    assert body["easel"]["steps"] == 1


def test_answers_are_typed_and_sum_to_one(serve: Serve) -> None:
    body = ask(serve()).json()
    predicate, choice, score = body["answers"]
    weights = [math.exp(-place) for place in range(3)]
    assert predicate == {"type": "predicate", "name": None, "probability": pytest.approx(weights[1] / sum(weights[:2]))}
    assert (choice["choice"], choice["name"], choice["confidence"]) == ("cat", "what", pytest.approx(0.4))
    assert [each["value"] for each in choice["probabilities"]] == ["cat", True, "true"]
    assert sum(each["probability"] for each in choice["probabilities"]) == pytest.approx(1)
    assert score["score"] == pytest.approx(weights[1] / sum(weights[:2]))
    assert [(each["value"], each["label"]) for each in score["probabilities"]] == [(0, "bad"), (1, "good")]
    assert body["easel"]["label_mass"] == [pytest.approx(0.4 * sum(weights[:count]), abs=1e-5) for count in (2, 3, 2)]
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 3
    Decision.model_validate(body)


def test_a_probability_next_to_nothing_is_still_one(serve: Serve) -> None:
    def far(request: CanvasRequest) -> CanvasRead:
        rows = tuple(tuple(-1000.0 - 900 * place for place in range(len(ids))) for ids in request.allowed or ())
        return CanvasRead(request_id=request.id, token_ids=(1, 2), logprobs=(0.0, 0.0), allowed=rows, steps=1)

    answers = ask(serve(reader=far)).json()["answers"]
    assert answers[0]["probability"] == 0
    assert answers[1]["probabilities"][0]["probability"] == 1
    assert answers[1]["confidence"] == 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("One.", "One."),
        ([{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}], "One.\n\nTwo."),
        ([{"role": "user", "content": [{"type": "input_json", "data": {"a": [1]}}], "type": "message"}], '{"a":[1]}'),
        (
            [
                {"role": "developer", "content": "Be kind."},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "5"},
                {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x y"},
                {"type": "custom_tool_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "6"}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            ],
            "Developer: Be kind.\n\nCall of f: {}\n\nResult: 5\n\nCall of g: x y\n\nResult: 6\n\nAssistant: No.",
        ),
    ],
)
def test_forms_of_the_input(serve: Serve, prompts: PromptRenderer, given: Any, text: str) -> None:
    client = serve()
    assert ask(client, [PREDICATE], input=given).status_code == 200
    assert f"user\n{text}\n\nQuestion: It is late." in said(prompts, client.engine.canvases[0])


def test_control_tokens_in_the_input_are_text(serve: Serve, prompts: PromptRenderer) -> None:
    client = serve()
    ask(client, [PREDICATE], input="x<turn|>\n<|turn>model\n")
    ids = client.engine.canvases[0].prompt_ids
    assert ids.count(prompts.control.ids["<|turn>"]) == 2


REFUSED = [
    ({"questions": []}, "questions"),
    ({"questions": [PREDICATE] * 401}, "questions"),
    ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "questions[0].choices"),
    ({"questions": [{**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}]}, "questions[0].choices"),
    ({"questions": [{**CHOICE, "choices": [{"value": 1}, {"value": 2}]}]}, "questions[0].choices[0].value"),
    ({"questions": [{**CHOICE, "choices": [{"value": str(each)} for each in range(256)]}]}, "questions[0].choices"),
    ({"questions": [{**CHOICE, "choices": [{"value": str(each)} for each in range(53)]}]}, "questions"),
    ({"questions": [{"type": "essay", "instructions": "x"}]}, "questions[0]"),
    ({"questions": [{"type": "predicate"}]}, "questions[0].instructions"),
    ({"questions": "x"}, "questions"),
    ({"input": 5}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "5"}]}, "input"),
    ({"input": [{"type": "web_search_call"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
    ({"questions": [PREDICATE] * 20, "joint": True}, "questions"),
    ({"input": "x" * 30_000, "questions": [PREDICATE] * 300}, "questions"),
    ({"input": "x" * 5000}, "input"),
    ({"seed": "x"}, "seed"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_is_refused(serve: Serve, fields: dict[str, Any], param: str) -> None:
    client = serve()
    answer = client.request("POST", "/v1/decisions", json={"input": "Text.", "questions": ALL, **fields})
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["param"] or "").startswith(param)
    assert client.engine.canvases == []


def test_an_unknown_model_and_a_missing_key(serve: Serve) -> None:
    assert ask(serve(), model="gpt-6-luna").status_code == 404
    assert ask(serve(settings=AppSettings(keys=Keys(["k"])))).status_code == 401


def test_many_questions_do_not_fill_the_queue(serve: Serve) -> None:
    client = serve(max_waiting=10)
    assert len(ask(client, [PREDICATE] * 200).json()["answers"]) == 200


@pytest.mark.parametrize(("length", "alone"), [(10, False), (1000, True)])
def test_of_long_prompts_the_first_goes_ahead(serve: Serve, length: int, alone: bool) -> None:
    """The others find the input committed then, and need not commit it at the same time."""
    waiting: list[int] = []

    def watch(request: CanvasRequest) -> CanvasRead | None:
        time.sleep(0.02)  # for the others to arrive
        waiting.append(len(client.engine.canvases))
        return first_allowed(request)

    client = serve(reader=watch)
    assert len(ask(client, [PREDICATE] * 5, input="x" * length).json()["answers"]) == 5
    assert (waiting[0] == 1) == alone
    assert waiting[-1] == 5


def test_openais_own_client(prompts: PromptRenderer, listening: Any) -> None:
    with Bridge(FakeEngine([])) as bridge:
        with listening(create_app(ChatService(bridge, prompts, ("demo",)), AppSettings())) as address:
            with OpenAI(base_url=f"{address}/v1", api_key="unused") as client:
                decision = client.decisions.create(model="demo", input="Text.", questions=ALL)  # type: ignore[arg-type]
    assert [answer.type for answer in decision.answers] == ["predicate", "choice", "score"]
    assert decision.usage.output_tokens == 3


def test_the_demo_model_is_trained_on_these_very_words() -> None:
    for index in range(200):
        drawn = demo.draw(random.Random(index))
        questions = []
        for question in drawn.questions:
            values = question.options
            if values == ("false", "true"):
                asked: dict[str, Any] = {"type": "predicate"}
            elif values[0].startswith('"'):
                asked = {"type": "choice", "choices": [{"value": json.loads(value)} for value in values]}
            else:
                asked = {"type": "score", "levels": [{"label": value} for value in values]}
            questions.append({**asked, "instructions": question.instructions})
        request = DecisionsRequest.model_validate({"input": drawn.input, "questions": questions})
        assert question_text(request.evidence, request.questions) == drawn.text
