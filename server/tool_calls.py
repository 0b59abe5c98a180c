"""Gemma's call syntax, `call:NAME{key:<|"|>text<|"|>,n:5}`, read into a name and JSON arguments.

Knows the grammar of calls, not markers, deltas or wire formats. Read are also the forms models fall back to deep in
a context: `call:f(a='b', n=True)`, `key="text"`, quoted keys, bare text, several calls between one pair of markers,
closing brackets and quotes missing at the end, and `{"name": ..., "arguments": ...}`.
Invariant: a stretch of text is read completely or not at all; arguments are never made up.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.tool_schema import Bare, Json, typed

# The quote token. In the text of a call it is one character that no decoded text contains: a lone surrogate.
QUOTE = '<|"|>'
QUOTE_SIGN = "\ud800"
MAX_NESTING = 64

_NAME = r"[A-Za-z0-9_.-]{1,64}"
_HEAD = re.compile(rf"[\s,;]*(?:(?:call)?\s*(:))?\s*({_NAME})\s*([{{(])")
_KEY = re.compile(r"[^\W\d][\w.$-]{0,99}|[\w.$-]{1,100}")
_NEXT_KEY = re.compile(rf"\s{{0,20}}([\"'{QUOTE_SIGN}]?)([\w.$-]{{1,100}})\1\s{{0,20}}[:=]")
_SEPARATOR = re.compile(r"\s*[:=]")
_LEFTOVERS = re.compile(r"[\s})\];,]*")
_WORD = re.compile(r"[\w.+-]+")
_AFTER_QUOTE = re.compile(r"\s*(?:[,}\])]|\Z)")
_NOTHING_MORE = re.compile(r"[\s})\]]*\Z")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"', "'": "'"}
_ESCAPED = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)


@dataclass(frozen=True)
class ParsedCall:
    """One complete call: the tool's name and its arguments as JSON text of an object."""

    name: str
    arguments: str


class _Malformed(Exception):
    """The text is no call."""


def new_call_id() -> str:
    """An id for a call, in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def shown(text: str) -> str:
    """The text of a call as a reader may see it."""
    return text.replace(QUOTE_SIGN, '"')


def parse_calls(text: str, tools: Mapping[str, Json], *, exact: bool = False) -> list[ParsedCall]:
    """Read what stands between the call markers; `tools` are the declared schemas by name.

    Empty when any of it is not a call: then all of it is text. `exact`: it was written under a grammar, so that it is
    one whatever it looks like; of a key that comes twice the last counts.
    """
    try:
        calls, end = _Reader(text, tools, exact=exact).calls()
    except _Malformed:
        return _json_calls(text, tools)
    return calls if end == len(text) else []


def parse_leading_calls(text: str, tools: Mapping[str, Json]) -> tuple[list[ParsedCall], str]:
    """Read calls that stand without markers at the beginning of the text; also what follows them."""
    try:
        calls, end = _Reader(text, tools).calls()
    except _Malformed:
        return [], text
    return calls, text[end:]


def _call(name: str, arguments: Json, tools: Mapping[str, Json]) -> ParsedCall:
    schema = tools.get(name, {})
    return ParsedCall(name, json.dumps(typed(arguments, schema, schema), ensure_ascii=False, allow_nan=False))


def _json_calls(text: str, tools: Mapping[str, Json]) -> list[ParsedCall]:
    """Calls written as JSON, the way other models are trained to."""
    try:
        written = json.loads(shown(text))
    except (ValueError, RecursionError):
        return []
    calls = []
    for each in written if isinstance(written, list) else [written]:
        arguments = (each.get("arguments", each.get("parameters"))) if isinstance(each, dict) else None
        if not isinstance(arguments, dict) or not re.fullmatch(_NAME, str(each.get("name", ""))):
            return []
        try:
            calls.append(_call(each["name"], arguments, tools))
        except (ValueError, RecursionError):  # NaN, which Python reads and JSON does not know; absurd nesting
            return []
    return calls


class _Reader:
    """Recursive descent over the text of one or more calls."""

    def __init__(self, text: str, tools: Mapping[str, Json], *, exact: bool = False) -> None:
        self._text = text
        self._tools = tools
        self._exact = exact
        self._at = 0
        self._open: list[str] = []  # what may close each open bracket, outermost first
        self._keys: frozenset[str] = frozenset()  # declared arguments of the call being read
        self._unclosed: set[str] = set()  # quotes known not to close any more: keeps the work linear

    def calls(self) -> tuple[list[ParsedCall], int]:
        """All calls from here on, and where the last one ended. At least one, or _Malformed."""
        calls = [self._one()]
        while True:
            end = self._at
            try:
                calls.append(self._one())
            except _Malformed:
                return calls, end

    def _one(self) -> ParsedCall:
        head = _HEAD.match(self._text, self._at)
        if head is None or not (head[1] or head[2] in self._tools):
            raise _Malformed
        name = head[2]
        self._at = head.end()
        declared = self._tools.get(name, {}).get("properties")
        self._keys = frozenset(declared) if isinstance(declared, dict) else frozenset()
        self._open = []
        arguments = self._object(")}" if head[3] == "(" else "}")
        leftovers = _LEFTOVERS.match(self._text, self._at)  # brackets too many are noise
        self._at = leftovers.end() if leftovers else self._at
        return _call(name, arguments, self._tools)

    def _object(self, closers: str) -> Json:
        self._enter(closers)
        result: Json = {}
        while not self._closed(closers):
            key = self._key()
            if key in result and not self._exact:  # a sign of text read wrongly
                raise _Malformed
            result[key] = self._value()
            self._comma(closers)
        self._open.pop()
        return result

    def _list(self) -> list[Any]:
        self._enter("]")
        result: list[Any] = []
        while not self._closed("]"):
            result.append(self._value())
            self._comma("]")
        self._open.pop()
        return result

    def _enter(self, closers: str) -> None:
        self._open.append(closers)
        if len(self._open) > MAX_NESTING:
            raise _Malformed

    def _peek(self) -> str:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _closed(self, closers: str) -> bool:
        """Step over the closing bracket if it is next. The end of the text closes everything."""
        symbol = self._peek()
        if symbol and symbol not in closers:
            return False
        self._at += len(symbol)
        return True

    def _comma(self, closers: str) -> None:
        symbol = self._peek()
        if symbol == ",":
            self._at += 1
        elif symbol and symbol not in closers:
            raise _Malformed

    def _key(self) -> str:
        symbol = self._peek()
        if symbol in (QUOTE_SIGN, '"', "'"):
            end = self._text.find(symbol, self._at + 1)
            key = self._text[self._at + 1 : end]
            if end < 0 or not key:
                raise _Malformed
            self._at = end + 1
        else:
            word = _KEY.match(self._text, self._at)
            if word is None:
                raise _Malformed
            key = word[0]
            self._at = word.end()
        separator = _SEPARATOR.match(self._text, self._at)
        if separator is None:
            raise _Malformed
        self._at = separator.end()
        return shown(key)

    def _value(self) -> Any:
        symbol = self._peek()
        if symbol == "{":
            self._at += 1
            return self._object("}")
        if symbol == "[":
            self._at += 1
            return self._list()
        if symbol == QUOTE_SIGN:
            return self._quoted()
        if symbol in ('"', "'"):
            text = self._plainly_quoted(symbol)
            if text is not None:
                return text
        return self._bare()

    def _quoted(self) -> str:
        """Between two quote tokens everything is text."""
        end = self._text.find(QUOTE_SIGN, self._at + 1)
        if end < 0:
            self._at += 1
            return self._rest()
        text = self._text[self._at + 1 : end]
        self._at = end + 1
        return text

    def _plainly_quoted(self, quote: str) -> str | None:
        """Between plain quotes. A quote inside the text is none that something else than a delimiter follows."""
        start = self._at + 1
        at = start
        while quote not in self._unclosed and at < len(self._text):
            symbol = self._text[at]
            if symbol == "\\":
                at += 2
                continue
            if symbol in (quote, QUOTE_SIGN) and self._ends_value(at + 1):
                self._at = at + 1
                return _unescaped(shown(self._text[start:at]))
            at += 1
        self._unclosed.add(quote)
        if quote == "'" or start >= len(self._text):  # an apostrophe
            return None
        self._at = start
        return _unescaped(shown(self._rest()))

    def _ends_value(self, at: int) -> bool:
        after = _AFTER_QUOTE.match(self._text, at)
        if after is None:
            return False
        in_list = self._open[-1] == "]"
        return in_list or not after[0].endswith(",") or self._next_is_key(after.end())

    def _next_is_key(self, at: int) -> bool:
        """True if after a comma the next argument begins, or nothing comes any more."""
        key = _NEXT_KEY.match(self._text, at)
        if key is None:
            return _NOTHING_MORE.match(self._text, at) is not None
        return len(self._open) > 1 or not self._keys or key[2] in self._keys

    def _rest(self) -> str:
        """Text whose closing quote never came: all that is left, less the brackets that close what is open."""
        rest, self._at = self._text[self._at :], len(self._text)
        for closers in self._open:
            trimmed = rest.rstrip()
            if trimmed and trimmed[-1] in closers:
                rest = trimmed[:-1]
        return shown(rest)

    def _bare(self) -> Bare:
        """Unquoted text up to the bracket that closes, or the comma after which the next value begins."""
        if self._exact:  # it has neither
            match = _WORD.match(self._text, self._at)
            if match is None:
                raise _Malformed
            self._at = match.end()
            return Bare(match[0])
        closers = self._open[-1]
        openers = {"}": "{", "]": "[", ")": "("}
        nested: list[str] = []
        start = self._at
        while self._at < len(self._text):
            symbol = self._text[self._at]
            if nested and symbol == nested[-1]:
                nested.pop()
            elif not nested and any(symbol in each for each in self._open):
                break
            elif symbol in "{[(":
                nested.append(next(closer for closer, opener in openers.items() if opener == symbol))
            elif symbol == "," and not nested and (closers == "]" or self._next_is_key(self._at + 1)):
                break
            elif symbol == QUOTE_SIGN:
                raise _Malformed
            self._at += 1
        word = self._text[start : self._at].strip()
        if not word:
            raise _Malformed
        return Bare(word)


def _unescaped(text: str) -> str:
    """JSON's and Python's escapes undone; a backslash before anything else is text."""

    def one(match: re.Match[str]) -> str:
        code = match[1]
        if len(code) == 5:
            char = chr(int(code[1:], 16))
            return match[0] if "\ud800" <= char <= "\udfff" else char
        return _ESCAPES.get(code, match[0])

    return _ESCAPED.sub(one, text)
