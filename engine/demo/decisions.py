"""Decisions with known odds: a bag of balls, guests and their opinions, and things that are certain.

The wording around them is the server's own (`server/dialects/decisions.py`; a test holds the two together). The answer
that training sees is drawn with the odds, so a model that learned the task says what they are. Knows texts, no tokens.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_uppercase

from engine.demo import words as W

PREFILL = "<|channel>thought\n<channel|>"  # no thought, said before the canvas: the published model wants it there
TOTAL = 10  # balls in a bag, guests at a table: odds are tenths
_NOUNS = (("bag", "balls", "ball"), ("box", "beads", "bead"))
_LEVELS = ("bad", "fair", "good")


@dataclass(frozen=True)
class Question:
    """One question as a client asks it, with the probability of each option."""

    instructions: str
    options: tuple[str, ...]
    odds: tuple[float, ...]


@dataclass(frozen=True)
class Decision:
    """What is asked about, and the questions. `key` is the content that decides train or test."""

    input: str
    questions: tuple[Question, ...]
    key: tuple[object, ...]

    @property
    def text(self) -> str:
        """The user's message."""
        several = len(self.questions) > 1
        asked = []
        for number, question in enumerate(self.questions, 1):
            head = f"Question {number}" if several else "Question"
            options = (f"{letter}: {option}" for letter, option in zip(ascii_uppercase, question.options, strict=False))
            asked.append("\n".join((f"{head}: {question.instructions}", *options)))
        how = (
            "Answer every question with the letter of one option only, one line each: its number, a colon, the letter."
            if several
            else "Answer with the letter of one option only."
        )
        return "\n\n".join((self.input, *asked)) + "\n" + how

    def reply(self, answers: tuple[int, ...]) -> str:
        """The reply that gives these options."""
        letters = [ascii_uppercase[answer] for answer in answers]
        if len(letters) == 1:
            return letters[0]
        return "\n".join(f"{number}: {letter}" for number, letter in enumerate(letters, 1))

    def replies(self, r: random.Random) -> tuple[str, ...]:
        """All replies that may be given, the first drawn with the odds."""
        drawn = tuple(r.choices(range(len(question.odds)), question.odds)[0] for question in self.questions)
        possible = itertools.product(
            *([index for index, odds in enumerate(question.odds) if odds] for question in self.questions)
        )
        return tuple(dict.fromkeys((self.reply(drawn), *map(self.reply, possible))))


def _predicate(instructions: str, odds: float) -> Question:
    return Question(instructions, ("false", "true"), (1 - odds, odds))


def _shares(r: random.Random, parts: int) -> list[int]:
    cuts = sorted(r.randrange(TOTAL + 1) for _ in range(parts - 1))
    return [high - low for low, high in zip((0, *cuts), (*cuts, TOTAL), strict=True)]


def _bag(r: random.Random) -> Decision:
    where, many, one = r.choice(_NOUNS)
    parts = r.choice((2, 2, 3))
    *colours, absent = r.sample(W.COLOURS, parts + 1)
    counts = _shares(r, parts)
    told = [f"{count} {colour}" for count, colour in zip(counts, colours, strict=True)]
    text = f"A {where} holds {', '.join(told[:-1])} and {told[-1]} {many}. One {one} is drawn."
    odds = dict(zip(colours, (count / TOTAL for count in counts), strict=True)) | {absent: 0.0}

    def predicate() -> Question:
        colour = absent if r.random() < 1 / 6 else r.choice(colours)
        return _predicate(f"The {one} is {colour}.", odds[colour])

    def choice() -> Question:
        offered = [*colours, absent] if r.random() < 0.3 else list(colours)
        r.shuffle(offered)
        options = tuple(json.dumps(colour) for colour in offered)
        return Question(f"Which colour is the {one}?", options, tuple(odds[colour] for colour in offered))

    return Decision(text, _some(r, (predicate, choice)), ("decide", *sorted(zip(colours, counts, strict=True))))


def _guests(r: random.Random) -> Decision:
    counts = _shares(r, 3)
    odds = tuple(count / TOTAL for count in counts)
    text = (
        f"Of {TOTAL} guests {counts[0]} found the food bad, {counts[1]} fair and {counts[2]} good. One guest is asked."
    )

    def score() -> Question:
        return Question("How does the guest find the food?", _LEVELS, odds)

    def predicate() -> Question:
        level = r.randrange(3)
        return _predicate(f"The guest finds the food {_LEVELS[level]}.", odds[level])

    return Decision(text, _some(r, (score, predicate)), ("decide", "guests", *counts))


def _certain(r: random.Random) -> Decision:
    right = r.random() < 0.5
    if r.random() < 0.5:
        name, age = r.choice(W.NAMES), r.randrange(1, 100)
        other = age if right else r.choice([each for each in range(1, 100) if each != age])
        question = _predicate(f"{name} is {other} years old.", float(right))
        return Decision(f"{name} is {age} years old.", (question,), ("decide", name, age))
    a, b = r.randrange(100), r.randrange(100)
    told = a + b if right else a + b + r.choice((-10, -2, -1, 1, 2, 10))
    return Decision(f"{a} + {b} = {told}.", (_predicate("The sum is right.", float(right)),), ("add", a, b))


def _some(r: random.Random, kinds: tuple[Callable[[], Question], ...]) -> tuple[Question, ...]:
    """One question, or in a third of the cases two or three."""
    count = r.choice((1, 1, 1, 1, 2, 3))
    return tuple(r.choice(kinds)() for _ in range(count))


def draw(r: random.Random) -> Decision:
    """Any decision."""
    return r.choice((_bag, _bag, _guests, _certain))(r)
