"""The reply as it comes out of the detokenizer, sorted into reasoning, content and tool calls.

A push parser: one text piece or marker at a time, so a thought or a call may cross any number of canvases. Knows
Gemma's channel and call markers and where models forget to write them, not tokens, wire formats or JSON.
Invariants: what comes out does not depend on how the input was cut; a marker never comes out as text; what cannot be
read as a call comes out as the text it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from server.call_memory import TOOL_CALL_CLOSE, TOOL_CALL_OPEN
from server.detokenizer import Marker
from server.prompt import (
    CHANNEL_CLOSE,
    CHANNEL_OPEN,
    TURN_OPEN,
    OpensIn,
)
from server.tool_calls import QUOTE, QUOTE_SIGN, ParsedCall, parse_calls, parse_leading_calls, shown
from server.tool_schema import Json

# After these the model's turn is over. The engine stops at them; text behind one in the same canvas is noise.
_ENDS_TURN = frozenset({"<turn|>", TURN_OPEN, "<eos>", "<bos>", "<|tool_response>"})
_STEADY = frozenset({"content", "reasoning", "call", "bare", "ended"})  # states that no text leads out of
_LABEL = "thought\n"  # first line of a thought channel


@dataclass
class Parsed:
    """What a stretch of the reply came to."""

    reasoning: str = ""
    content: str = ""
    calls: list[ParsedCall] = field(default_factory=list)

    def __add__(self, after: Parsed) -> Parsed:
        return Parsed(self.reasoning + after.reasoning, self.content + after.content, self.calls + after.calls)


class OutputParser:
    """Parser state of one reply.

    `tools` are the declared argument schemas by name; None: the client expects no call, so one is shown as plain
    text. `raw`: no chat, so nothing but content is told apart. `exact`: the reply is written under a grammar, so a
    thought or a call is one with its markers only.
    """

    def __init__(
        self,
        opens_in: OpensIn = "content",
        *,
        tools: Mapping[str, Json] | None = None,
        raw: bool = False,
        exact: bool = False,
    ) -> None:
        # "opening": content of which nothing has been shown yet; it may turn out to be a call without its marker.
        # "bare": such a call. It has no closing marker either, so what follows it waits for the next one.
        self._state: Literal["opening", "content", "channel", "reasoning", "call", "bare", "ended"]
        self._state = "content" if raw else "opening" if opens_in == "content" else opens_in
        self._tools = tools
        self._raw = raw
        self._exact = exact
        declared = () if tools is None or exact else tools
        self._heads = tuple(f"call:{name}{bracket}" for name in declared for bracket in "{(")
        self._first = (
            opens_in == "content" and not exact
        )  # the reply's first text: the marker before a thought may be missing
        self._after_call = False
        self._held = ""  # text that may still turn out to be something else
        self._call: list[str] = []  # text of the open call, the quote token as QUOTE_SIGN
        self._out = Parsed()
        self.reasoning_tokens = 0
        self.calls = 0  # found so far

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

    def push_texts(self, texts: Sequence[str]) -> None:
        """Take the texts of as many tokens; the same as `push` for each, but quicker."""
        for place, text in enumerate(texts):
            if self._state in _STEADY:
                self._text("".join(texts[place:]))
                self.reasoning_tokens += self._thinking * (len(texts) - place)
                return
            self.push((text,))

    def take(self) -> Parsed:
        """What has become certain since the last call."""
        out, self._out = self._out, Parsed()
        return out

    def finish(self, *, complete: bool = True) -> Parsed:
        """The reply is over: give out what was held back.

        `complete`: the model ended it, so a call that is open lacks its closing marker only. Otherwise the reply was
        cut, and what there is of a call is text: half a call must not be made.
        """
        if self._state == "reasoning":
            self._out.reasoning += self._held
        elif self._state == "opening":
            self._close_opening()
        elif self._state in ("call", "bare"):
            self._close_call(complete=complete)
        self._held = ""
        return self.take()

    @property
    def _thinking(self) -> bool:
        return self._state in ("channel", "reasoning")

    def _text(self, text: str) -> None:
        if self._state == "content":
            self._out.content += text
        elif self._state == "opening":
            self._opening(self._held + text)
        elif self._state in ("call", "bare"):
            self._call.append(text)
        elif self._state == "channel":
            self._label(self._held + text)
        elif self._state == "reasoning":
            # The newline before the closing marker belongs to the marker.
            text = self._held + text
            shown_now = text.removesuffix("\n")
            self._out.reasoning += shown_now
            self._held = text[len(shown_now) :]

    def _opening(self, text: str) -> None:
        """The beginning of content, kept until it is certain what it is the beginning of."""
        self._held = text
        start = text.lstrip()
        if self._first and text.startswith(_LABEL):
            self._held, self._state = "", "channel"
            self._text(text)
        elif any(start.startswith(head) for head in self._heads):
            self._held, self._state, self._call = "", "bare", [start]
        elif (start or not (self._heads or self._after_call)) and not self._may_become(text, start):
            self._close_opening()

    def _may_become(self, text: str, start: str) -> bool:
        thought = self._first and _LABEL.startswith(text)
        return thought or any(head.startswith(start) for head in self._heads)

    def _close_opening(self) -> None:
        # White space that stands between two calls, or after the last, is no content.
        if self._held.strip() or not self._after_call:
            self._out.content += self._held
        self._held = ""
        self._enter_content("content")

    def _enter_content(self, state: Literal["opening", "content"]) -> None:
        self._state = state
        self._first = False

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
        if self._raw:
            self._state = "ended" if name in _ENDS_TURN else self._state
        elif self._state in ("call", "bare"):
            self._marker_in_call(name)
        elif name == CHANNEL_OPEN and not self._thinking:
            self._leave()
            self._state = "channel"
        elif name == CHANNEL_CLOSE and self._thinking:
            self._leave()
        elif name == TOOL_CALL_OPEN:
            self._leave()
            self._state = "call"
        elif name in _ENDS_TURN:
            self._leave()
            self._state = "ended"
        # Anything else (a second opener, a closer without opener, an image or pad token) is noise.

    def _leave(self) -> None:
        """Leave a thought or content for what a marker announces."""
        if self._state == "opening":
            self._close_opening()
        elif self._state == "channel" and self._held != _LABEL.rstrip():
            self._out.reasoning += self._held
        self._held = ""
        self._after_call = False
        self._enter_content("opening")

    def _marker_in_call(self, name: str) -> None:
        if name == QUOTE:
            self._call.append(QUOTE_SIGN)
        elif name == TOOL_CALL_CLOSE:
            self._close_call(complete=True)
        elif name == TOOL_CALL_OPEN or name in _ENDS_TURN:  # the closer went missing
            self._close_call(complete=True)
            self._marker(name)

    def _close_call(self, *, complete: bool) -> None:
        text, bare = "".join(self._call), self._state == "bare"
        self._call = []
        calls: list[ParsedCall] = []
        rest = text
        if complete and self._tools is not None:
            if bare:
                calls, rest = parse_leading_calls(text, self._tools)
            else:
                calls = parse_calls(text, self._tools, exact=self._exact)
                rest = "" if calls else text
        self._out.calls += calls
        self.calls += len(calls)
        # Never invented arguments: what cannot be read as a call is shown as it was written.
        self._out.content += shown(rest)
        self._after_call = bool(calls)
        self._enter_content("opening" if calls and not rest else "content")


class StopStrings:
    """Finds the stop strings in content, also across canvas edges, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None  # the stop string that was found

    @property
    def hit(self) -> bool:
        """True once a stop string was found."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """The part of the text so far that is certainly shown. After a hit nothing more is."""
        if self.hit or not text:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)  # the string completed first; ties: the one that began first
            self._held = ""
            return text[:start]
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
