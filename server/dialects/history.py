"""A conversation as chat templates read it, built up from whatever form a client keeps it in.

Templates want string content (a list of parts where there are images), argument objects, and a tool result that
carries the name of its tool. Knows no wire format.
Invariant: a turn of the assistant is one message, however many items it came as.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

Json = dict[str, Any]
Content = str | list[Mapping[str, Any]]  # as `server.images.shown` makes it


class History:
    """Messages in the making; starts with those of an earlier conversation, if there was one."""

    def __init__(self, messages: Iterable[Json] = ()) -> None:
        self.messages: list[Json] = [dict(message) for message in messages]
        self._names: dict[str, str] = {}
        for message in self.messages:
            for call in message.get("tool_calls", []):
                self._names[call.get("id", "")] = call["function"]["name"]

    def say(self, role: str, content: Content, name: str | None = None) -> None:
        """A message of any role but the assistant's and a tool's."""
        self.messages.append({"role": role, "content": content, **({"name": name} if name else {})})

    def answer(self, text: str, *, reasoning: str = "", name: str | None = None) -> None:
        """A reply of the assistant, without the calls it made."""
        message: Json = {"role": "assistant", "content": text, **({"name": name} if name else {})}
        if reasoning:
            message["reasoning_content"] = reasoning
        self.messages.append(message)

    def continue_answer(self, *, text: str = "", reasoning: str = "") -> None:
        """More of the assistant's turn, for formats that send thought, text and calls as items of their own."""
        open_turn = self._open_turn()
        if open_turn is None or (reasoning and (open_turn["content"] or open_turn.get("tool_calls"))):
            self.answer(text, reasoning=reasoning)
            return
        for key, more in (("content", text), ("reasoning_content", reasoning)):
            if more:
                open_turn[key] = "\n".join(part for part in (open_turn.get(key), more) if part)

    def call(self, call_id: str | None, name: str, arguments: str | Json | None) -> None:
        """A call the assistant made in the turn that is open."""
        if self._open_turn() is None:
            self.answer("")
        made: Json = {"type": "function", "function": {"name": name, "arguments": _object(arguments)}}
        if call_id:
            made["id"] = call_id
            self._names[call_id] = name
        turn = self.messages[-1]
        turn["tool_calls"] = [*turn.get("tool_calls", []), made]

    def result(self, call_id: str | None, content: Content, name: str | None = None) -> None:
        """What a tool answered."""
        known = self._names.get(call_id or "") or name or self._unanswered() or "unknown"
        message: Json = {"role": "tool", "content": content, "name": known}
        if call_id:
            message["tool_call_id"] = call_id
        self.messages.append(message)

    def _unanswered(self) -> str | None:
        """The tool whose answer is due, for results that do not say which call they answer."""
        answered = 0
        for message in reversed(self.messages):
            if message["role"] != "tool":
                calls = message.get("tool_calls", [])
                return str(calls[answered]["function"]["name"]) if answered < len(calls) else None
            answered += 1
        return None

    def _open_turn(self) -> Json | None:
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last["role"] == "assistant" else None


def _object(arguments: str | Json | None) -> Json:
    """Arguments as an object. What is none is kept under a name, so that nothing the model once wrote is lost."""
    value: Any = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            value = arguments
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"value": value}
