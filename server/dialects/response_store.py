"""Finished responses, kept in memory so that the next one can go on from them.

Knows no wire format beyond "a document and the conversation up to its end". Nothing is written to disk, and nothing
outlives the process. Invariant: never more than `most` responses and about `most_characters` of text; the ones not
used for the longest time go first.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

MOST_RESPONSES = 1000
MOST_CHARACTERS = 64_000_000


@dataclass(frozen=True)
class Stored:
    """A finished response and the conversation it ended, in the form templates read."""

    response: Json
    messages: tuple[Json, ...]


class ResponseStore:
    """Responses by id. Used from one event loop only.

    `tag` goes into the ids, so that whoever stands before several servers sees which one keeps a response.
    """

    def __init__(self, most: int = MOST_RESPONSES, most_characters: int = MOST_CHARACTERS, *, tag: str = "") -> None:
        self.tag = tag
        self._most = most
        self._most_characters = most_characters
        self._kept: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._characters = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, response_id: str) -> Stored | None:
        """A response that is still kept."""
        if response_id not in self._kept:
            return None
        self._kept.move_to_end(response_id)
        return self._kept[response_id][0]

    def put(self, stored: Stored) -> None:
        """Keep a response, at the cost of old ones."""
        size = len(json.dumps([stored.response, stored.messages], ensure_ascii=False))
        self._kept[stored.response["id"]] = stored, size
        self._characters += size
        while self._kept and (len(self._kept) > self._most or self._characters > self._most_characters):
            _, (_, freed) = self._kept.popitem(last=False)
            self._characters -= freed

    def delete(self, response_id: str) -> bool:
        """Forget a response; False if it was not there."""
        entry = self._kept.pop(response_id, None)
        self._characters -= entry[1] if entry else 0
        return entry is not None
