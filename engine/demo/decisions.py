"""Decisions with known odds: beads in a box, guests and their opinions, days of rain.

The wording around them is the server's own (`server/dialects/decisions.py`; a test holds the two together). The answer
that training sees is drawn with the odds, so a model that learned the task says what they are. Knows texts, no tokens.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from string import ascii_uppercase

from engine.demo import words as W

PREFILL = "<|channel>thought\n<channel|>"  # no thought, said before the canvas: the published model wants it there
TOTAL = 10  # beads in a box, guests at a table, days: odds are tenths
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


def _which(r: random.Random) -> tuple[str, ...]:
    """What the questions are about: one thing, or in a third of the cases two or three, none knowing of the others."""
    count = r.choice((1, 1, 1, 1, 2, 3))
    return ("next",) if count == 1 else ("first", "second", "third")[:count]


def _box(r: random.Random) -> Decision:
    colours = r.sample(W.COLOURS, r.choice((2, 2, 3)))
    counts = _shares(r, len(colours))
    told = [f"{count} {colour}" for count, colour in zip(counts, colours, strict=True)]
    text = f"A box holds {', '.join(told[:-1])} and {told[-1]} beads. Each bead drawn is put back."
    options = tuple(json.dumps(colour) for colour in colours)
    odds = tuple(count / TOTAL for count in counts)
    questions = tuple(Question(f"Which colour is the {which} bead?", options, odds) for which in _which(r))
    return Decision(text, questions, ("decide", *zip(colours, counts, strict=True)))


def _guests(r: random.Random) -> Decision:
    counts = _shares(r, 3)
    text = f"Of {TOTAL} guests {counts[0]} found the food bad, {counts[1]} fair and {counts[2]} good."
    odds = tuple(count / TOTAL for count in counts)
    questions = tuple(Question(f"How does the {which} guest find the food?", _LEVELS, odds) for which in _which(r))
    return Decision(text, questions, ("decide", "guests", *counts))


def _rain(r: random.Random) -> Decision:
    city, days = r.choice(W.CITIES), r.randrange(TOTAL + 1)
    text = f"In {city} it rains on {days} of {TOTAL} days."
    questions = tuple(_predicate(f"It rains on the {which} day.", days / TOTAL) for which in _which(r))
    return Decision(text, questions, ("decide", "rain", city, days))


def draw(r: random.Random) -> Decision:
    """Any decision."""
    return r.choice((_box, _guests, _rain))(r)
