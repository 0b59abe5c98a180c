"""The reply as it comes out of the detokenizer, sorted into reasoning, content and tool calls.

A push parser: one text piece or marker at a time, so a thought or a call may cross any number of canvases. Knows
Gemma's channel and call markers, not tokens, wire formats or JSON. Invariants: what comes out does not depend on how
the input was cut; a marker never comes out as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from server.prompt import CHANNEL_CLOSE, CHANNEL_OPEN, TURN_OPEN, Marker, OpensIn
from server.tool_calls import QUOTE, ParsedCall, parse_call

TOOL_CALL_OPEN = "<|tool_call>"
TOOL_CALL_CLOSE = "<tool_call|>"
# After these the model's turn is over. The engine stops at them; text behind one in the same canvas is noise.
_ENDS_TURN = frozenset({"<turn|>", TURN_OPEN, "<eos>", "<bos>", "<|tool_response>"})
_LABEL = "thought\n"  # first line of a thought channel


@dataclass
class Parsed:
    """What a stretch of the reply came to."""

    reasoning: str = ""
    content: str = ""
    calls: list[ParsedCall] = field(default_factory=list)


class OutputParser:
    """Parser state of one reply. With `tools` off a call is shown as plain text, since the client expects none."""

    def __init__(self, opens_in: OpensIn = "content", *, tools: bool = True) -> None:
        self._state: Literal["content", "channel", "reasoning", "call", "ended"] = opens_in
        self._tools = tools
        self._held = ""  # reasoning or label text that may still turn out not to be shown
        self._call: list[str] = []  # symbols of the open call: characters and QUOTE
        self._out = Parsed()
        self.reasoning_tokens = 0

    @property
    def ended(self) -> bool:
        """True once the model closed its turn: nothing that follows counts."""
        return self._state == "ended"

    def push(self, pieces: Sequence[str | Marker]) -> None:
        """Take the pieces of one token."""
        thinking = self._thinking
        for piece in pieces:
            if isinstance(piece, Marker):
                self._marker(piece.name)
            else:
                self._text(piece)
        if thinking or self._thinking:  # both markers of a thought count
            self.reasoning_tokens += 1

    def take(self) -> Parsed:
        """What has become certain since the last call."""
        out, self._out = self._out, Parsed()
        return out

    def finish(self) -> Parsed:
        """The reply is over: give out what was held back, an unfinished call as text."""
        if self._state == "reasoning":
            self._out.reasoning += self._held
        elif self._state == "call":
            self._close_call(complete=False)
        self._held = ""
        return self.take()

    @property
    def _thinking(self) -> bool:
        return self._state in ("channel", "reasoning")

    def _text(self, text: str) -> None:
        if self._state == "content":
            self._out.content += text
        elif self._state == "call":
            self._call.extend(text)
        elif self._state == "channel":
            self._label(self._held + text)
        elif self._state == "reasoning":
            # The newline before the closing marker belongs to the marker.
            text = self._held + text
            shown = text.removesuffix("\n")
            self._out.reasoning += shown
            self._held = text[len(shown) :]

    def _label(self, text: str) -> None:
        if _LABEL.startswith(text) and text != _LABEL:
            self._held = text
            return
        self._held = ""
        self._state = "reasoning"
        self._text(text.removeprefix(_LABEL))

    def _marker(self, name: str) -> None:
        if self._state == "ended":
            return
        if self._state == "call":
            self._marker_in_call(name)
            return
        if name == CHANNEL_OPEN and not self._thinking:
            self._state = "channel"
        elif name == CHANNEL_CLOSE and self._thinking:
            self._close_thought()
        elif name == TOOL_CALL_OPEN:
            self._close_thought()
            self._state = "call"
        elif name in _ENDS_TURN:
            self._close_thought()
            self._state = "ended"
        # Anything else (a second opener, a closer without opener, an image or pad token) is noise.

    def _close_thought(self) -> None:
        if self._state == "channel" and self._held != _LABEL.rstrip():
            self._out.reasoning += self._held
        self._held = ""
        self._state = "content"

    def _marker_in_call(self, name: str) -> None:
        if name == QUOTE:
            self._call.append(QUOTE)
        elif name == TOOL_CALL_CLOSE:
            self._close_call(complete=True)
        elif name == TOOL_CALL_OPEN:  # the closer went missing
            self._close_call(complete=True)
            self._state = "call"
        elif name in _ENDS_TURN:
            self._close_call(complete=True)
            self._state = "ended"

    def _close_call(self, *, complete: bool) -> None:
        symbols, self._call, self._state = self._call, [], "content"
        call = parse_call(symbols) if complete and self._tools else None
        if call is not None:
            self._out.calls.append(call)
        else:
            # Never invented arguments: what cannot be read as a call is shown as it was written.
            self._out.content += "".join('"' if symbol == QUOTE else symbol for symbol in symbols)


class StopStrings:
    """Finds the stop strings in content, also across canvas edges, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certainly shown. After a hit nothing more is."""
        if self.hit or not text:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]]  # the string completed first; ties: the one that began first
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
