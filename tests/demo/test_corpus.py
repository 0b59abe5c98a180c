"""The demo corpus: what it draws it also accepts, spoilt replies it refuses, and its splits share no content."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from engine.demo import corpus, grammar
from engine.demo.evaluate import HERE
from engine.demo.tokenizer import render

PINNED = (
    "What is 17 + 25?",
    "What is 51 - 8?",
    "What is the capital of France?",
    "Sort these words alphabetically: pear, apple, fig.",
    "Reverse the order of these words: red, green, blue.",
    "Extract the name and age as JSON: Ana is 31 years old.",
)


@pytest.mark.parametrize("family", corpus.FAMILIES)
def test_every_drawn_reply_is_right_and_a_spoilt_one_is_not(family: str) -> None:
    for number in range(200):
        example = corpus.example("test", number, family=family)
        assert example.right(example.reply)
        end = "<turn|>" if example.reply.endswith("<turn|>") else "<|tool_response>"
        body = example.reply.removesuffix(end)
        assert not example.right(body), "a reply must be closed"
        assert not example.right(body[:-1] + "#" + end)
        assert not example.right("#" + body + end)


def test_a_story_must_keep_its_names_and_its_events() -> None:
    state = {"name": "Mia", "animal": "fox", "a_animal": "a fox"}
    for seed in range(50):
        text = grammar.draw(grammar.STORY, state, seed, random.Random(seed))
        assert grammar.accepts(grammar.STORY, state, text)
        assert not grammar.accepts(grammar.STORY, {**state, "name": "Ben"}, text)
        assert not grammar.accepts(grammar.STORY, {**state, "animal": "owl", "a_animal": "an owl"}, text)
        sentences = text.split(". ")
        assert not grammar.accepts(grammar.STORY, state, ". ".join(sentences[:3] + sentences[4:]))


def test_stories_differ() -> None:
    state = {"name": "Mia", "animal": "fox", "a_animal": "a fox"}
    assert len({grammar.draw(grammar.STORY, state, 0, random.Random(seed)) for seed in range(100)}) == 100


def test_training_never_sees_what_is_tested() -> None:
    for family in ("add", "sub", "sort", "reverse", "json", "story"):
        questions = [
            {str(corpus.example(split, number, family=family).messages[-1]["content"]) for number in range(400)}
            for split in ("train", "test")
        ]
        assert not questions[0] & questions[1]


def test_pinned_phrasings_are_among_the_drawn() -> None:
    """By form: with the operands, words and names of the pinned questions replaced by those drawn."""
    openings = {
        str(corpus.example("train", number, family=family).messages[-1]["content"])[:14]
        for family in ("add", "sub", "capital", "sort", "reverse", "json")
        for number in range(300)
    }
    for question in PINNED:
        start = question[:14] if not question[8:10].isdecimal() else question[:8]
        assert any(opening.startswith(start) for opening in openings), question


@pytest.mark.parametrize("family", corpus.FAMILIES)
def test_the_tokenizer_loses_nothing(family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    for number in range(20):
        example = corpus.example("test", number, family=family)
        text = render(example) + example.reply
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_a_reply_that_the_client_begins_goes_on_where_it_stops() -> None:
    begun = 0
    for index in range(400):
        example = corpus.example("train", index, family="capital")
        assert example.right(example.reply)
        if example.prefill:
            begun += 1
            assert (example.prefill + example.reply).startswith("The capital of ")
        assert not corpus.example("test", index, family="capital").prefill
    assert 5 <= begun <= 40
