"""server.structure and the grammars behind it: whatever follows them is valid, what they cannot promise is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import CanvasDone, Finished, GenerationRequest, Sampling
from server.errors import ApiError
from server.exchange import ChatTask, Structure
from server.output_parser import OutputParser, Parsed
from server.prompt import OpensIn, PromptRenderer
from server.structure import Structures
from tests.fakes import Template, byte_tokenizer
from tests.grammar_walk import walk
from tests.scripted_engine import babble, scripted_engine

PROMPTS = PromptRenderer(byte_tokenizer(), Template())
STRUCTURES = Structures(PROMPTS, vocab_size=512, eos_ids={1, 106, 50})
CLOSERS = {PROMPTS.control.ids[name] for name in ('<|"|>', "<tool_call|>", "<channel|>")} | set(PROMPTS.encode('"}],'))
FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def replies(
    task: ChatTask, *, count: int = 4, opens_in: OpensIn = "content", seed: int = 0, closers: set[int] = CLOSERS
) -> list[list[int]]:
    """Ids of some random replies that ended."""
    found = []
    for attempt in range(count):
        constraint = STRUCTURES.constraint(task, opens_in)
        assert constraint is not None
        ids = walk(constraint, random.Random(seed * 1000 + attempt), closers=closers)
        if ids is not None:
            found.append(ids)
    return found


def read(task: ChatTask, ids: list[int], opens_in: OpensIn = "content") -> Parsed:
    """A reply as a client would get it."""
    tools = {tool["function"]["name"]: {} for tool in task.tools} if task.tools else None
    parser, detokenizer = OutputParser(opens_in, tools=tools, exact=True), PROMPTS.detokenizer()
    for token_id in ids:
        parser.push(detokenizer.push(token_id))
    parser.push(detokenizer.finish())
    return parser.finish()


def json_task(schema: Any) -> ChatTask:
    return ChatTask(messages=(), structure=Structure("json", schema, "response_format"))


def tool_task(schema: Any, **fields: Any) -> ChatTask:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return ChatTask(messages=(), tools=(tool,), must_call=True, **fields)


def refusal(task: ChatTask) -> ApiError:
    with pytest.raises(ApiError) as caught:
        STRUCTURES.constraint(task, "content")
    assert caught.value.status == 400
    return caught.value


NAMES = st.sampled_from(["a", "b", "Zed", "two words", "naïve", "x-y", "5"])
FORMATS = "date time date-time uuid ipv4 ipv6 email hostname uri duration made-up".split()
PATTERNS = ["^[a-c]+$", "x", "^y", "z$", r"^\d{2}-\w$", "^(left|right)$", r'^"\\/$']
CONSTANTS = st.one_of(st.text(max_size=4), st.integers(-9, 99), st.none(), st.booleans(), st.just(1.5))
SIMPLE = st.one_of(
    st.sampled_from(["null", "boolean", "integer", "number", "string"]).map(lambda kind: {"type": kind}),
    st.just({}),
    st.tuples(st.integers(-50, 50), st.integers(0, 90)).map(
        lambda limits: {"type": "integer", "minimum": limits[0], "maximum": sum(limits)}
    ),
    st.integers(-9, 9).map(lambda low: {"type": "number", "exclusiveMinimum": low}),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda limits: {"type": "string", "minLength": limits[0], "maxLength": sum(limits)}
    ),
    st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name}),
    st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.lists(CONSTANTS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    CONSTANTS.map(lambda value: {"const": value}),
    st.sampled_from([["string", "null"], ["integer", "boolean"], ["number", "string"]]).map(
        lambda each: {"type": each}
    ),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], needed: list[bool], more: Any) -> dict[str, Any]:
        required = [name for name, is_needed in zip(properties, needed, strict=False) if is_needed]
        schema = {"type": "object", "properties": properties, "required": required}
        return schema if more is None else {**schema, "additionalProperties": more}

    return st.builds(
        build,
        st.dictionaries(NAMES, inner, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
        st.sampled_from([None, False, True, {"type": "integer"}]),
    )


def _lists(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(items: Any, least: int, more: int | None) -> dict[str, Any]:
        schema = {"type": "array", "items": items, "minItems": least}
        return schema if more is None else {**schema, "maxItems": least + more}

    return st.builds(build, inner, st.integers(0, 2), st.one_of(st.none(), st.integers(0, 2)))


def _combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        _objects(inner),
        _lists(inner),
        few.map(lambda branches: {"anyOf": branches}),
        few.map(lambda first: {"type": "array", "prefixItems": first, "items": False}),
    )


SCHEMAS = st.recursive(SIMPLE, _combined, max_leaves=6)


@FEW
@given(SCHEMAS, st.integers(0, 10**6))
def test_any_json_that_follows_the_grammar_is_valid(schema: Any, seed: int) -> None:
    for ids in replies(json_task(schema), count=2, seed=seed):
        jsonschema.validate(json.loads(read(json_task(schema), ids).content), schema)


@FEW
@given(_objects(SCHEMAS), st.integers(0, 10**6))
def test_any_call_that_follows_the_grammar_is_read_back_and_valid(schema: Any, seed: int) -> None:
    task = tool_task(schema, parallel_tool_calls=False)
    for ids in replies(task, count=2, seed=seed):
        parsed = read(task, ids)
        assert (parsed.content, len(parsed.calls), parsed.calls[0].name) == ("", 1, "f")
        jsonschema.validate(json.loads(parsed.calls[0].arguments), schema)


@settings(FEW, max_examples=25)
@given(_objects(SCHEMAS), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 2.0]))
def test_an_untrained_model_says_nothing_else(schema: Any, seed: int, temperature: float) -> None:
    """The same through the engine: canvas after canvas of random logits, which like to close what is open."""
    engine = scripted_engine(
        babble(512, liking=dict.fromkeys(CLOSERS, 9.0)), canvas_length=16, vocab_size=512, eos_ids=(1, 106), steps=5
    )
    for task in (json_task(schema), tool_task(schema, parallel_tool_calls=False)):
        sampling = Sampling(seed=seed, temperature=temperature)
        request = GenerationRequest(id="a", prompt_ids=(2,), max_tokens=96, sampling=sampling)
        engine.submit(replace(request, constraint=STRUCTURES.constraint(task, "content")))
        events = [event for _ in range(100) if engine.has_work for event in engine.step()]
        end = events[-1]
        assert isinstance(end, Finished)
        ids = [token_id for event in events if isinstance(event, CanvasDone) for token_id in event.token_ids]
        parsed = read(task, ids)
        if end.reason == "stop":
            text = parsed.calls[0].arguments if task.must_call else parsed.content
            jsonschema.validate(json.loads(text), schema)
        else:
            assert (end.reason, end.error, len(ids)) == ("length", None, 96)


TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                "more": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}
SHAPE = {"type": "object", "required": ["kind"], "additionalProperties": False}
SHAPES = {
    "type": "object",
    "properties": {
        "shape": {
            "oneOf": [
                {**SHAPE, "properties": {"kind": {"const": "round"}, "radius": {"type": "number", "minimum": 0}}},
                {**SHAPE, "properties": {"kind": {"enum": ["flat"]}, "sides": {"type": "integer"}}},
            ]
        }
    },
    "required": ["shape"],
}
MERGED = {
    "allOf": [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
        {"properties": {"a": {"maximum": 5}, "b": {"type": "string"}}, "required": ["b"]},
    ]
}


@pytest.mark.parametrize("schema", [TREE, SHAPES, MERGED])
def test_schemas_that_refer_and_combine(schema: Any) -> None:
    calls = tool_task(schema, parallel_tool_calls=False)
    texts = [read(json_task(schema), ids).content for ids in replies(json_task(schema), count=25)]
    texts += [read(calls, ids).calls[0].arguments for ids in replies(calls, count=25)]
    assert len(texts) > 20
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {}}, "not"),
        ({"type": "object", "if": {}, "then": {}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-a"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "sphere"}, "sphere"),
        ({"oneOf": [{"type": "object", "properties": {name: {}}} for name in ("a", "b")]}, "oneOf"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "draft-03"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, ""),
    ],
)  # fmt: skip
def test_a_keyword_that_cannot_be_kept_is_refused_by_name(schema: Any, named: str) -> None:
    error = refusal(json_task(schema))
    assert (error.param, error.code) == ("response_format", "unsupported_value")
    assert named in error.message
    if named != "draft-03":
        error = refusal(tool_task({"type": "object", "properties": {"x": schema}, "required": ["x"]}))
        assert error.param == "tools"
        assert "'f'" in error.message
        assert named in error.message


def test_what_asserts_nothing_is_no_reason_to_refuse() -> None:
    schema = {"type": "array", "uniqueItems": False, "items": {"type": "string", "format": "path"}, "x-note": 1}
    assert replies(json_task(schema))
    assert replies(tool_task({"type": "object", "properties": {"a": schema}}))


def test_a_client_cannot_switch_the_guarantee_off() -> None:
    assert "if" in refusal(json_task({"type": "object", "if": {}, "x-guidance": {"lenient": True}})).message


@pytest.mark.parametrize("opens_in", ["content", "channel", "reasoning"])
def test_a_thought_may_come_first(opens_in: OpensIn) -> None:
    choice = Structure("choice", ("yes", "no"), "guided_choice")
    task = ChatTask(messages=(), structure=choice, template_options={"enable_thinking": True})
    found = [read(task, ids, opens_in) for ids in replies(task, count=40, opens_in=opens_in)]
    assert {parsed.content for parsed in found} == {"yes", "no"}
    assert any(parsed.reasoning for parsed in found)
    for parsed in found:
        assert not parsed.reasoning.startswith("thought\n" if opens_in == "channel" else "<")


def test_no_thought_where_the_model_is_not_to_think() -> None:
    task = ChatTask(messages=(), structure=Structure("choice", ("yes", "no"), "guided_choice"))
    assert {PROMPTS.decode(ids) for ids in replies(task, count=20)} == {"yes", "no"}


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        (Structure("regex", "[a-c]{2,4}x?", "regex"), r"[a-c]{2,4}x?"),
        (Structure("regex", "^a/b\"|c$", "regex"), r"a/b\"|c"),
        (Structure("lark", 'start: A "!"\nA: /[xy]+/', "guided_grammar"), r"[xy]+!"),
        (Structure("gbnf", 'root ::= "n=" digit+\ndigit ::= [0-9]', "grammar"), r"n=[0-9]+"),
        (Structure("choice", ('say "hi"', "a\\b", "ünï", "<turn|>"), "guided_choice"), r'say "hi"|a\\b|ünï|<turn\|>'),
    ],
)  # fmt: skip
def test_other_forms(structure: Structure, pattern: str) -> None:
    task = ChatTask(messages=(), structure=structure)
    texts = [read(task, ids).content for ids in replies(task, count=12)]
    assert texts
    assert all(re.fullmatch(pattern, text) for text in texts), texts


@pytest.mark.parametrize(
    "structure",
    [
        Structure("regex", "(?=a)b", "regex"),
        Structure("regex", "a(", "regex"),
        Structure("regex", "a\ud800", "regex"),
        Structure("choice", ("a", "\udfff"), "guided_choice"),
        Structure("lark", "start: nothing", "guided_grammar"),
        Structure("lark", "nonsense", "guided_grammar"),
        Structure("gbnf", "root = a", "grammar"),
        Structure("gbnf", "root ::= missing", "grammar"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused(structure: Structure) -> None:
    assert refusal(ChatTask(messages=(), structure=structure)).param == structure.param


def test_calls_beside_content_where_calls_are_free() -> None:
    """`auto` with a strict tool: text, calls or both; a call of the strict tool is valid, one of another is a call."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    strict = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    other = {"type": "function", "function": {"name": "g", "parameters": schema}}
    task = ChatTask(messages=(), tools=(strict, other))
    found = [read(task, ids) for ids in replies(task, count=60, closers={*CLOSERS, 48})]
    calls = [call for parsed in found for call in parsed.calls]
    assert {call.name for call in calls} == {"f", "g"}
    assert any(parsed.content and parsed.calls for parsed in found)
    assert any(len(parsed.calls) > 1 for parsed in found)
    for call in calls:
        if call.name == "f":
            jsonschema.validate(json.loads(call.arguments), schema)


def test_a_form_and_tools() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    task = ChatTask(messages=(), tools=(tool,), structure=Structure("choice", ("yes",), "guided_choice"))
    found = [read(task, ids) for ids in replies(task, count=30)]
    assert all((parsed.content == "yes") != bool(parsed.calls) for parsed in found)
    assert {bool(parsed.calls) for parsed in found} == {True, False}


def test_how_many_calls_there_are_and_of_which_tools() -> None:
    tools = tuple({"type": "function", "function": {"name": name, "parameters": {}}} for name in ("f", "g", "h"))

    def called(**fields: Any) -> list[list[str]]:
        task = ChatTask(messages=(), tools=tools, must_call=True, **fields)
        return [[call.name for call in read(task, ids).calls] for ids in replies(task, count=40)]

    assert max(map(len, called())) > 1
    assert {len(names) for names in called(parallel_tool_calls=False)} == {1}
    assert all(names == ["g"] for names in called(callable=("g",)))
    assert {name for names in called(callable=("g", "h")) for name in names} == {"g", "h"}


@pytest.mark.parametrize("schema", [None, {}, {"type": "object", "properties": {}}])
def test_a_function_without_parameters_is_called_without_arguments(schema: Any) -> None:
    found = [read(task, ids).calls for task in [tool_task(schema)] for ids in replies(task, count=8)]
    assert found
    assert all(json.loads(call.arguments) == {} for calls in found for call in calls)


def _chain(length: int, step: Callable[[Any], Any]) -> dict[str, Any]:
    links = {f"d{index}": step({"$ref": f"#/$defs/d{index - 1}"}) for index in range(1, length)}
    return {"$ref": f"#/$defs/d{length - 1}", "$defs": {"d0": {"type": "integer"}, **links}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        _chain(3_000, lambda inner: inner),
        _chain(3_000, lambda inner: {"allOf": [inner]}),
        _chain(3_000, lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]}),
        _chain(60_000, lambda inner: inner),
        _chain(40, lambda inner: {"type": "object", "properties": {"a": inner, "b": inner}}),
        _nested(50),
        _nested(400),
        _nested(20_000),
        {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(900)}},
        {"type": "object", "properties": {f"p{index}": {} for index in range(1_200)}},
        {"enum": [f"v{index}" for index in range(20_000)]},
        {"type": "string", "pattern": "^((a|b|ab){1,900}(c|d){1,900}){1,900}$"},
        {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"},
        {"type": "string", "minLength": 100_000},
        {"type": "array", "items": {"type": "integer"}, "minItems": 100_000, "maxItems": 10**9},
        {"type": "array", "minItems": "many"},
        {"type": ["string", 5], "required": 7, "properties": [], "enum": {}},
    ],
)  # fmt: skip
def test_huge_and_absurd_schemas_are_served_or_refused(schema: Any) -> None:
    for task in (json_task(schema), tool_task({"type": "object", "properties": {"a": schema}})):
        try:
            constraint = STRUCTURES.constraint(task, "content")
        except ApiError as error:
            assert error.status == 400
            assert len(error.message) < 1000
        else:
            assert constraint is not None
            walk(constraint, random.Random(1), closers=CLOSERS, most=30)


RULES = "".join(f"r{n}: r{n + 1}\n" for n in range(4_000))
DEEP = "(" * 20_000 + '"a"' + ")" * 20_000


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("lark", f"start: {DEEP}"),
        ("lark", f'start: r0\n{RULES}r4000: "a"'),
        ("lark", f'start: r0\n{RULES}r4000: "a"'.replace("r", "R").replace("staRt", "start")),
        ("gbnf", f"root ::= {DEEP}"),
        ("regex", DEEP),
        ("regex", "((a|b){1,100}c){1,100}" * 20),
        ("regex", "(.*a){30}b{1000}"),
        ("regex", "a" * 100_000),
        ("choice", tuple(f"choice {n}" for n in range(20_000))),
    ],
)
def test_huge_and_absurd_grammars_are_served_or_refused(kind: Any, value: Any) -> None:
    task = ChatTask(messages=(), structure=Structure(kind, value, "the_field"))
    try:
        constraint = STRUCTURES.constraint(task, "content")
    except ApiError as error:
        assert (error.status, error.param) == (400, "the_field")
    else:
        assert constraint is not None
        walk(constraint, random.Random(1), closers=CLOSERS, most=30)


WORDS = "type properties items enum anyOf allOf oneOf $ref required minItems pattern format const a".split()
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from(["object", "array", "string", "#", "(", "x"])
)
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)),
    max_leaves=12,
)


@FEW
@given(st.dictionaries(st.sampled_from(WORDS), ANY_JSON, max_size=5))
def test_any_json_at_all_is_a_schema_or_a_refusal(schema: Any) -> None:
    for task in (json_task(schema), tool_task(schema)):
        try:
            STRUCTURES.constraint(task, "content")
        except ApiError as error:
            assert error.status == 400


def test_two_replies_to_the_same_form_stand_apart() -> None:
    one, other = (STRUCTURES.constraint(json_task({"enum": ["ab", "cd"]}), "content") for _ in range(2))
    assert one is not None
    assert other is not None
    assert one.advance(PROMPTS.encode('"ab"')) == 4
    assert one.must_end
    assert one.ends() == (106, 1, 50), "the end of a turn is the most natural"
    assert other.advance(PROMPTS.encode('"cd"')) == 4
    one.rollback(2)
    assert PROMPTS.decode(one.forced()) == 'b"'


def test_what_closes_comes_before_what_only_goes_on() -> None:
    kinds = {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "array", "items": {"type": "string"}}}
    schema = {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}
    constraint = STRUCTURES.constraint(json_task(schema), "content")
    assert constraint is not None

    def closing() -> str:
        mask = constraint.closing()
        return PROMPTS.decode(token_id for token_id in range(512) if mask[token_id // 8] >> token_id % 8 & 1)

    constraint.advance(PROMPTS.encode('{"a":"x'))
    assert closing() == '"'
    constraint.advance(PROMPTS.encode('"'))
    assert closing() == ","
    constraint.advance(PROMPTS.encode(',"b":'))
    assert closing() == ""
    constraint.advance(PROMPTS.encode("5"))
    assert closing() == ","
    constraint.advance(PROMPTS.encode(',"c":["]}'))
    assert closing() == '"'
    constraint.advance(PROMPTS.encode('"'))
    assert closing() == "]"
    constraint.advance(PROMPTS.encode("]"))
    assert closing() == "}"
