"""What a task's reply is held to: the constraint of one reply, or none.

Joins the grammar of a reply with the compiler and puts refusals into words. Blocks while a grammar is compiled.
Invariant: a refusal is a 400 that names the field and what of it is not supported.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine import Constraint
from server.automaton import BadGrammar, GrammarCompiler
from server.errors import ApiError, invalid
from server.exchange import ChatTask
from server.grammar import reply_grammar
from server.prompt import OpensIn, PromptRenderer


class Structures:
    """Makes the constraints of one model's replies. Safe to use from several threads."""

    def __init__(self, prompts: PromptRenderer, *, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._compiler = GrammarCompiler(prompts, vocab_size=vocab_size, eos_ids=eos_ids)
        self._control_ids = prompts.control.ids

    def constraint(self, task: ChatTask, opens_in: OpensIn) -> Constraint | None:
        """A fresh constraint for a reply to a task, None if anything goes. Raises ApiError (400)."""
        try:
            grammar = reply_grammar(task, opens_in, self._control_ids)
            return None if grammar is None else self._compiler.automaton(grammar)
        except BadGrammar as error:
            raise _refusal(task, error) from error


def _refusal(task: ChatTask, error: BadGrammar) -> ApiError:
    param = task.structure.param if task.structure is not None and not task.must_call else "tools"
    return invalid(f"{param}: {error}", param=param, code="unsupported_value")
