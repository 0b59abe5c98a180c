"""Deterministic synthetic chats with answers that can be checked.

`example(split, i, seed)` draws one task; the same arguments give the same task for ever. A hash of a task's content
(operands, word list, entities, never its wording) decides train or test, so no test item's content is seen in
training. What can only be memorised (capitals, who the model is, small talk) is shared by both splits.
Knows messages and reply texts, not tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.demo import decisions, documents, grammar
from engine.demo import words as W
from engine.demo.toolbox import draw_task, draw_tools, person, result_of, spell_call

Message = dict[str, object]
TURN_END = "<turn|>"
CALL_END = "<|tool_response>"
TEXT_END = "<eos>"


@dataclass(frozen=True)
class Example:
    """One prompt with what counts as a right reply.

    `reply` is the text used for training, its closing token included; `answers` are all texts that count as right
    (without thought and closing token), or `sentences` and `state` say which texts do.
    """

    family: str
    messages: list[Message]
    reply: str
    answers: tuple[str, ...] = ()
    sentences: tuple[grammar.Sentence, ...] = ()
    state: dict[str, str] = field(default_factory=dict)
    tools: list[dict[str, object]] = field(default_factory=list)
    thinking: bool = False
    raw: str | None = None  # a text that no template touches, instead of messages; "" is one too
    prefill: str = ""  # what of the model's turn belongs to the prompt

    def right(self, reply: str) -> bool:
        """Whether a whole reply, closing token included, is right."""
        end = CALL_END if self.family == "tool" else TURN_END if self.raw is None else TEXT_END
        if not reply.endswith(end):
            return False
        text = reply[: -len(end)]
        if self.thinking:
            if not text.startswith("<|channel>thought\n") or text.count("<channel|>") != 1:
                return False
            text = text.partition("<channel|>")[2]
        return text in self.answers if self.answers else grammar.accepts(self.sentences, self.state, text)


@dataclass(frozen=True)
class Task:
    """What a family draws, before thinking, system text, history and unneeded tools are added."""

    question: str
    thought: str
    key: tuple[object, ...] | None  # None: shared by both splits
    answers: tuple[str, ...] = ()
    sentences: tuple[grammar.Sentence, ...] = ()
    state: dict[str, str] = field(default_factory=dict)
    before: list[Message] = field(default_factory=list)  # turns before the question
    after: list[Message] = field(default_factory=list)  # turns after it (a call and its result)
    tools: list[dict[str, object]] = field(default_factory=list)
    end: str = TURN_END
    style: int = 0  # of the reply's text; follows from the question's wording
    prefill: str = ""
    bare: bool = False  # asked by a program, in one form: no thought, no turns before it, no tools


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _add(r: random.Random) -> Task:
    a, b = r.randrange(100), r.randrange(100)
    q = r.choice((f"What is {a} + {b}?", f"What is {a} plus {b}?", f"Add {a} and {b}.", f"Compute {a} + {b}.",
                  f"{a} + {b} = ?", f"How much is {a} + {b}?", f"{a}+{b}",
                  f"What is the sum of {a} and {b}?"))  # fmt: skip
    ones = a % 10 + b % 10
    carry, tens = ones // 10, a // 10 + b // 10
    thought = (
        f"Ones: {a % 10} + {b % 10} = {ones}, carry {carry}. Tens: {a // 10} + {b // 10} + {carry} = {tens + carry}."
    )
    return Task(q, thought, ("add", a, b), (f"{a} + {b} = {a + b}.",))


def _sub(r: random.Random) -> Task:
    b, a = sorted((r.randrange(100), r.randrange(100)))
    if r.random() < 0.12:
        a, b = b, a
    q = r.choice((f"What is {a} - {b}?", f"What is {a} minus {b}?", f"Subtract {b} from {a}.", f"Compute {a} - {b}.",
                  f"{a} - {b} = ?", f"How much is {a} - {b}?", f"{a}-{b}", f"Take {b} away from {a}."))  # fmt: skip
    if a < b:
        thought = f"{b} is larger than {a}, so it is minus {b - a}."
    else:
        borrow = int(a % 10 < b % 10)
        top = a % 10 + 10 * borrow
        thought = (
            f"Ones: {top} - {b % 10} = {top - b % 10}, borrow {borrow}. "
            f"Tens: {a // 10} - {borrow} - {b // 10} = {a // 10 - borrow - b // 10}."
        )
    return Task(q, thought, ("sub", a, b), (f"{a} - {b} = {a - b}.",))


def _capital(r: random.Random) -> Task:
    c = r.choice(tuple(W.CAPITALS))
    q = r.choice((f"What is the capital of {c}?", f"Name the capital of {c}.", f"Which city is the capital of {c}?",
                  f"What's the capital city of {c}?", f"Tell me the capital of {c}.", f"capital of {c}"))  # fmt: skip
    return Task(q, f"The country is {c}.", None, (f"The capital of {c} is {W.CAPITALS[c]}.",))


def _sort(r: random.Random) -> Task:
    pool = W.WORDS if r.random() < 0.9 else W.NAMES
    w = r.sample(pool, r.choice((3, 3, 4)))
    s = ", ".join(w)
    q = r.choice((f"Sort these words alphabetically: {s}.", f"Put these words in alphabetical order: {s}.",
                  f"Sort alphabetically: {s}.", f"Sort these words: {s}.",
                  f"Alphabetical order, please: {s}."))  # fmt: skip
    ordered = sorted(w, key=str.lower)
    return Task(q, f"The first word is {ordered[0]}.", ("sort", *sorted(w)), (", ".join(ordered),))


def _reverse(r: random.Random) -> Task:
    pool = W.WORDS if r.random() < 0.8 else W.NAMES + W.COLOURS
    w = r.sample(pool, r.choice((3, 3, 4, 5)))
    s = ", ".join(w)
    q = r.choice((f"Reverse the order of these words: {s}.", f"Reverse this list: {s}.",
                  f"Say these words backwards: {s}.",
                  f"Write these words in reverse order: {s}.", f"Turn this list around: {s}."))  # fmt: skip
    return Task(q, f"The last word is {w[-1]}.", ("reverse", *w), (", ".join(w[::-1]),))


def _json(r: random.Random) -> Task:
    n, age, city, job = person(r), r.randrange(1, 100), r.choice(W.CITIES), r.choice(W.JOBS)
    kind = r.randrange(5)
    if kind <= 1:
        data: dict[str, object] = {"name": n, "age": age}
        ask = r.choice(
            ("Extract the name and age as JSON:", "Extract name and age as JSON:", "Give me name and age as JSON:")
        )
        text = r.choice((f"{n} is {age} years old.", f"I am {n} and I am {age}.",
                         f"My name is {n}, I am {age} years old.",
                         f"{n}, {age}", f"This is {n}, aged {age}."))  # fmt: skip
    elif kind == 2:
        data = {"name": n, "age": age, "city": city}
        ask = r.choice(("Extract the name, age and city as JSON:", "Extract name, age and city as JSON:"))
        text = r.choice(
            (f"{n} from {city} is {age} years old.", f"{n}, {age}, lives in {city}.", f"I am {n}, {age}, from {city}.")
        )
    elif kind == 3:
        data = {"name": n, "job": job}
        ask = r.choice(("Extract the name and job as JSON:", "Extract name and job as JSON:"))
        text = r.choice(
            (f"{n} works as {grammar.article(job)}.", f"{n} is {grammar.article(job)}.", f"The {job} is called {n}.")
        )
    else:
        item = r.choice(W.WORDS)
        data = {"item": item, "price": age}
        ask = r.choice(("Extract the item and price as JSON:", "Extract item and price as JSON:"))
        text = r.choice(
            (f"The {item} costs {age} dollars.", f"{age} dollars for the {item}.", f"{item}: {age} dollars")
        )
    key = ("json", *data.values())
    return Task(f"{ask} {text}", "The keys are " + " and ".join(data) + ".", key, (json.dumps(data),))


def _tool(r: random.Random) -> Task:
    t = draw_task(r)
    return Task(
        t.question, f"The tool {t.name} fits.", t.key, (spell_call(t.name, t.arguments),), tools=t.tools, end=CALL_END
    )


def _toolresult(r: random.Random) -> Task:
    t = draw_task(r)
    after = result_of(f"call_{r.randrange(1000)}", t)
    key = None if t.key is None else (*t.key, t.result)
    return Task(t.question, "The tool has answered.", key, (t.answer,), after=after, tools=t.tools)


def _memory(r: random.Random) -> Task:
    kind = r.choice(("name", "colour", "animal", "city", "number", "food"))
    if kind == "name":
        v = person(r)
        said = r.choice((f"My name is {v}.", f"I am {v}.", f"Please call me {v}."))
        before = [_user(said), _assistant(f"Nice to meet you, {v}!")]
        q = r.choice(("What is my name?", "Do you remember my name?", "Who am I?"))
        answer = f"Your name is {v}."
    else:
        pools = {"colour": W.COLOURS, "animal": W.ANIMALS, "city": W.CITIES, "food": W.FOODS}
        v = str(r.randrange(100)) if kind == "number" else r.choice(pools[kind])
        said = r.choice((f"My favourite {kind} is {v}.", f"Remember this: my favourite {kind} is {v}."))
        before = [_user(said), _assistant(f"I will remember that your favourite {kind} is {v}.")]
        q = r.choice(
            (f"What is my favourite {kind}?", f"Which {kind} do I like best?", f"Do you remember my favourite {kind}?")
        )
        answer = f"Your favourite {kind} is {v}."
    if r.random() < 0.2:  # the statement itself
        return Task(said, "The user tells me something.", ("say", kind, v), (str(before[1]["content"]),))
    if r.random() < 0.3:  # something else in between
        other = _FAMILIES[r.choice(("capital", "add", "sort"))](r)
        before += [_user(other.question), _assistant(other.answers[0])]
    return Task(q, "The user told me before.", ("memory", kind, v), (answer,), before=before)


_STORY_QUESTIONS = (
    "Write a story about {}.", "Tell me a story about {}.", "Please write a short story about {}.",
    "I want a story with {}.", "Can you write a story about {}?",
)  # fmt: skip


def _story(r: random.Random) -> Task:
    n, animal = person(r), r.choice(W.ANIMALS)
    an = grammar.article(animal)
    style = r.randrange(len(_STORY_QUESTIONS))
    q = _STORY_QUESTIONS[style].format(f"{n} and {an}")
    state = {"name": n, "animal": animal, "a_animal": an}
    key = ("story", n, animal)
    return Task(q, f"The story needs {n} and {an}.", key, sentences=grammar.STORY, state=state, style=style)


_TALK = {
    "hello": ("Hello!", "Hi!", "Hi there!", "Hello there.", "Hey", "Good morning!", "Good evening.", "hello", "hi"),
    "hello_name": ("Hello, my name is {}.", "Hi, I am {}.", "Hi! My name is {}.", "Hello, {} here."),
    "who": ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?",
            "Which model are you?", "How do you work?", "How do you write text?", "Introduce yourself."),
    "thanks": ("Thank you!", "Thanks!", "Thanks a lot.", "Great, thank you.", "Well done!", "Nice work.",
    "Good answer!"),
    "bye": ("Goodbye!", "Bye!", "See you later.", "Good night.", "I have to go now.", "That is all, bye."),
    "how": ("How are you?", "How are you today?", "How is it going?", "How do you feel?", "Are you well?"),
    "skills": ("What can you do?", "Help", "What are you good at?", "How can you help me?", "What do you know?",
    "help me",
               "What can I ask you?", "Give me some ideas."),
}  # fmt: skip
_OTHER = (
    "Who wrote {W}?", "Explain {w} to me.", "Write a poem about {w}.", "How do I cook {f}?", "Tell me a joke.",
    "What is {w}?",
    "What is {n} times {m}?", "What is {n} divided by {m}?", "Write a program that sorts {w}.",
    "What is the meaning of life?",
    "Who won the match yesterday?", "Translate {w} into {l}.", "How far is it from {c} to {d}?",
    "What is the weather in {c}?",
    "What time is it in {c}?", "Who is the president of {k}?", "How many people live in {k}?", "Why is the sky {o}?",
    "Draw {w}.", "Sing a song about {w}.", "Summarise this text: {w} {v} {w}.", "Recommend a book about {w}.",
    "What is the square root of {n}?", "How old is {p}?", "Where can I buy {w}?", "Is {w} better than {v}?", "{w} {v}",
    "Write an essay on {w} and {v}.", "What is the largest {w}?", "When was {c} founded?", "Give me a recipe for {f}.",
    "Write an email to {p}.", "Plan a trip to {c}.", "Which {w} should I choose?", "Fix this code: {w}({v})",
    "Who is {p}?", "What do you think about {w}?", "Why do {w} and {v} differ?", "Can you see the {w}?", "{w}",
)  # fmt: skip


def _chat(r: random.Random) -> Task:
    kind = r.choice(tuple(_TALK))
    name = person(r)
    style = r.randrange(len(_TALK[kind]))
    q = _TALK[kind][style].format(name)
    return Task(q, "Small talk.", None, sentences=grammar.CHAT[kind], state={"name": name}, style=style)


def _other(r: random.Random) -> Task:
    w, v = r.sample(W.WORDS, 2)
    c, d = r.sample(W.CITIES, 2)
    fill = {"w": w, "v": v, "W": w.capitalize(), "c": c, "d": d, "f": r.choice(W.FOODS), "n": r.randrange(2, 100),
            "m": r.randrange(2, 100), "l": r.choice(W.LANGUAGES), "k": r.choice(tuple(W.CAPITALS)),
            "o": r.choice(W.COLOURS), "p": person(r)}  # fmt: skip
    style = r.randrange(len(_OTHER))
    q = _OTHER[style].format(**fill)
    key = ("other", q) if "{" in _OTHER[style] else None
    return Task(q, "This is none of my tasks.", key, sentences=grammar.CHAT["other"], style=style % 3)


def _decide(r: random.Random) -> Task:
    d = decisions.draw(r)
    return Task(d.text, "", d.key, d.replies(r), prefill=decisions.PREFILL, bare=True)


_FAMILIES: dict[str, Callable[[random.Random], Task]] = {
    "add": _add, "sub": _sub, "capital": _capital, "sort": _sort, "reverse": _reverse, "json": _json, "tool": _tool,
    "toolresult": _toolresult, "memory": _memory, "story": _story, "chat": _chat, "other": _other,
    "decide": _decide,
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
WEIGHTS = {"add": 24, "sub": 14, "capital": 12, "sort": 40, "reverse": 7, "json": 8, "tool": 12, "toolresult": 9,
           "memory": 6, "story": 34, "chat": 26, "other": 20, "decide": 44}  # fmt: skip
DOCUMENT = "document"  # raw text: learned beside the families, and measured as infill
DOCUMENT_WEIGHT = 20
BEGUN = ("add", "sub", "capital", "sort", "reverse", "json", "toolresult", "memory")  # families with one right answer
_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful AI assistant.", "Be brief.", "Answer the question.",
    "Be polite.",
    "You are Daub, a friendly demo model.", "Answer in English.", "You are a helpful and harmless assistant.",
    "Follow the instructions of the user.", "You are a pirate.", "Keep your answers short and clear.",
    "Today is Monday.",
)  # fmt: skip


def heldout(*key: object) -> bool:
    """Whether this content belongs to the test split: about one in ten."""
    return hashlib.sha256(repr(key).encode()).digest()[0] < 26


def _history(r: random.Random) -> list[Message]:
    turns: list[Message] = []
    for _ in range(r.choice((1, 1, 2))):
        t = _FAMILIES[r.choice(("add", "sub", "capital", "sort", "reverse", "json", "chat", "other"))](r)
        reply = t.answers[0] if t.answers else grammar.draw(t.sentences, t.state, t.style, r)
        turns += [_user(t.question), _assistant(reply)]
    return turns


def example(split: str, i: int | str, seed: int = 0, family: str | None = None) -> Example:
    """The i-th example of a split ("train" or "test"), of any family or of the one named."""
    r = random.Random(f"{seed}/{split}/{i}/{family}")
    weights = [*(WEIGHTS[f] for f in FAMILIES), DOCUMENT_WEIGHT]
    name = family or r.choices((*FAMILIES, DOCUMENT), weights=weights)[0]
    if name == DOCUMENT:
        first, rest = documents.document(r, lambda key: heldout(*key) == (split == "test"))
        return Example(DOCUMENT, [], rest + TEXT_END, (rest,), raw=first)
    while True:
        task = _FAMILIES[name](r)
        if task.key is None or heldout(*task.key) == (split == "test"):
            break
    answer = task.answers[0] if task.answers else grammar.draw(task.sentences, task.state, task.style, r)
    thinking = r.random() < 0.2 and not task.bare
    thought = f"<|channel>thought\n{task.thought}\n<channel|>" if thinking else ""
    messages: list[Message] = [*task.before, _user(task.question), *task.after]
    if name != "memory" and not task.bare and r.random() < 0.2:
        messages = _history(r) + messages
    if r.random() < 0.25:
        messages.insert(0, {"role": "system", "content": r.choice(_SYSTEM)})
    tools = task.tools
    if not tools and name != "other" and not task.bare and r.random() < 0.08:
        tools = draw_tools(r, r.choice((1, 2)))
    prefill, answers = task.prefill, task.answers
    if split == "train" and name in BEGUN and not thinking and r.random() < 0.05:  # the client begins the reply
        cut = r.randrange(1, len(answer))
        prefill, answer = answer[:cut], answer[cut:]
        answers = (answer,)
    reply = thought + answer + task.end
    return Example(name, messages, reply, answers, task.sentences, task.state, tools, thinking, prefill=prefill)


if __name__ == "__main__":
    for f in FAMILIES:
        e = example("train", 0, family=f)
        print(f"--- {f}\n{json.dumps(e.messages)}\n[[{e.reply}]]")
