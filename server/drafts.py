"""Drafts of canvases from ids to text.

Knows the tokenizer, no wire format. Invariant: every id is spelled once, for after each step a whole canvas of them
is to be shown.
"""

from __future__ import annotations

from engine import CanvasDraft
from server.exchange import Draft
from server.prompt import PromptRenderer


class Drafts:
    """Spells the drafts of all replies. For one thread."""

    def __init__(self, prompts: PromptRenderer) -> None:
        self._prompts = prompts
        self._texts: dict[int, str | None] = {}  # as many as the vocabulary has, at most

    def draft(self, choice: int, event: CanvasDraft) -> Draft:
        """The engine's draft as text."""
        return Draft(
            choice=choice,
            canvas=event.index,
            step=event.step,
            tokens=tuple(map(self._text, event.token_ids)),
            entropy=event.entropy,
            accepted=event.accepted,
        )

    def _text(self, token_id: int) -> str | None:
        if token_id not in self._texts:
            text, spelled = self._prompts.spelling(token_id)
            self._texts[token_id] = None if spelled is None else text
        return self._texts[token_id]
