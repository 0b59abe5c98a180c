"""What a conversation costs turn by turn, and several of them one after the other and at once.

Each turn asks with the whole history, as a chat client does, so most of a prompt was committed before. Conversations
at once and one after the other have the same texts and seeds, and each way begins with an empty cache, so their times
can be compared. Half of those one after the other come before those at once and half behind, so that a machine that
gets slower meanwhile is slower for both. There are more of them than go on at once: when one is over the next begins,
so that the time in which the last is alone counts for little. Knows prompts, replies and the clock; nothing of HTTP or
of how the engine works.

Invariant: a turn's time begins when its request is submitted and ends when its last token has come; what the engine
does between turns, when nobody waits, counts in the total only.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engine import CanvasDone, Engine, EngineError, EngineInfo, Finished, GenerationRequest, Sampling
from server.bench import ratio, story_prompts
from server.output_parser import OutputParser
from server.prompt import PromptRenderer

Clock = Callable[[], float]

ROUNDS = 8  # conversations for each of those that go on at once: at the end fewer than that are left to go on


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of one conversation. Times in seconds of wall clock since it was submitted."""

    conversation: int
    turn: int  # 1-based
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    denoise_steps: int
    finish_reason: str
    seconds: float
    seconds_to_first_text: float | None


@dataclass
class Conversation:
    """A chat in progress; `asked` and `first_text` are times of the open turn."""

    number: int
    questions: Sequence[str]
    messages: list[dict[str, str]] = field(default_factory=list)
    turn: int = 0
    ids: list[int] = field(default_factory=list)  # of the open reply
    asked: float = 0.0
    first_text: float | None = None

    @property
    def over(self) -> bool:
        return self.turn == len(self.questions)


class Talks:
    """Runs conversations on one engine."""

    def __init__(
        self, engine: Engine, renderer: PromptRenderer, *, max_tokens: int | None, clock: Clock = time.perf_counter
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._max_tokens = max_tokens
        self._clock = clock
        self.replies: dict[tuple[int, int], tuple[int, ...]] = {}  # ids by conversation and turn

    def run(self, conversations: Sequence[Conversation], *, at_once: int = 1) -> Iterator[Turn]:
        """So many of them at a time, each asking as soon as it has its answer; a single one thinks before it asks
        again, so that the engine is idle for a while. Raises EngineError for one that fails."""
        waiting = deque(conversations)
        open_ones: dict[str, Conversation] = {}
        resting: list[Conversation] = []  # what is to ask next

        while waiting or resting or self._engine.has_work:
            while waiting and len(open_ones) + len(resting) < at_once:
                resting.append(waiting.popleft())
            if at_once > 1 or not self._engine.has_work:
                open_ones |= {self._ask(conversation): conversation for conversation in resting}
                resting.clear()
            for event in self._engine.step():
                conversation = open_ones[event.request_id]
                if isinstance(event, CanvasDone):
                    if event.token_ids and conversation.first_text is None:
                        conversation.first_text = self._clock() - conversation.asked
                    conversation.ids += event.token_ids
                elif isinstance(event, Finished):
                    del open_ones[event.request_id]
                    yield self._answered(conversation, event)
                    if not conversation.over:
                        resting.append(conversation)

    def _ask(self, conversation: Conversation) -> str:
        conversation.messages.append({"role": "user", "content": conversation.questions[conversation.turn]})
        prompt = self._renderer.render(conversation.messages).ids
        room = self._engine.info.context_length - len(prompt)
        if room < 1:
            raise EngineError(
                f"turn {conversation.turn + 1} has {len(prompt)} tokens of history, more than the context of "
                f"{self._engine.info.context_length}; ask for fewer turns or shorter replies"
            )
        request = GenerationRequest(
            id=f"{conversation.number}/{conversation.turn}",
            prompt_ids=prompt,
            max_tokens=room if self._max_tokens is None else min(room, self._max_tokens),
            sampling=Sampling(seed=1000 * conversation.number + conversation.turn),
        )
        conversation.ids, conversation.first_text = [], None
        conversation.asked = self._clock()
        self._engine.submit(request)
        return request.id

    def _answered(self, conversation: Conversation, event: Finished) -> Turn:
        seconds = self._clock() - conversation.asked
        if event.reason == "error":
            raise EngineError(f"the engine gave up on turn {conversation.turn + 1}: {event.error}")
        self.replies[conversation.number, conversation.turn] = tuple(conversation.ids)
        conversation.messages.append({"role": "assistant", "content": self._content(conversation.ids)})
        conversation.turn += 1
        return Turn(
            conversation=conversation.number,
            turn=conversation.turn,
            prompt_tokens=event.usage.prompt_tokens,
            cached_tokens=event.usage.cached_tokens,
            completion_tokens=event.usage.completion_tokens,
            denoise_steps=event.usage.denoise_steps,
            finish_reason=event.reason,
            seconds=seconds,
            seconds_to_first_text=conversation.first_text,
        )

    def _content(self, ids: Sequence[int]) -> str:
        """What a client would keep of a reply."""
        detokenizer, parser = self._renderer.detokenizer(), OutputParser()
        for token_id in ids:
            parser.push(detokenizer.push(token_id))
        parser.push(detokenizer.finish())
        return (parser.take() + parser.finish()).content


@dataclass(frozen=True, kw_only=True)
class Way:
    """All conversations in one way: one after the other, or at once."""

    turns: tuple[Turn, ...]
    seconds: float  # wall clock, everything included
    replies: dict[tuple[int, int], tuple[int, ...]]

    def __add__(self, other: Way) -> Way:
        """One, then the other."""
        return Way(
            turns=self.turns + other.turns,
            seconds=self.seconds + other.seconds,
            replies=self.replies | other.replies,
        )

    @property
    def tokens(self) -> int:
        return sum(turn.completion_tokens for turn in self.turns)

    @property
    def tokens_per_second(self) -> float | None:
        return ratio(self.tokens, self.seconds)


@dataclass(frozen=True)
class Bench:
    """A conversation of `turns` turns; or several, one after the other and then `parallel` of them at once."""

    build: Callable[[], Engine]
    renderer: Callable[[EngineInfo], PromptRenderer]
    turns: int = field(kw_only=True)
    parallel: int = field(kw_only=True)
    max_tokens: int | None = field(default=None, kw_only=True)
    clock: Clock = field(default=time.perf_counter, kw_only=True)

    def measure(self, questions: Sequence[str] | None) -> tuple[EngineInfo, Way, Way | None]:
        """`questions` are asked in turn; None = a story, then sums, others in every conversation. Raises
        EngineError."""
        if self.parallel == 1:
            info, alone = self._way(self._chats(questions, 1))
            return info, alone, None
        count = self.parallel * ROUNDS
        info, before = self._way(self._chats(questions, count)[: count // 2])
        _, together = self._way(self._chats(questions, count), at_once=self.parallel)
        _, behind = self._way(self._chats(questions, count)[count // 2 :])
        return info, before + behind, together

    def report(self, questions: Sequence[str] | None, headline: Callable[[EngineInfo], str], path: Path | None) -> None:
        """Measure, print tables and the JSON document, and write the latter to `path` too."""
        info, alone, together = self.measure(questions)
        console = Console(highlight=False)
        console.print(headline(info))
        for title, way in titled(alone, together):
            console.print(table(title, way))
        for line in totals(alone, together):
            console.print(line)
        found = document(info, alone, together)
        if path is not None:
            path.write_text(found + "\n", encoding="utf-8")
        print(found)

    def _chats(self, questions: Sequence[str] | None, count: int) -> list[Conversation]:
        chats = []
        for number, story in enumerate(story_prompts(count)):
            asked = questions or [story, *(f"What is {10 + number} + {20 + turn}?" for turn in range(1, self.turns))]
            chats.append(Conversation(number, [asked[turn % len(asked)] for turn in range(self.turns)]))
        return chats

    def _way(self, chats: Sequence[Conversation], *, at_once: int = 1) -> tuple[EngineInfo, Way]:
        with closing(self.build()) as engine:
            talks = Talks(engine, self.renderer(engine.info), max_tokens=self.max_tokens, clock=self.clock)
            list(talks.run([Conversation(len(chats), ["Who are you?"])]))  # warm-up, not counted
            talks.replies.clear()
            began = self.clock()
            done = tuple(talks.run(chats, at_once=at_once))
            return engine.info, Way(turns=done, seconds=self.clock() - began, replies=talks.replies)


def document(info: EngineInfo, alone: Way, together: Way | None) -> str:
    """Everything measured, as one JSON object."""

    def way(found: Way) -> dict[str, Any]:
        return {
            "completion_tokens": found.tokens,
            "seconds": found.seconds,
            "tokens_per_second": found.tokens_per_second,
            "turns": [asdict(turn) for turn in found.turns],
        }

    summary: dict[str, Any] = {"one_after_the_other": way(alone)}
    if together is not None:
        summary["at_once"] = way(together)
        summary["throughput_ratio"] = ratio(together.tokens_per_second or 0.0, alone.tokens_per_second or 0.0)
        summary["same_replies"] = together.replies == alone.replies
    engine = asdict(info) | {"eos_ids": sorted(info.eos_ids)}
    return json.dumps({"bench": "turns", "engine": engine, **summary})


def titled(alone: Way, together: Way | None) -> Iterator[tuple[str, Way]]:
    """The ways there are, by name."""
    yield "one after the other", alone
    if together is not None:
        yield "at once", together


def table(title: str, way: Way) -> Table:
    """One way for people: the median over conversations for every turn."""
    shown = Table(title=title, title_style="dim", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for name in ("turn", "prompt", "cached", "new", "tokens", "steps", "first\ntext s", "seconds", "tokens\n/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for number in sorted({turn.turn for turn in way.turns}):
        rows = [turn for turn in way.turns if turn.turn == number]
        first = [turn.seconds_to_first_text for turn in rows if turn.seconds_to_first_text is not None]
        speeds = [turn.completion_tokens / turn.seconds for turn in rows if turn.seconds]
        counts = [
            [turn.turn for turn in rows],
            [turn.prompt_tokens for turn in rows],
            [turn.cached_tokens for turn in rows],
            [turn.prompt_tokens - turn.cached_tokens for turn in rows],
            [turn.completion_tokens for turn in rows],
            [turn.denoise_steps for turn in rows],
        ]
        shown.add_row(
            *(f"{median(count):.0f}" for count in counts),
            f"{median(first):.3f}" if first else "-",
            f"{median(turn.seconds for turn in rows):.3f}",
            f"{median(speeds):.1f}" if speeds else "-",
        )
    return shown


def totals(alone: Way, together: Way | None) -> Iterator[str]:
    """Lines to print below the table."""
    for title, way in titled(alone, together):
        speed = "-" if way.tokens_per_second is None else f"{way.tokens_per_second:.1f}"
        yield f"{title}: {way.tokens} tokens in {way.seconds:.2f} s, {speed} a second"
    if together is not None:
        factor = ratio(together.tokens_per_second or 0.0, alone.tokens_per_second or 0.0)
        same = "the same replies" if together.replies == alone.replies else "other replies"
        yield f"{'-' if factor is None else f'{factor:.2f}'} times the throughput, {same}"
