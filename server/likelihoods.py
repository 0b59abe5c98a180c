"""Which tokens the shown content is made of, with their log-probabilities.

The parser and the stop strings decide what of a reply is content, later than the tokens come and knowing nothing of
them. So tokens wait here until text has come out, and are matched to it by counting characters from its end. Knows
tokens and characters, no markers and no wire format.

Invariant: the tokens given out cover the content shown, each character by one token, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine import TokenLogprobs
from server.detokenizer import Marker
from server.exchange import ContentToken, Likelihood
from server.prompt import PromptRenderer


@dataclass
class _Waiting:
    """A token that has come, and the characters it brought (those of a byte token come with the last byte)."""

    token_id: int
    found: TokenLogprobs
    characters: int


class Likelihoods:
    """The tokens of one choice."""

    def __init__(self, prompts: PromptRenderer) -> None:
        self._prompts = prompts
        self._parsed: list[_Waiting] = []  # came, but their text is not content yet, and may never be
        self._content: deque[ContentToken] = deque()  # content, but not shown yet
        self._characters = 0  # of content so far, shown or held back
        self._shown = 0

    def push(self, token_id: int, found: TokenLogprobs, pieces: Sequence[str | Marker]) -> None:
        """A token and what it became."""
        if any(isinstance(piece, Marker) for piece in pieces):
            if any(isinstance(piece, str) for piece in pieces) and self._parsed:  # an unfinished character before it
                self._parsed[-1].characters += sum(len(piece) for piece in pieces if isinstance(piece, str))
            return
        self._parsed.append(_Waiting(token_id, found, sum(len(piece) for piece in pieces if isinstance(piece, str))))

    def finish(self, pieces: Sequence[str]) -> None:
        """What an unfinished character at the end became."""
        if self._parsed:
            self._parsed[-1].characters += sum(map(len, pieces))

    def parsed(self, characters: int) -> None:
        """So many characters of content came out of the parser: the last tokens that came wrote them."""
        if not characters:
            return
        begin, covered = len(self._parsed), 0
        while begin and covered < characters:
            begin -= 1
            covered += self._parsed[begin].characters
        while begin and not self._parsed[begin - 1].characters:  # the first bytes of a character
            begin -= 1
        offset = self._characters
        for waiting in self._parsed[begin:]:
            self._content.append(self._token(waiting, offset))
            offset = min(offset + waiting.characters, self._characters + characters)
        self._characters += characters
        self._parsed.clear()

    def take(self, characters: int) -> tuple[ContentToken, ...]:
        """So many more characters of content are shown: the tokens that begin in them."""
        self._shown += characters
        taken = []
        while self._content and self._content[0].offset < self._shown:
            taken.append(self._content.popleft())
        return tuple(taken)

    def _token(self, waiting: _Waiting, offset: int) -> ContentToken:
        top = tuple(self._likelihood(token_id, logprob) for token_id, logprob in waiting.found.top)
        return ContentToken(self._likelihood(waiting.token_id, waiting.found.logprob), top, offset)

    def _likelihood(self, token_id: int, logprob: float) -> Likelihood:
        text, spelled = self._prompts.spelling(token_id)
        return Likelihood(text, None if spelled is None else tuple(spelled), logprob)
