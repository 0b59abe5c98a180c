"""The grammar of a whole reply: a thought where the model may think, then content of the wanted form, or calls.

Knows what a task asks for and Gemma's markers; writes llguidance's grammars and compiles none.
Invariant: a request that needs no constraint has no grammar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from server.automaton import BadGrammar
from server.call_grammar import call_rules, literal
from server.exchange import ChatTask, Structure
from server.json_grammar import json_grammar
from server.prompt import CHANNEL_CLOSE, CHANNEL_OPEN, OpensIn

Json = dict[str, Any]

MAX_TEXT = 65_536  # characters of a regular expression or a grammar
MAX_CHOICES = 10_000
NO_PARAMETERS: Json = {"type": "object", "properties": {}}  # what a function without any takes, as OpenAI reads it
_QUOTE, _CALL_OPEN, _CALL_CLOSE = '<|"|>', "<|tool_call>", "<tool_call|>"


def reply_grammar(task: ChatTask, opens_in: OpensIn, ids: Mapping[str, int]) -> str | None:
    """The grammar of a reply, as llguidance's JSON; None if anything goes. `ids` are the control tokens'.

    Raises BadGrammar.
    """
    if not needs_grammar(task):
        return None
    rules: list[str] = []
    others: list[Json] = []
    bodies: list[str] = []
    if task.structure is not None and not task.must_call:
        others.append({**_content(task.structure), "name": "content"})
        bodies.append("@content")
    tools = _callable(task)
    if tools:
        call, rules = call_rules(tools, _id(ids, _QUOTE))
        rules.append(f"call: {_token(ids, _CALL_OPEN)} {call} {_token(ids, _CALL_CLOSE)}")
        bodies.append(_calls(task))
    start = f"start: {_thought(task, opens_in, ids)} ({' | '.join(bodies)})"
    top = "\n".join([start, *rules, *([] if rules else ["TEXT: /(?s:.*)/"]), "SOME: /(?s:.+)/"])
    return json.dumps({"grammars": [{"lark_grammar": top}, *others]})


def needs_grammar(task: ChatTask) -> bool:
    """Whether a task asks for anything that only a constraint can promise."""
    strict = any(tool["function"].get("strict") for tool in task.tools)
    return task.structure is not None or task.must_call or task.callable is not None or strict


def held(task: ChatTask, function: Mapping[str, Any]) -> bool:
    """Whether a call of a tool is held to the tool's schema, and not only to the form of a call."""
    return task.must_call or bool(function.get("strict"))


def _callable(task: ChatTask) -> dict[str, Any]:
    """Schemas by name of the tools that may be called."""
    functions = [tool["function"] for tool in task.tools]
    return {
        function["name"]: (function.get("parameters") or NO_PARAMETERS) if held(task, function) else {}
        for function in functions
        if task.callable is None or function["name"] in task.callable
    }


def _calls(task: ChatTask) -> str:
    if task.must_call:
        return "call+" if task.parallel_tool_calls and not task.named_tool else "call"
    if task.structure is not None:
        return "call+" if task.parallel_tool_calls else "call"
    return "(SOME | call)*" if task.parallel_tool_calls else "SOME? call?"


def _thought(task: ChatTask, opens_in: OpensIn, ids: Mapping[str, int]) -> str:
    if opens_in == "content":
        if not task.template_options.get("enable_thinking"):
            return ""
        return f'({_token(ids, CHANNEL_OPEN)} "thought\\n" TEXT {_token(ids, CHANNEL_CLOSE)})?'
    label = '"thought\\n" ' if opens_in == "channel" else ""
    return f"{label}TEXT {_token(ids, CHANNEL_CLOSE)}"


def _content(structure: Structure) -> Json:
    value = structure.value
    if structure.kind == "json":
        return json_grammar(value)
    if structure.kind == "choice":
        if len(value) > MAX_CHOICES or sum(map(len, value)) > MAX_TEXT:
            raise BadGrammar(f"more than {MAX_CHOICES:,} choices, or more than {MAX_TEXT:,} characters of them")
        return {"lark_grammar": "start: " + " | ".join(map(literal, value))}
    if len(value) > MAX_TEXT:
        raise BadGrammar(f"longer than {MAX_TEXT:,} characters")
    if any("\ud800" <= symbol <= "\udfff" for symbol in value):
        raise BadGrammar("half a character is no text")
    if structure.kind == "lark":
        return {"lark_grammar": value}
    if structure.kind == "gbnf":
        return {"lark_grammar": _from_gbnf(value)}
    # Both anchors say what is the case anyway: the whole of the content must match.
    inner = value.removeprefix("^")
    inner = inner[:-1] if inner.endswith("$") and not inner.endswith("\\$") else inner
    grammar: Json = json.loads(LLMatcher.grammar_from_regex(inner))["grammars"][0]
    return grammar


def _from_gbnf(text: str) -> str:
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises plain exceptions for a grammar that makes no sense
        raise BadGrammar(f"not a grammar in llama.cpp's syntax (GBNF): {error}"[:300]) from error


def _token(ids: Mapping[str, int], name: str) -> str:
    return f"<[{_id(ids, name)}]>"


def _id(ids: Mapping[str, int], name: str) -> int:
    if name not in ids:
        raise BadGrammar(f"the model's tokenizer has no {name} token")
    return ids[name]
