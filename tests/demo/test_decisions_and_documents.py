"""The demo tasks whose odds are known, and the texts with gaps."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from engine.demo import corpus, decisions, documents


def test_the_odds_are_odds_and_the_drawn_answers_follow_them() -> None:
    expected: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    for index in range(2000):
        r = random.Random(index)
        decision = decisions.draw(r)
        replies = decision.replies(r)
        assert len(set(replies)) == len(replies)
        for question in decision.questions:
            assert sum(question.odds) == pytest.approx(1)
            assert len(question.odds) == len(question.options) >= 2
        if len(decision.questions) == 1:
            for letter, odds in zip("ABCD", decision.questions[0].odds, strict=False):
                expected[letter] += odds  # type: ignore[assignment]
            drawn[replies[0]] += 1
    assert all(abs(drawn[letter] - expected[letter]) < 60 for letter in "ABCD")


def test_a_decision_is_asked_bare() -> None:
    for index in range(50):
        example = corpus.example("train", index, family="decide")
        assert not example.thinking
        assert not example.tools
        assert [message["role"] for message in example.messages][-1] == "user"
        assert len(example.messages) <= 2, "a system text at most"
        assert example.right(example.reply)
        assert not example.right("Z<turn|>")


@pytest.mark.parametrize("split", ["train", "test"])
def test_documents_keep_to_their_split(split: str) -> None:
    sums = 0
    for index in range(200):
        example = corpus.example(split, index, family=corpus.DOCUMENT)
        assert example.right(example.reply)
        assert not example.right(example.reply.removesuffix("<eos>"))
        for a, b in re.findall(r"(\d+) \+ (\d+) =", (example.raw or "") + example.reply):
            sums += 1
            assert corpus.heldout("add", int(a), int(b)) == (split == "test")
    assert sums > 20


def test_a_gap_follows_from_its_sentence() -> None:
    for index in range(300):
        before, middle, after = documents.infill(random.Random(index), lambda key: True)
        text = before + middle + after
        if middle.isdigit() and "=" in text and len(text.split(". ")) == 1:
            left, right = text.rstrip(".").split(" = ")
            sign = " + " if " + " in left else " - "
            a, b = map(int, left.split(sign))
            assert int(right) == (a + b if sign == " + " else a - b)
