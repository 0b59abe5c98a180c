"""Tool calls as the model wrote them, so that a history that comes back as JSON becomes the same ids again.

A client returns a call as a name and an object; rendered anew its ids may differ (other order of keys, other digits,
other cuts between tokens), and everything behind it would have to be committed again. Knows ids and JSON; no tokenizer,
no template, no wire format.

Invariant: what is given back was written by the model for a call of this id, name and arguments; a call that a client
changed is unknown.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

TOOL_CALL_OPEN = "<|tool_call>"
TOOL_CALL_CLOSE = "<tool_call|>"
Key = tuple[str, str, str]
Piece = tuple[str, bool]  # of a rendered prompt: text, or the name of a control token
MOST_IDS = 1_000_000  # token ids kept in all


class CallSpans:
    """Watches one reply for ids between a pair of call markers that come to exactly one call."""

    def __init__(self, open_id: int | None, close_id: int | None) -> None:
        """Ids of the two markers; None for a tokenizer that has none."""
        self.found: dict[int, tuple[int, ...]] = {}  # by number of the call in its reply
        self._open_id, self._close_id = open_id, close_id
        self._span: list[int] | None = None
        self._calls = 0

    def push(self, token_id: int, calls: int) -> None:
        """The next id of the reply, and how many calls it has come to with it."""
        if token_id == self._open_id:
            self._span = []
        elif self._span is not None and token_id != self._close_id:
            self._span.append(token_id)
        elif self._span is not None:
            if calls == self._calls + 1:
                self.found[self._calls] = tuple(self._span)
            self._span = None
        self._calls = calls

    def push_texts(self, token_ids: Sequence[int]) -> None:
        """The next ids, none of them a control token's: no call begins or ends in them."""
        if self._span is not None:
            self._span.extend(token_ids)


class CallMemory:
    """The last calls of all replies. May be used from several threads."""

    def __init__(self, most_ids: int = MOST_IDS) -> None:
        self._most_ids = most_ids
        self._kept: OrderedDict[Key, tuple[int, ...]] = OrderedDict()  # the one used last comes last
        self._ids = 0
        self._lock = Lock()

    def remember(self, call_id: str, name: str, arguments: str, ids: tuple[int, ...]) -> None:
        """Keep what the model wrote for a call; `arguments` is JSON text of an object."""
        key = (call_id, name, _canonical(json.loads(arguments)))
        with self._lock:
            self._ids += len(ids) - len(self._kept.pop(key, ()))
            self._kept[key] = ids
            while self._ids > self._most_ids:
                _, dropped = self._kept.popitem(last=False)
                self._ids -= len(dropped)

    def recall(self, messages: Iterable[Mapping[str, Any]]) -> list[tuple[int, ...] | None]:
        """What the model wrote for each call in these messages, in their order; None where that is not known."""
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        return [self._recall(call) for call in calls]

    def _recall(self, call: Mapping[str, Any]) -> tuple[int, ...] | None:
        function = call["function"]
        key = (str(call.get("id", "")), str(function["name"]), _canonical(function["arguments"]))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)


@dataclass(frozen=True)
class Written:
    """Ids that stand in a prompt as they are."""

    ids: tuple[int, ...]


def with_written_calls(pieces: Sequence[Piece], calls: Sequence[tuple[int, ...] | None]) -> Iterator[Piece | Written]:
    """The pieces, and between call markers what the model wrote there, where that is known."""
    opened = sum(piece == (TOOL_CALL_OPEN, True) for piece in pieces)
    left = iter(calls if opened == len(calls) else ())
    written: tuple[int, ...] | None = None
    for piece in pieces:
        if piece == (TOOL_CALL_CLOSE, True):
            written = None
        if written is None:
            yield piece
        if piece == (TOOL_CALL_OPEN, True) and (written := next(left, None)) is not None:
            yield Written(written)


def _canonical(arguments: Any) -> str:
    return json.dumps(arguments, sort_keys=True)
