"""Gemma's call syntax, `call:NAME{key:<|"|>text<|"|>,n:5}`, read into a name and JSON arguments.

Knows the grammar of one call, not markers, deltas or wire formats. Values are quoted text, numbers, true, false,
null, lists and objects. Invariant: a call is read completely or not at all; arguments are never made up.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# The quote token. A call is read from symbols, single characters or QUOTE, so text that looks like it is text.
QUOTE = '<|"|>'
MAX_NESTING = 64

_HEAD = re.compile(r"\s*(?:call)?\s*:\s*([A-Za-z0-9_.-]+)\s*\{")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}
_BARE_END = ",:{}[]"


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


def parse_call(symbols: Sequence[str]) -> ParsedCall | None:
    """Read the symbols between the call markers. None when they are not a well-formed call."""
    try:
        return _Reader(symbols).call()
    except _Malformed:
        return None


class _Reader:
    """Recursive descent over the symbols of one call."""

    def __init__(self, symbols: Sequence[str]) -> None:
        self._symbols = symbols
        self._at = 0

    def call(self) -> ParsedCall:
        head = _HEAD.match("".join("\0" if symbol == QUOTE else symbol for symbol in self._symbols))
        if head is None:
            raise _Malformed
        self._at = head.end() - 1
        arguments = self._object(0)
        self._spaces()
        if self._at != len(self._symbols):
            raise _Malformed
        return ParsedCall(head[1], json.dumps(arguments, ensure_ascii=False))

    def _peek(self) -> str:
        return self._symbols[self._at] if self._at < len(self._symbols) else ""

    def _spaces(self) -> None:
        while self._peek().isspace():
            self._at += 1

    def _take(self, symbol: str) -> bool:
        self._spaces()
        if self._peek() == symbol:
            self._at += 1
            return True
        return False

    def _expect(self, symbol: str) -> None:
        if not self._take(symbol):
            raise _Malformed

    def _object(self, depth: int) -> dict[str, Any]:
        self._expect("{")
        result: dict[str, Any] = {}
        if self._take("}"):
            return result
        while True:
            self._spaces()
            key = self._quoted() if self._peek() == QUOTE else self._bare()
            self._expect(":")
            if key in result:
                raise _Malformed
            result[key] = self._value(depth + 1)
            if self._take("}"):
                return result
            self._expect(",")

    def _list(self, depth: int) -> list[Any]:
        self._expect("[")
        result: list[Any] = []
        if self._take("]"):
            return result
        while True:
            result.append(self._value(depth + 1))
            if self._take("]"):
                return result
            self._expect(",")

    def _value(self, depth: int) -> Any:
        if depth > MAX_NESTING:
            raise _Malformed
        self._spaces()
        symbol = self._peek()
        if symbol == QUOTE:
            return self._quoted()
        if symbol == "{":
            return self._object(depth)
        if symbol == "[":
            return self._list(depth)
        word = self._bare()
        if word in _WORDS:
            return _WORDS[word]
        if _NUMBER.fullmatch(word):
            return _number(word)
        raise _Malformed  # an unquoted string: a later version may guess, this one does not

    def _quoted(self) -> str:
        self._at += 1
        start = self._at
        while self._peek() != QUOTE:
            if self._at >= len(self._symbols):
                raise _Malformed
            self._at += 1
        self._at += 1
        return "".join(self._symbols[start : self._at - 1])

    def _bare(self) -> str:
        start = self._at
        while self._peek() and self._peek() != QUOTE and self._peek() not in _BARE_END:
            self._at += 1
        word = "".join(self._symbols[start : self._at]).strip()
        if not word:
            raise _Malformed
        return word


def _number(word: str) -> int | float:
    if re.fullmatch(r"-?\d{1,300}", word):
        return int(word)
    value = float(word)
    if value in (float("inf"), float("-inf")):
        raise _Malformed  # JSON has no infinity
    return value
