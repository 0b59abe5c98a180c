"""Sorting a reply into reasoning, content and calls, whatever way it is cut."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.output_parser import OutputParser, Parsed, StopStrings
from server.prompt import Marker, OpensIn
from tests.fakes import CONTROL

MARKERS = re.compile("|".join(re.escape(name) for name in sorted(CONTROL, key=len, reverse=True)))
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pieces(text: str) -> list[str | Marker]:
    """Markers and single characters."""
    out: list[str | Marker] = []
    position = 0
    for match in MARKERS.finditer(text):
        out += text[position : match.start()]
        out.append(Marker(match[0]))
        position = match.end()
    return out + list(text[position:])


def parse(text: str, opens_in: OpensIn = "content", *, tools: bool = True, group: int = 1) -> Parsed:
    parser = OutputParser(opens_in, tools=tools)
    everything = pieces(text)
    total = Parsed()
    for start in range(0, len(everything), group):
        parser.push(everything[start : start + group])
        add(total, parser.take())
    add(total, parser.finish())
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
    (CALL.removesuffix("<tool_call|>"), "content", "", 'call:get_weather{city:"Paris",days:2}', 0),
    ("<|tool_call>nonsense<tool_call|>!", "content", "", "nonsense!", 0),
    ("<tool_call|>stray", "content", "", "stray", 0),
]


@pytest.mark.parametrize("group", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("text", "opens_in", "reasoning", "content", "calls"), CASES)
def test_replies(text: str, opens_in: OpensIn, reasoning: str, content: str, calls: int, group: int) -> None:
    parsed = parse(text, opens_in, group=group)
    assert (parsed.reasoning, parsed.content, len(parsed.calls)) == (reasoning, content, calls)


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


@relaxed
@given(
    st.lists(st.sampled_from([*CONTROL, "thought\n", "a", "\n", "call:f{", "}", "k:1", "\ufffd"]), max_size=20).map(
        "".join
    ),
    st.integers(1, 9),
    st.booleans(),
)
def test_the_result_does_not_depend_on_the_cuts_and_no_marker_leaks(text: str, group: int, tools: bool) -> None:
    whole, cut = parse(text, tools=tools, group=10_000), parse(text, tools=tools, group=group)
    assert (cut.reasoning, cut.content, cut.calls) == (whole.reasoning, whole.content, whole.calls)
    shown = whole.reasoning + whole.content + "".join(call.arguments for call in whole.calls)
    assert not MARKERS.search(shown)
    for call in whole.calls:
        json.loads(call.arguments)


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
