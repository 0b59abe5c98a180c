"""Ids of a reply to text and markers.

Knows a tokenizer's ids and how control and byte tokens are spelled; no template, no reply. Every canvas of every reply
comes through here, token by token, so a token is looked up in the tokenizer once and never again.
Invariant: the pieces together are the same however the ids were grouped, and no piece cuts a character in two.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

NEVER_TEXT = re.compile(r"<unused\d+>")  # reserved ids; noise may hit them, a reply must not show them
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Marker:
    """A control token in the reply, by its name. Never shown to a client."""

    name: str


# What a token stands for: text, a control token, one byte, or nothing at all.
Spelling = str | Marker | int | None


class Spellings(dict[int, Spelling]):
    """What the tokens of one tokenizer stand for, found out as they come. May be read from several threads."""

    def __init__(self, tokenizer: Tokenizer, control: Mapping[int, str]) -> None:
        """`control`: the names of the control tokens."""
        super().__init__()
        self._tokenizer, self._control = tokenizer, control

    def __missing__(self, token_id: int) -> Spelling:
        name = self._tokenizer.id_to_token(token_id)
        if name is None:  # the model's vocabulary may be padded beyond the tokenizer's; not kept, for there is no end
            return None
        found: Spelling
        if token_id in self._control:
            found = Marker(self._control[token_id])
        elif NEVER_TEXT.fullmatch(name):
            found = Marker(name)
        elif byte := _BYTE_TOKEN.fullmatch(name):
            found = int(byte[1], 16)
        else:
            found = self._tokenizer.decode([token_id], skip_special_tokens=False)
        self[token_id] = found
        return found


class Detokenizer:
    """Ids of one reply to text, one at a time, without ever cutting a character in two.

    Text that is spelled in byte tokens appears when its last byte has come, also across canvases.
    """

    def __init__(self, spellings: Spellings) -> None:
        self._spellings = spellings
        self._bytes: codecs.IncrementalDecoder | None = None  # while bytes may still be on their way

    def push(self, token_id: int) -> list[str | Marker]:
        """What this token adds: text pieces (never empty) and markers, in order."""
        found = self._spellings[token_id]
        if found is None:
            return []
        if isinstance(found, int):
            self._bytes = self._bytes or codecs.getincrementaldecoder("utf-8")(errors="replace")
            text = self._bytes.decode(bytes([found]))
            return [text] if text else []
        pieces: list[str | Marker] = list(self.finish())
        if found:
            pieces.append(found)
        return pieces

    def texts(self, token_ids: Sequence[int], start: int) -> list[str]:
        """What the tokens from `start` on add, as far as each of them is a text by itself: a piece a token."""
        if self._bytes is not None:
            return []
        spellings, found = self._spellings, []
        for place in range(start, len(token_ids)):
            text = spellings[token_ids[place]]
            if not text or not isinstance(text, str):
                break
            found.append(text)
        return found

    def finish(self) -> list[str]:
        """What an unfinished character at the end comes to: the replacement character."""
        if self._bytes is None:
            return []
        text, self._bytes = self._bytes.decode(b"", final=True), None
        return [text] if text else []
