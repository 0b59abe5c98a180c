"""Raw text without turns, for infill: sentences in which one part follows from the others, and stories.

Knows texts, no tokens. Invariant: a gap can be filled in one way only, given the rest of its sentence.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from engine.demo import grammar
from engine.demo import words as W
from engine.demo.toolbox import person

Allowed = Callable[[tuple[object, ...]], bool]


@dataclass(frozen=True)
class Sentence:
    """A sentence as parts; those at `gaps` follow from the others. `key` decides train or test; None: in both."""

    parts: tuple[str, ...]
    gaps: tuple[int, ...]
    key: tuple[object, ...] | None

    @property
    def text(self) -> str:
        return "".join(self.parts)


def _sum(r: random.Random) -> Sentence:
    a, b = r.randrange(100), r.randrange(100)
    return Sentence((f"{a}", " + ", f"{b}", " = ", f"{a + b}", "."), (0, 2, 4), ("add", a, b))


def _difference(r: random.Random) -> Sentence:
    b, a = sorted((r.randrange(100), r.randrange(100)))
    return Sentence((f"{a}", " - ", f"{b}", " = ", f"{a - b}", "."), (0, 2, 4), ("sub", a, b))


def _capital(r: random.Random) -> Sentence:
    country = r.choice(tuple(W.CAPITALS))
    return Sentence(("The capital of ", country, " is ", W.CAPITALS[country], "."), (1, 3), None)


def _data(r: random.Random) -> Sentence:
    name, age = person(r), r.randrange(1, 100)
    quoted = json.dumps(name)
    parts = (name, " is ", f"{age}", ' years old. {"name": ', quoted, ', "age": ', f"{age}", "}")
    return Sentence(parts, (0, 2, 4, 6), ("json", name, age))


def _backwards(r: random.Random) -> Sentence:
    words = r.sample(W.WORDS, r.choice((3, 4)))
    parts: list[str] = []
    for word in words:
        parts += [word, ", "]
    parts[-1] = " backwards is "
    for word in reversed(words):
        parts += [word, ", "]
    parts[-1] = "."
    return Sentence(tuple(parts), tuple(range(0, len(parts), 2)), ("reverse", *words))


def _favourite(r: random.Random) -> Sentence:
    pools = {"colour": W.COLOURS, "animal": W.ANIMALS, "city": W.CITIES, "food": W.FOODS}
    kind = r.choice(tuple(pools))
    value = r.choice(pools[kind])
    parts = ("My favourite ", kind, " is ", value, ", so if you ask for my favourite ", kind, ", it is ", value, ".")
    return Sentence(parts, (1, 3, 5, 7), ("memory", kind, value))


_KINDS = (_sum, _sum, _difference, _capital, _capital, _data, _backwards, _favourite)


def _sentence(r: random.Random, allowed: Allowed) -> Sentence:
    while True:
        sentence = r.choice(_KINDS)(r)
        if sentence.key is None or allowed(sentence.key):
            return sentence


def document(r: random.Random, allowed: Allowed) -> tuple[str, str]:
    """A text in two parts, cut anywhere, often where a gap begins; `allowed`: whether content belongs to the split."""
    cuts = [0]
    if r.random() < 0.1:
        while True:
            name, animal = person(r), r.choice(W.ANIMALS)
            if allowed(("story", name, animal)):
                break
        state = {"name": name, "animal": animal, "a_animal": grammar.article(animal)}
        text = grammar.draw(grammar.STORY, state, r.randrange(5), r)
    else:
        sentences = [_sentence(r, allowed) for _ in range(r.choice((1, 1, 2, 2, 3, 4)))]
        text = " ".join(each.text for each in sentences)
        starts = itertools.accumulate((len(each.text) + 1 for each in sentences), initial=0)
        cuts = [
            start + len("".join(each.parts[:gap]))
            for start, each in zip(starts, sentences, strict=False)
            for gap in each.gaps
        ]
    spaces = [place for place, character in enumerate(text) if character == " "]
    cut = r.choice((0, r.choice(spaces), r.randrange(len(text)), r.choice(cuts), r.choice(cuts)))
    return text[:cut], text[cut:]


def infill(r: random.Random, allowed: Allowed) -> tuple[str, str, str]:
    """A text with a gap in one sentence: what stands before it, in it and behind it."""
    sentences = [_sentence(r, allowed) for _ in range(r.choice((1, 1, 2)))]
    place = r.randrange(len(sentences))
    parts = sentences[place].parts
    gap = r.choice(sentences[place].gaps)
    before = [*(each.text for each in sentences[:place]), "".join(parts[:gap])]
    after = ["".join(parts[gap + 1 :]), *(each.text for each in sentences[place + 1 :])]
    return " ".join(before), parts[gap], " ".join(after)
