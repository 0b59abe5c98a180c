"""Texts with real choice in them, written once and used both ways: to draw a text and to judge one.

A text is a sequence of sentences, or of parts of one. Each is a function from what was said so far (`State`) to every
way it may go on, as (sentence, new state) pairs. Drawing picks one pair at each sentence; judging asks whether some
path through the same pairs spells the text. So what the judge accepts is exactly what the generator may write: names
kept, events consistent, grammar.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

State = dict[str, str]
T = TypeVar("T")
Sentence = Callable[[State], list[tuple[str, State]]]


def draw(sentences: Sequence[Sentence], state: State, style: int, rng: random.Random) -> str:
    """One text, its sentences joined by spaces. `style` follows from how the user asked and settles many wordings.

    What is left free are choices of equal length, counted in the demo tokenizer's tokens. A choice that shifts all
    that follows leaves no position certain, and a small model then takes 25 steps for a canvas, or never ends.
    """
    state = {**state, "style": str(style)}
    said = []
    for sentence in sentences:
        text, state = rng.choice(sentence(state))
        said.append(text)
    return " ".join(said)


def accepts(sentences: Sequence[Sentence], state: State, text: str) -> bool:
    """Whether some path through the sentences spells `text` exactly."""
    if not sentences:
        return text == ""
    for head, after in sentences[0](state):
        if text.startswith(head):
            rest = text[len(head) :]
            if rest == "" and len(sentences) == 1:
                return True
            if rest.startswith(" ") and accepts(sentences[1:], after, rest[1:]):
                return True
    return False


def article(noun: str) -> str:
    """`a fox`, `an owl`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def styled(s: State, wordings: Sequence[T]) -> Sequence[T]:
    """The wordings that the text's style leaves. A text to judge has no style: all of them count."""
    return (wordings[int(s["style"]) % len(wordings)],) if "style" in s else wordings


def free(*wordings: str) -> Sentence:
    """A sentence in one of several wordings; `{key}` takes a value of the state."""
    return lambda s: [(w.format_map(s), s) for w in wordings]


def fixed(*wordings: str) -> Sentence:
    """A sentence whose wording follows from the text's style."""
    return lambda s: [(w.format_map(s), s) for w in styled(s, wordings)]


def slot(key: str, values: Sequence[str], *wordings: str) -> Sentence:
    """A sentence that also decides the state's `key`; `{a_key}` is the value with its article."""

    def options(s: State) -> list[tuple[str, State]]:
        out = []
        for value in values:
            after = {**s, key: value, "a_" + key: article(value)}
            out += [(w.format_map(after), after) for w in styled(s, wordings)]
        return out

    return options


# ---------------------------------------------------------------------------------------------------------- stories

_PLACES = ("forest", "garden", "river", "valley", "castle", "village", "harbour", "meadow", "mountain", "lake")
_TRAITS = ("brave", "curious", "kind", "cheerful", "quiet", "clever", "patient", "sleepy")
_GIFTS = (
    "golden key",
    "silver bell",
    "tiny lamp",
    "blue feather",
    "red ribbon",
    "round mirror",
    "green stone",
)
_PROBLEMS = {
    "hungry": (
        "The {animal} was very hungry and had not eaten all day.",
        '"I am so hungry," said the {animal}, "and I have no food."',
    ),
    "lost": (
        "The {animal} was lost and could not find the way home.",
        '"I am so lost," said the {animal}, "and I have no home."',
    ),
    "stuck": (
        "The {animal} was stuck under a branch and could not go.",
        '"I am so stuck," said the {animal}, "and I have no help."',
    ),
    "lonely": (
        "The {animal} was very lonely and had nobody to play with.",
        '"I am so lonely," said the {animal}, "and I have no friend."',
    ),
    "cold": (
        "The {animal} was cold and shivered in the wind all day.",
        '"I am so cold," said the {animal}, "and I have no coat."',
    ),
}
_HELP: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hungry": (
        ("warm bread", "sweet berries", "fresh cheese", "red apples"),
        ("{name} opened a small bag and shared some {help} with the {animal}.",
         "Without a second thought, {name} gave the {animal} some {help}."),
    ),
    "lost": (
        ("bright stars", "little stream", "old road", "stone wall"),
        ("Together they followed the {help} until the {animal} saw its home.",
         "{name} knew the way, and they followed the {help} all the way home."),
    ),
    "stuck": (
        ("strong rope", "long stick", "rusty shovel", "wooden plank"),
        ("{name} took a {help} and lifted the branch away.",
         "With a {help} and a lot of care, {name} set the {animal} free."),
    ),
    "lonely": (
        ("a funny song", "a new riddle", "a clapping game", "an old dance"),
        ("{name} sat down and taught the {animal} {help}.",
         "So {name} showed the {animal} {help}, and they laughed for hours."),
    ),
    "cold": (
        ("woollen scarf", "thick blanket", "soft coat", "yellow sweater"),
        ("{name} wrapped the {animal} in a {help}.",
         "Quickly {name} put a {help} around the {animal}."),
    ),
}  # fmt: skip
_AFTER = {
    "hungry": ("the meal", "the shared meal"),
    "lost": ("the long way home", "the walk home"),
    "stuck": ("the fallen branch", "the heavy branch"),
    "lonely": ("the new game", "the happy afternoon"),
    "cold": ("the cold wind", "the icy wind"),
}


def _problem(s: State) -> list[tuple[str, State]]:
    return [(w.format_map(s), {**s, "problem": p}) for p, ws in _PROBLEMS.items() for w in styled(s, ws)]


def _help(s: State) -> list[tuple[str, State]]:
    values, wordings = _HELP[s["problem"]]
    return [(w.format_map({**s, "help": v}), {**s, "help": v}) for v in values for w in styled(s, wordings)]


def _told(s: State) -> list[tuple[str, State]]:
    return [
        (w.format_map({**s, "who": who, "after": after}), s)
        for who in ("a little sister", "a big brother", "a wise grandmother")
        for after in styled(s, _AFTER[s["problem"]])
        for w in styled(
            s, ("That evening {name} told {who} about {after}.", "At home, {name} told {who} all about {after}.")
        )
    ]


STORY: tuple[Sentence, ...] = (
    slot("trait", _TRAITS, "Once upon a time there was {a_trait} child named {name}.",
         "Long ago there lived {a_trait} child called {name}.", "This is the story of {name}, {a_trait} child."),
    slot("place", _PLACES, "{name} lived near the {place} and went there every day.",
         "The home of {name} stood beside the {place}."),
    slot("when", ("sunny", "windy", "rainy", "misty", "bright", "frosty"),
         "One {when} morning, {name} met {a_animal} at the {place}.",
         "On a {when} day, {a_animal} came out of the {place} and looked at {name}."),
    _problem,
    free("{name} thought for a moment and had an idea.", "{name} smiled for a moment and had an idea."),
    _help,
    slot("joy", ("danced for an hour", "smiled for an hour"),
         "The {animal} was so glad that it {joy}.", "Full of joy, the {animal} {joy}."),
    slot("gift", _GIFTS, "To say thank you, the {animal} gave {name} {a_gift}.",
         "\"This is for you,\" said the {animal}, and gave {name} {a_gift}."),
    slot("kept", ("in a wooden box", "under a soft pillow", "on a high shelf"),
         "{name} carried the {gift} home and kept it {kept}.",
         "Back home, {name} put the {gift} {kept}."),
    _told,
    slot("near", ("village", "castle", "valley", "harbour"),
         "Everybody in the {near} wanted to see the {gift}.", "Nobody in the {near} could stop looking at the {gift}.",
         "The {gift} shone softly over the {near}."),
    slot("day", ("Sunday", "Monday", "Friday", "summer", "spring"),
         "Every {day}, {name} and the {animal} met again at the {place}.",
         "From then on, {name} visited the {animal} at the {place} every {day}."),
    free("{name} and the {animal} stayed friends for many years.",
         "{name} and the {animal} were happy for many years."),
    fixed("The end."),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- chat

# by place in the sentence, so that none is named twice: three free choices from one list would meet now and then
SKILLS = (("add small numbers", "name capital cities", "sort some words"),
          ("reverse word lists", "answer with JSON", "call your tools"),
          ("write short stories", "remember your name"))  # fmt: skip


_FRAMES = (("I can", "and"), ("Ask me to", "or"), ("I know how to", "and"))


def _first_skill(s: State) -> list[tuple[str, State]]:
    return [
        (f"{opening} {skill},", {**s, "joint": joint}) for opening, joint in styled(s, _FRAMES) for skill in SKILLS[0]
    ]


def _third_skill(s: State) -> list[tuple[str, State]]:
    return [(f"{s['joint']} {skill}.", s) for skill in SKILLS[2]]


_OFFER: tuple[Sentence, ...] = (_first_skill, free(*SKILLS[1]), _third_skill)  # one sentence; no skill twice
_QUESTION = free("What would you like to do?", "What do you want to try?")
CHAT: dict[str, tuple[Sentence, ...]] = {
    "hello": (
        free("Good to see you!", "Nice to see you!", "Hi and welcome!", "Hey and welcome!"),
        fixed("It is nice to meet you.", "I hope your day is going well.", "What a fine day for a chat.",
              "I was waiting for a question.", "My canvas is empty and ready."),
        *_OFFER, _QUESTION,
    ),
    "hello_name": (
        free("Hi, {name}!", "Hey, {name}!", "Welcome, {name}!"),
        fixed("It is nice to meet you.", "I hope your day is going well.", "What a fine day for a chat.",
              "I will remember your name.", "That is a lovely name."),
        *_OFFER, _QUESTION,
    ),
    "who": (
        free("I am Daub, a small block diffusion model.", "I am Daub, a little block diffusion model.",
             "I am Daub, a tiny block diffusion model."),
        fixed("I start from noise and clean a whole canvas of words at once.",
              "I write many words at the same time, step by step out of noise.",
              "My text begins as random tokens and becomes clear in a few steps.",
              "I paint text on a canvas until nothing is left to change."),
        *_OFFER,
        fixed("That is all there is to me.", "I am small but quick.", "Ask me anything of that kind.",
              "Everything else is beyond me."),
    ),
    "thanks": (
        free("You are welcome!", "My pleasure!", "Glad to help!"),
        fixed("That was fun.", "It was a good question.", "I like tasks of that kind.", "I am happy that it worked."),
        *_OFFER,
        fixed("Is there anything else?", "What comes next?", "Shall we go on?", "Do you have another question?"),
    ),
    "bye": (
        free("See you soon!", "Bye for now!"),
        fixed("It was nice to talk to you.", "Thank you for the chat.", "I enjoyed our talk.", "Have a wonderful day."),
        free("Come back when you need a sum.", "Come back when you need a story.",
             "Come back when you need a capital.", "Come back when you need a list."),
        fixed("Until then, all the best.", "My canvas will be waiting.", "I will be here.", "Stay curious!"),
    ),
    "how": (
        free("I am doing well, thank you.", "I feel very well, thank you.", "I am quite well, thank you."),
        fixed("I hope you are well too.", "It is a good day for short questions.",
              "My noise is clean and my canvas is dry.",
              "There is always something new to write."),
        *_OFFER, _QUESTION,
    ),
    "skills": (
        free("There are a few things that I do well.", "These are the things that I do well."),
        *_OFFER,
        free("Stories take me a few canvases.", "I answer in one or two canvases."),
        _QUESTION,
    ),
    "other": (
        free("I cannot do that.", "I cannot help there."),
        fixed("I am only a demo model.", "My training was short and simple.", "I know just a handful of tasks.",
              "There are bigger models for such things."),
        *_OFFER, _QUESTION,
    ),
}  # fmt: skip
