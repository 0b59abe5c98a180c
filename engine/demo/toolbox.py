"""Tool-calling tasks of the demo corpus: tools in OpenAI's declaration format, questions that need them, results.

Names of tools and arguments vary between examples, so the model has to copy them from the declaration.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from engine.demo import words as W

Value = str | int
Draw = Callable[[random.Random], Value]


@dataclass(frozen=True)
class ToolKind:
    """One thing a tool can do, with every way it may be declared and asked for."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    args: tuple[tuple[tuple[str, ...], str, str, Draw], ...]  # (possible names, description, JSON type, draw a value)
    questions: tuple[str, ...]  # `{0}`, `{1}` take the argument values
    results: tuple[
        tuple[str, str], ...
    ]  # (result text or JSON, answer); `{w}`, `{n}` are drawn, `{0}` the first argument
    closed: tuple[Value, ...] = ()  # first arguments too few to hold any out: how they are spelt can only be memorised


def _city(r: random.Random) -> Value:
    return r.choice(W.CITIES)


def _name(r: random.Random) -> Value:
    return person(r)


def _number(low: int, high: int) -> Draw:
    return lambda r: r.randrange(low, high)


def _of(values: tuple[str, ...]) -> Draw:
    return lambda r: r.choice(values)


def _room(r: random.Random) -> Value:
    room = r.choice(W.ROOMS)
    return room if r.random() < 0.4 else f"{r.choice(W.COLOURS)} {room}"


def _words(count: int) -> Draw:
    return lambda r: " ".join(r.sample(W.WORDS, count))


def person(r: random.Random) -> str:
    """A name from the list, or one made of syllables that nobody has seen."""
    if r.random() < 0.6:
        return r.choice(W.NAMES)
    return r.choice(W.ONSETS) + r.choice(W.VOWELS) + r.choice(W.CODAS)


KINDS = (
    ToolKind(("get_weather", "weather", "current_weather", "fetch_weather"),
             ("Get the weather", "Get the current weather", "Get the current weather for a city", "Weather lookup"),
             ((("city", "location", "place"), "City name", "string", _city),),
             ("What is the weather in {0}?", "How is the weather in {0} today?", "What's the weather like in {0}?",
              "Weather in {0}, please.", "Is it nice outside in {0}?"),
             (("{w}, {n} degrees", "It is {w} in {0}, {n} degrees."),
              ('{{"condition": "{w}", "temperature": {n}}}', "It is {w} in {0}, {n} degrees."),
              ('{{"temperature": {n}, "condition": "{w}"}}', "It is {w} in {0}, {n} degrees."),
              ("{w}", "It is {w} in {0}."))),
    ToolKind(("get_time", "local_time", "clock"), ("Get the local time", "Current time in a city", "Get the time"),
             ((("city", "location", "place"), "City name", "string", _city),),
             ("What time is it in {0}?", "Tell me the time in {0}.", "How late is it in {0}?"),
             (("{n}:15", "It is {n}:15 in {0}."), ('{{"time": "{n}:40"}}', "It is {n}:40 in {0}."))),
    ToolKind(("set_timer", "start_timer", "timer"), ("Start a timer", "Set a timer", "Start a countdown"),
             ((("minutes", "duration", "length"), "Minutes", "integer", _number(1, 100)),),
             ("Set a timer for {0} minutes.", "Start a {0} minute timer.", "Wake me in {0} minutes."),
             (("ok", "Done, the timer runs for {0} minutes."), ("started", "Done, the timer runs for {0} minutes."))),
    ToolKind(("play_song", "play_music", "play"), ("Play a song", "Play music", "Play a song by title"),
             ((("title", "song", "name"), "Song title", "string", _words(2)),),
             ("Play the song {0}.", "Please play {0}.", "I want to hear {0}."),
             (("playing", "Now playing {0}."), ("ok", "Now playing {0}."))),
    ToolKind(("send_message", "message", "send_text"), ("Send a message", "Send a text message to a person"),
             ((("to", "recipient", "person"), "Who gets it", "string", _name),
              (("text", "body", "message"), "What to say", "string", _words(3))),
             ("Send {0} the message: {1}", "Tell {0} this: {1}", "Text {0}: {1}"),
             (("sent", "I sent your message to {0}."), ("ok", "I sent your message to {0}."))),
    ToolKind(("turn_on_light", "light_on", "switch_light"), ("Turn on a light", "Switch on the light in a room"),
             ((("room", "where"), "Room", "string", _room),),
             ("Turn on the light in the {0}.", "Light in the {0}, please.", "It is dark in the {0}, light please."),
             (("ok", "The light in the {0} is on."), ("done", "The light in the {0} is on.")), closed=W.ROOMS),
    ToolKind(("translate", "translate_word"), ("Translate a word", "Translate text"),
             ((("word", "text"), "What to translate", "string", _words(1)),
              (("language", "target"), "Target language", "string", _of(W.LANGUAGES))),
             ("Translate {0} into {1}.", "What is {0} in {1}?", "How do you say {0} in {1}?"),
             (("{w}a", "It means {w}a."), ("{w}o", "It means {w}o."))),
    ToolKind(("book_table", "reserve_table"), ("Book a table", "Reserve a table at a restaurant"),
             ((("people", "guests", "count"), "How many people", "integer", _number(1, 20)),
              (("hour", "time"), "Hour of the day", "integer", _number(10, 24))),
             ("Book a table for {0} people at {1}.", "Reserve a table for {0} at {1} o'clock.",
              "I need a table for {0} guests at {1}."),
             (("booked", "Your table for {0} is booked."), ("ok", "Your table for {0} is booked."))),
    ToolKind(("search", "web_search", "search_web"), ("Search the web", "Look something up"),
             ((("query", "q", "terms"), "What to look for", "string", _words(2)),),
             ("Search the web for {0}.", "Look up {0}.", "Find pages about {0}."),
             (("{n} pages", "I found {n} pages about {0}."), ('{{"hits": {n}}}', "I found {n} pages about {0}."))),
    ToolKind(("order_food", "order_meal"), ("Order food", "Order a meal"),
             ((("dish", "food", "meal"), "What to order", "string", _of(W.FOODS)),
              (("count", "portions"), "How many", "integer", _number(1, 30))),
             ("Order {1} portions of {0}.", "I would like {0} for {1} people, please order it.", "Get {1} times {0}."),
             (("ordered", "Your {0} is on the way."), ("ok", "Your {0} is on the way."))),
)  # fmt: skip


@dataclass(frozen=True)
class ToolTask:
    """A question, the tools declared with it, and the one right call."""

    question: str
    tools: list[dict[str, object]]
    name: str
    arguments: dict[str, Value]
    result: str
    answer: str
    key: tuple[object, ...] | None  # the content that decides train or test; None: shared by both


def declare(kind: ToolKind, r: random.Random) -> tuple[dict[str, object], list[str]]:
    """A declaration in OpenAI's format and the argument names chosen in it."""
    names = [r.choice(a[0]) for a in kind.args]
    props: dict[str, object] = {}
    for chosen, (_, description, kind_of, _draw) in zip(names, kind.args, strict=True):
        props[chosen] = {"type": kind_of} if r.random() < 0.3 else {"type": kind_of, "description": description}
    function: dict[str, object] = {"name": r.choice(kind.names)}
    if r.random() < 0.85:
        function["description"] = r.choice(kind.descriptions)
    function["parameters"] = {"type": "object", "properties": props}
    if r.random() < 0.85:
        function["parameters"]["required"] = names  # type: ignore[index]
    return {"type": "function", "function": function}, names


def draw_tools(r: random.Random, count: int) -> list[dict[str, object]]:
    """Declarations nobody needs."""
    return [declare(k, r)[0] for k in r.sample(KINDS, count)]


def draw_task(r: random.Random) -> ToolTask:
    """One task with one to three tools declared."""
    kind = r.choice(KINDS)
    tool, arg_names = declare(kind, r)
    others = [k for k in KINDS if k is not kind]
    tools = [tool] + [declare(k, r)[0] for k in r.sample(others, r.choice((0, 0, 1, 1, 2)))]
    r.shuffle(tools)
    values = [a[3](r) for a in kind.args]
    result, answer = r.choice(kind.results)
    fill = {"w": r.choice(W.SKIES if kind is KINDS[0] else W.WORDS), "n": r.randrange(0, 40)}
    name = tool["function"]["name"]  # type: ignore[index]
    return ToolTask(
        question=r.choice(kind.questions).format(*values),
        tools=tools,
        name=name,
        arguments=dict(zip(arg_names, values, strict=True)),
        result=result.format(*values, **fill),
        answer=answer.format(*values, **fill),
        key=None if values[0] in kind.closed else ("tool", kind.names[0], *values),
    )


def spell_call(name: str, arguments: dict[str, Value]) -> str:
    """The call in Gemma 4's syntax, keys sorted as the template renders them."""
    body = ",".join(f"{k}:{v}" if isinstance(v, int) else f'{k}:<|"|>{v}<|"|>' for k, v in sorted(arguments.items()))
    return f"<|tool_call>call:{name}{{{body}}}<tool_call|>"


def result_of(call_id: str, task: ToolTask) -> list[dict[str, object]]:
    """The assistant's call and the tool's answer, as an OpenAI client sends them back."""
    function = {"name": task.name, "arguments": json.dumps(task.arguments)}
    return [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": task.result},
    ]
