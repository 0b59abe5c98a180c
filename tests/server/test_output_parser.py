"""Sorting a reply into reasoning, content and calls, whatever way it is cut."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.detokenizer import Marker
from server.output_parser import OutputParser, Parsed, StopStrings
from server.prompt import OpensIn
from tests.fakes import CONTROL

MARKERS = re.compile("|".join(re.escape(name) for name in sorted(CONTROL, key=len, reverse=True)))
# Of each property; `make fuzz CASES=...` tries more.
EXAMPLES = int(os.environ.get("FUZZ_CASES", "0")) // 100 or 60
relaxed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pieces(text: str) -> list[str | Marker]:
    """Markers and single characters."""
    out: list[str | Marker] = []
    position = 0
    for match in MARKERS.finditer(text):
        out += text[position : match.start()]
        out.append(Marker(match[0]))
        position = match.end()
    return out + list(text[position:])


TOOLS: dict[str, Any] = {"get_weather": {"type": "object", "properties": {"city": {}, "days": {}}}, "f": {}}


def parse(
    text: str,
    opens_in: OpensIn = "content",
    *,
    tools: bool = True,
    raw: bool = False,
    complete: bool = True,
    group: int = 1,
) -> Parsed:
    parser = OutputParser(opens_in, tools=TOOLS if tools else None, raw=raw)
    everything = pieces(text)
    total = Parsed()
    for start in range(0, len(everything), group):
        parser.push(everything[start : start + group])
        add(total, parser.take())
    add(total, parser.finish(complete=complete))
    return total


def add(total: Parsed, more: Parsed) -> None:
    total.reasoning += more.reasoning
    total.content += more.content
    total.calls += more.calls


CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'

CASES: list[tuple[str, OpensIn, str, str, int]] = [
    # text, opens in, reasoning, content, calls
    ("Hello", "content", "", "Hello", 0),
    ("<|channel>thought\nhm\n<channel|>Yes", "content", "hm", "Yes", 0),
    ("<|channel>thought\n<channel|>Yes", "content", "", "Yes", 0),
    ("<|channel>thought<channel|>Yes", "content", "", "Yes", 0),
    ("<|channel><channel|>Yes", "content", "", "Yes", 0),
    ("<|channel>thoughts are free\n<channel|>Yes", "content", "thoughts are free", "Yes", 0),
    ("<|channel>a\n\nb\n\n<channel|>Yes", "content", "a\n\nb\n", "Yes", 0),
    ("<|channel>thought\nnever closed", "content", "never closed", "", 0),
    ("<|channel>thought\ncut\n", "content", "cut\n", "", 0),
    ("<|channel>thou", "content", "", "", 0),
    ("more\n<channel|>Yes", "reasoning", "more", "Yes", 0),
    ("thought\nmore\n<channel|>Yes", "channel", "more", "Yes", 0),
    ("Yes<channel|> indeed", "content", "", "Yes indeed", 0),
    ("a<|channel>thought\nb<|channel>c<channel|>d", "content", "bc", "ad", 0),
    ("Yes<turn|>noise<|channel>thought\nnoise", "content", "", "Yes", 0),
    ("Yes<|turn>user\nnoise", "content", "", "Yes", 0),
    ("Yes<eos>noise", "content", "", "Yes", 0),
    ("<|channel>thought\nhm<turn|>noise", "content", "hm", "", 0),
    ("a<pad><mask><|image|><|think|><|tool><tool|><tool_response|>b", "content", "", "ab", 0),
    ('say <|"|>hi<|"|>', "content", "", "say hi", 0),
    (CALL, "content", "", "", 1),
    (CALL + CALL, "content", "", "", 2),
    ("Let me see." + CALL + "<|tool_response>noise", "content", "", "Let me see.", 1),
    ("<|channel>thought\nI need a tool\n<channel|>" + CALL, "content", "I need a tool", "", 1),
    ("<|channel>thought\nI need a tool\n" + CALL, "content", "I need a tool", "", 1),
    (CALL.removesuffix("<tool_call|>") + "<turn|>", "content", "", "", 1),
    (CALL.removesuffix("<tool_call|>") + CALL, "content", "", "", 2),
    (CALL.removesuffix("<tool_call|>"), "content", "", "", 1),
    (CALL.removesuffix("}<tool_call|>"), "content", "", "", 1),
    (CALL.removesuffix(",days:2}<tool_call|>").removesuffix('<|"|>') + "}<turn|>", "content", "", "", 1),
    (CALL + "\n" + CALL + "\n", "content", "", "", 2),
    (CALL + "\nDone.", "content", "", "\nDone.", 1),
    ("<|tool_call>call:f{a:1}\ncall:f{a:2}<tool_call|>", "content", "", "", 2),
    ("<|tool_call>call:f(a='b', ok=True)<tool_call|>", "content", "", "", 1),
    ('<|tool_call>f{query="x"}<tool_call|>', "content", "", "", 1),
    ("<|tool_call>call:f{a:1} and more<tool_call|>", "content", "", "call:f{a:1} and more", 0),
    # without the marker, where content begins
    ("call:f{a:1}", "content", "", "", 1),
    ("call:f(a=1)\nThere.", "content", "", "There.", 1),
    ("call:f{a:1}<tool_call|><|tool_response>noise", "content", "", "", 1),
    (CALL.removeprefix("<|tool_call>"), "content", "", "", 1),
    ("<|channel>thought\nhm\n<channel|>call:f{}", "content", "hm", "", 1),
    ("<|channel>thought\nhm<channel|>\n\ncall:f{}" + CALL, "content", "hm", "", 2),
    ("I call:f{a:1}", "content", "", "I call:f{a:1}", 0),
    ("call:unknown{a:1}", "content", "", "call:unknown{a:1}", 0),
    ("call:f", "content", "", "call:f", 0),
    ("call:f{a}", "content", "", "call:f{a}", 0),
    ("  call", "content", "", "  call", 0),
    # a thought whose opening marker is missing
    ("thought\nhm\n<channel|>Yes", "content", "hm", "Yes", 0),
    ("thoughtful", "content", "", "thoughtful", 0),
    ("Yes\nthought\nhm", "content", "", "Yes\nthought\nhm", 0),
    ("<|channel>a<channel|>thought\nb", "content", "a", "thought\nb", 0),
    ("<|tool_call>nonsense<tool_call|>!", "content", "", "nonsense!", 0),
    ("<tool_call|>stray", "content", "", "stray", 0),
]


@pytest.mark.parametrize("group", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("text", "opens_in", "reasoning", "content", "calls"), CASES)
def test_replies(text: str, opens_in: OpensIn, reasoning: str, content: str, calls: int, group: int) -> None:
    parsed = parse(text, opens_in, group=group)
    assert (parsed.reasoning, parsed.content, len(parsed.calls)) == (reasoning, content, calls)


@pytest.mark.parametrize("group", [1, 5, 1000])
@pytest.mark.parametrize("start", ["<|tool_call>", ""])
def test_a_call_that_was_cut_is_text_wherever_it_was_cut(start: str, group: int) -> None:
    written = CALL.removeprefix("<|tool_call>").removesuffix("<tool_call|>")
    for length in range(len(written) + 1):
        cut = written[:length]
        if "<" in cut.replace('<|"|>', ""):
            continue
        parsed = parse(start + cut, complete=False, group=group)
        assert not parsed.calls
        assert parsed.content == cut.replace('<|"|>', '"' if start or "{" in cut else "")


def test_arguments_are_typed_by_the_declared_schema() -> None:
    schema = {"properties": {"zip": {"type": "string"}, "days": {"type": "integer"}}}
    parser = OutputParser(tools={"f": schema})
    parser.push(pieces('<|tool_call>call:f{zip:01234,days:<|"|>5<|"|>}<tool_call|>'))
    (call,) = parser.take().calls
    assert json.loads(call.arguments) == {"zip": "01234", "days": 5}


def test_raw_text_is_not_sorted() -> None:
    text = "<|channel>thought\nhm\n<channel|>Yes" + CALL + "<eos>noise"
    parsed = parse(text, raw=True, tools=False)
    assert (parsed.reasoning, parsed.calls) == ("", [])
    assert parsed.content == "thought\nhm\nYescall:get_weather{city:Paris,days:2}"


def test_a_call_without_declared_tools_is_shown_as_text() -> None:
    assert parse(CALL, tools=False).content == 'call:get_weather{city:"Paris",days:2}'


def test_reasoning_comes_out_while_it_grows() -> None:
    parser = OutputParser()
    parser.push(pieces("<|channel>thought\nfirst\n"))
    assert parser.take().reasoning == "first"
    parser.push(pieces("second"))
    assert parser.take().reasoning == "\nsecond"


def test_reasoning_tokens_include_the_markers() -> None:
    parser = OutputParser()
    for piece in pieces("<|channel>ab<channel|>cd"):
        parser.push([piece])
    assert parser.reasoning_tokens == 4


FRAGMENTS = [
    *CONTROL, "thought\n", "thought", "a", "\n", " ", "call:f{", "call:f(", "call:", "f{", "}", ")", "]", "[", "k:1",
    "k=", "'", '"', ",", "\\", "\ufffd", "漢",
]  # fmt: skip


@relaxed
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join),
    st.integers(1, 9),
    st.sampled_from(["content", "channel", "reasoning"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_result_does_not_depend_on_the_cuts_and_no_marker_leaks(
    text: str, group: int, opens_in: OpensIn, tools: bool, raw: bool, complete: bool
) -> None:
    whole = parse(text, opens_in, tools=tools, raw=raw, complete=complete, group=10_000)
    cut = parse(text, opens_in, tools=tools, raw=raw, complete=complete, group=group)
    assert (cut.reasoning, cut.content, cut.calls) == (whole.reasoning, whole.content, whole.calls)
    shown = whole.reasoning + whole.content + "".join(call.arguments for call in whole.calls)
    assert not MARKERS.search(shown)
    for call in whole.calls:
        json.loads(call.arguments)
        call.arguments.encode("utf-8")
    (whole.reasoning + whole.content).encode("utf-8")


@relaxed
@given(st.text(max_size=30).filter(lambda text: not MARKERS.search(text)), st.integers(1, 9))
def test_text_without_markers_is_never_lost(text: str, group: int) -> None:
    if not text.startswith("thought\n") and "call:" not in text:
        assert parse(text, group=group).content == text


def stopped(text: str, stop: tuple[str, ...], group: int = 1) -> tuple[str, bool]:
    finder = StopStrings(stop)
    out = "".join(finder.push(text[start : start + group]) for start in range(0, len(text), group))
    return (out, True) if finder.hit else (out + finder.finish(), False)


@pytest.mark.parametrize("group", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "shown", "hit"),
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("four",), "one two three", False),
        ("one tw", ("two",), "one tw", False),
        ("aab", ("ab",), "a", True),
        ("ababac", ("abac",), "ab", True),
        ("xabc", ("xabc", "ab"), "x", True),  # the one that is complete first
        ("abc", ("bc", "abc"), "", True),  # complete together: the one that began first
        ("stop", ("stop",), "", True),
        ("", ("x",), "", False),
        ("line\nUser:", ("\nUser:", "\n\n"), "line", True),
        ("plain", (), "plain", False),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], shown: str, hit: bool, group: int) -> None:
    assert stopped(text, stop, group) == (shown, hit)


@relaxed
@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple),
    st.integers(1, 5),
)
def test_stop_strings_do_not_depend_on_the_cuts(text: str, stop: tuple[str, ...], group: int) -> None:
    shown, hit = stopped(text, stop, group)
    assert (shown, hit) == stopped(text, stop, 1000)
    assert text.startswith(shown)
    assert hit == any(each in text for each in stop)
    assert not any(each in shown for each in stop)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopStrings(("END",))
    assert finder.push("abc") == "abc"
    assert finder.push("xE") == "x"
    assert finder.push("N") == ""
    assert finder.push("X") == "ENX"
    assert finder.finish() == ""
