"""A grammar and a tokenizer as an automaton over token ids: llguidance behind the engine's `Constraint`.

Knows llguidance and ids; what a grammar is made for is `grammar`'s business. Compiling runs on one thread of its own:
llguidance recurses as deep as a grammar's references go, which the stack of an ordinary thread does not hold.
Invariant: whatever text a client sends as a grammar, compiling is bounded and ends in an automaton or in BadGrammar.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine import ConstraintError
from server.detokenizer import NEVER_TEXT
from server.prompt import PromptRenderer

T = TypeVar("T")
Json = dict[str, Any]

MAX_GRAMMAR_CHARACTERS = 1_000_000
KEPT = 64  # compiled grammars
_STACK_BYTES = 512 * 2**20  # address space, not memory: only what is used is ever taken
_MESSAGE_CHARACTERS = 300
# llguidance's own, but for rows (an object of 1,000 properties that may all be left out takes one of 4,000 items) and
# states, of which each takes one or two kilobytes and a text does not see more than it has characters.
_LIMITS = LLParserLimits(max_items_in_row=8_000, max_lexer_states=50_000, verbose_errors=False)


class BadGrammar(Exception):
    """The grammar cannot be compiled. The message says why, in a line."""


class Closers:
    """The tokens that close something, as masks: bit i of a number for id i."""

    def __init__(self, names: Mapping[str, int]) -> None:
        self._quotes = _mask(names, r'"[\]},]*|<\|"\|>|<channel\|>')
        self._brackets = _mask(names, r"[\]}]+|<tool_call\|>")
        self._comma = _mask(names, ",")  # at least begins the next part
        self._in_text = _mask(names, r"[\]}]")

    def among(self, allowed: int) -> int:
        """Those of a mask that bring a reply nearer to its end; 0 if none do.

        Where any bracket is allowed all of them are text, of which only a quote is the end; elsewhere a quote begins.
        """
        if allowed & self._in_text == self._in_text:
            return allowed & self._quotes
        kinds = (allowed & kind for kind in (self._brackets, self._comma, self._quotes))
        return next(filter(None, kinds), 0)


class Automaton:
    """One reply's place in a grammar. Implements `engine.Constraint`."""

    def __init__(self, matcher: LLMatcher, ends: tuple[int, ...], closers: Closers) -> None:
        self._matcher = matcher
        self._ends = ends
        self._closers = closers

    def advance(self, token_ids: Sequence[int]) -> int:
        """Move on by ids as long as they are allowed; returns by how many."""
        ids = list(takewhile(lambda token_id: token_id not in self._ends, token_ids))
        taken = self._matcher.try_consume_tokens(ids) if ids else 0
        self._check()
        return taken

    def rollback(self, count: int) -> None:
        """Move back by so many of the ids it last moved on by."""
        if count:
            self._matcher.rollback(count)
            self._check()

    def forced(self) -> tuple[int, ...]:
        """Ids that must come next; none where there is a choice, or where the reply may end."""
        if self._matcher.is_accepting():
            return ()
        ids = self._matcher.compute_ff_tokens()
        self._check()
        return tuple(takewhile(lambda token_id: token_id not in self._ends, ids))

    def allowed(self) -> bytes:
        """Which ids may come next, eos ids included: one bit for each."""
        mask = bytearray(self._matcher.compute_bitmask())
        self._check()
        may_end = self._matcher.is_accepting()
        for token_id in self._ends:
            bit = 1 << token_id % 8
            mask[token_id // 8] = mask[token_id // 8] | bit if may_end else mask[token_id // 8] & ~bit
        if mask.count(0) == len(mask):
            raise ConstraintError("the grammar allows no token here: nothing the tokenizer has can go on")
        return bytes(mask)

    def closing(self) -> bytes:
        """Those of the allowed ids that close something; none may be."""
        allowed = self.allowed()
        return self._closers.among(int.from_bytes(allowed, "little")).to_bytes(len(allowed), "little")

    def ends(self) -> tuple[int, ...]:
        """The eos ids that may come next, the most natural one first."""
        return self._ends if self._matcher.is_accepting() else ()

    @property
    def must_end(self) -> bool:
        """True where the reply is complete and nothing may follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"the grammar became too complex to follow: {line(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the last ones. Safe to use from several threads.

    A large vocabulary takes seconds to take in, which nobody has to wait for who asks for no grammar.
    """

    def __init__(self, prompts: PromptRenderer, *, vocab_size: int, eos_ids: Iterable[int]) -> None:
        turn_end = prompts.control.ids.get("<turn|>")
        self._ends = tuple(sorted(eos_ids, key=lambda token_id: (token_id != turn_end, token_id)))
        self._vocabulary: Future[_Vocabulary] = Future()
        take_in = partial(_fulfil, self._vocabulary, partial(_Vocabulary, prompts, vocab_size, self._ends))
        threading.Thread(target=take_in, name="vocabulary", daemon=True).start()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def automaton(self, grammar: str) -> Automaton:
        """An automaton at the beginning of a grammar (llguidance's JSON form of one). Raises BadGrammar."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Automaton(matcher.deep_copy(), self._ends, self._vocabulary.result().closers)

    def _compile(self, grammar: str) -> LLMatcher:
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise BadGrammar(f"it comes to more than {MAX_GRAMMAR_CHARACTERS:,} characters")
        tokenizer = self._vocabulary.result().tokenizer

        def compiled() -> LLMatcher:
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
            if not matcher.is_error():
                matcher.compute_bitmask()  # the first mask is the slowest, and tells what the grammar itself does not
            return matcher

        result: Future[LLMatcher] = Future()
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=_fulfil, args=(result, compiled), name="grammar").start()
        finally:
            threading.stack_size(before)
        matcher = result.result()
        if matcher.is_error():
            raise BadGrammar(line(matcher.get_error()))
        return matcher


def _fulfil(future: Future[T], make: Callable[[], T]) -> None:
    try:
        future.set_result(make())
    except Exception as error:
        future.set_exception(error)


class _Vocabulary:
    """A model's tokens, as an automaton needs them."""

    def __init__(self, prompts: PromptRenderer, size: int, ends: Sequence[int]) -> None:
        names = prompts.vocabulary()
        document = _with_specials(prompts.document(), names, prompts.control.names)
        self.tokenizer = LLTokenizer(document, n_vocab=size, eos_token=list(ends))
        self.closers = Closers(names)


def _with_specials(document: Json, names: Mapping[str, int], control: Container[int]) -> str:
    """A tokenizer as JSON in which every id that is never shown as text is marked special."""
    added = {entry["id"]: entry for entry in document["added_tokens"]}
    for name, token_id in names.items():
        if token_id in control or NEVER_TEXT.fullmatch(name):
            entry = {"id": token_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
            added[token_id] = {**added.get(token_id, entry), "normalized": False, "special": True}
    document["added_tokens"] = [added[token_id] for token_id in sorted(added)]
    return json.dumps(document)


def _mask(names: Mapping[str, int], pattern: str) -> int:
    """The ids of the tokens that are spelled as a regular expression says: bit i of a number for id i."""
    spelled = re.compile(pattern)
    ids = [token_id for name, token_id in names.items() if spelled.fullmatch(name)]
    mask = bytearray(max(ids, default=0) // 8 + 1)
    for token_id in ids:
        mask[token_id // 8] |= 1 << token_id % 8
    return int.from_bytes(mask, "little")


def line(message: str) -> str:
    """The part of a message of llguidance that is about the grammar, in one line."""
    if message.startswith("oneOf"):  # its advice is for whoever calls it
        return "'oneOf' is supported only where at most one branch can hold: by type, or by a required constant"
    lines = takewhile(lambda line: not line.startswith("<state>"), message.splitlines())
    return " ".join(" ".join(lines).split())[:_MESSAGE_CHARACTERS]
