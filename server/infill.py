"""Infill: text that fits between a prompt and a suffix, which only a canvas that sees both sides can write.

The suffix stands held on the canvas behind a gap. How long the gap is nobody knows, so several lengths are tried, a
batch of canvases at a time, and the likeliest is kept. Once denoised every gap looks sure, so each is judged by two
single passes more: what the model makes of the gap while it is noise, and of the beginning of the suffix while that is
noise behind the filled gap. The score is the mean log-probability of the one plus that of the other, at temperature 1.
Long gaps are tried only where no short one is convincing. Knows prompts, lengths and scores; no wire format.

Invariant: prompt + text + suffix is what the model was shown, but for what a stop string cuts off.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from engine import CanvasRead, CanvasRequest, Sampling
from server import errors
from server.canvases import read_canvases
from server.chat import ChatService, check_biases, choose_seed, sampling
from server.errors import invalid
from server.exchange import ChatTask, ChoiceDone, Delta, FinishReason, ReplyDone, StreamItem
from server.output_parser import StopStrings
from server.prompt import PromptTooLong
from server.replies import Folded, Reply, fold

EOS = "<eos>"
SHORT = tuple(range(1, 9))  # gap lengths tried first
LONG = (10, 12, 15, 19, 24, 30, 38, 48), (60, 75, 94, 118, 147, 184, 230)  # and then, a batch at a time
CONVINCING = -0.5  # score from which on nothing longer is tried
ENTROPY_BOUND = 0.02  # nats; below the checkpoint's, for a gap is short and a slip in it is not mended later
JUDGED = 4  # tokens of the suffix that are judged
ALIKE = 0.02  # scores that differ by less say nothing
RIGHT_CONTEXT = 16  # tokens of the suffix that must have room on the canvas


_Judged = tuple[
    tuple[int | None, ...], tuple[tuple[int, ...], ...]
]  # a canvas, and what is asked for at its free places


@dataclass(frozen=True)
class _Gap:
    """What is to be filled. `spaces` ended the prompt; they are part of the gap, where they make better tokens."""

    prompt: tuple[int, ...]
    spaces: str
    suffix: tuple[int, ...]
    most: int  # tokens of the gap

    def canvas(self, length: int, canvas_length: int) -> tuple[int | None, ...]:
        """The canvas with a gap of so many tokens; what of the suffix has no room is left away."""
        return ((None,) * length + self.suffix)[:canvas_length]


@dataclass(frozen=True)
class _Try:
    """One length that became certain."""

    text: str
    ids: tuple[int, ...]
    score: float = 0.0

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass
class _Work:
    """What it all cost."""

    canvases: int = 0
    steps: int = 0
    completion_tokens: int = 0
    first_text: float | None = None


async def open_reply(service: ChatService, task: ChatTask) -> Reply:
    """Start a task, be it infill or not. Raises ApiError before anything of the reply exists."""
    if task.suffix is None:
        return await service.open(task)
    if task.model is not None and task.model not in service.model_names:
        raise errors.unknown_model(task.model, service.model_names)
    if task.structure is not None:
        name = task.structure.param
        raise errors.invalid(f"'{name}' is not supported together with a suffix", param=name, code="unsupported_value")
    began = time.monotonic()
    # Long prompts take a while to tokenise; other replies go on meanwhile.
    gaps = await asyncio.to_thread(_gaps, service, task)
    check_biases(task, service.bridge.info.vocab_size)
    return InfillReply(service, task, gaps, began)


def _gaps(service: ChatService, task: ChatTask) -> list[_Gap]:
    prompts, info = service.prompts, service.bridge.info
    assert task.suffix is not None, "this is infill"
    # what surely has no room on a canvas need not be tokenised
    suffix = prompts.encode_raw(task.suffix[: info.canvas_length * prompts.longest], begin=False)
    if not suffix or suffix[-1] not in info.eos_ids:
        suffix = [*suffix, *([prompts.control.ids[EOS]] if EOS in prompts.control.ids else [])]
    most = info.canvas_length - min(len(suffix), RIGHT_CONTEXT)
    if task.max_tokens is not None:
        most = min(most, task.max_tokens)
    gaps = []
    for prompt in task.prompts:
        text = prompt.rstrip(" ") if isinstance(prompt, str) else ""
        healed = text and isinstance(prompt, str)
        try:
            ids = prompts.raw(text if healed else prompt or [_begin(service)], info.context_length).ids
        except PromptTooLong as error:
            raise _too_long(service, error.tokens, exact=False) from error
        if len(ids) >= info.context_length:
            raise _too_long(service, len(ids))
        spaces = prompt[len(text) :] if healed and isinstance(prompt, str) else ""
        gaps.append(_Gap(ids, spaces, tuple(suffix), most))
    return gaps


def _begin(service: ChatService) -> int:
    """What a prompt of nothing begins with."""
    begin = service.prompts.encode_raw("", begin=True)
    if not begin:
        raise invalid("The prompt is empty", param="prompt")
    return begin[0]


def _too_long(service: ChatService, tokens: int, *, exact: bool = True) -> errors.ApiError:
    context = service.bridge.info.context_length
    return errors.context_length_exceeded(
        exact=exact, prompt_tokens=tokens, completion_tokens=1, context_length=context, param="prompt"
    )


@dataclass
class InfillReply:
    """The filled gaps, one choice each (n of each prompt). Tokens of all lengths tried count as work, not as reply."""

    _service: ChatService
    _task: ChatTask
    _gaps: Sequence[_Gap]
    _began: float
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    logprobs: int | None = None
    _work: _Work = field(default_factory=_Work)
    _stream: AsyncGenerator[StreamItem, None] | None = None

    @property
    def model(self) -> str:
        """The model's name, as the client called it."""
        return self._task.model or self._service.model_names[0]

    @property
    def choices(self) -> int:
        """How many choices the reply has."""
        return len(self._gaps) * self._task.choices

    @property
    def prompt_tokens(self) -> int:
        """Tokens before and behind the gaps."""
        return sum(len(gap.prompt) + len(gap.suffix) for gap in self._gaps)

    async def close(self) -> None:
        """Stop what still runs; leaving the stream does the same."""
        if self._stream is not None:
            await self._stream.aclose()

    def stream(self) -> AsyncGenerator[StreamItem, None]:
        """Each filled gap as soon as it is. Raises ApiError when the engine gives up."""
        self._stream = self._filled()
        return self._stream

    def watched(self) -> AsyncGenerator[StreamItem, None]:
        """The same: there is no draft of a gap."""
        return self.stream()

    async def fold(self) -> Folded:
        """The whole reply at once."""
        async with aclosing(self.stream()) as items:
            return await fold(items, self.choices)

    async def _filled(self) -> AsyncGenerator[StreamItem, None]:
        seed = choose_seed(self._task)
        for choice in range(self.choices):
            best = await self._fill(self._gaps[choice // self._task.choices], (seed + choice) % 2**64)
            stop = StopStrings(self._task.stop)
            text = stop.push(best.text) + stop.finish() if best is not None else ""
            if best is not None:
                self._work.completion_tokens += best.tokens
            if text:
                self._work.first_text = self._work.first_text or time.monotonic()
                yield Delta(choice=choice, content=text)
            reason: FinishReason = "length" if best is None else "stop"
            yield ChoiceDone(choice=choice, finish_reason=reason, stop_string=stop.matched)
        yield self._done(seed)

    async def _fill(self, gap: _Gap, seed: int) -> _Try | None:
        """The likeliest way to fill a gap; None if no length became certain."""
        tried: dict[int, _Try | None] = {}
        for lengths in (SHORT, *LONG):
            await self._attempt(gap, seed, lengths, tried)
            best = _best(tried)
            if best is not None and best.score >= CONVINCING:
                return best
        if best is not None and best.tokens >= SHORT[-1]:  # the lengths around it were left out
            close = range(max(1, best.tokens - 4), best.tokens + 5)
            await self._attempt(gap, seed, close, tried)
        return _best(tried)

    async def _attempt(self, gap: _Gap, seed: int, lengths: Sequence[int], tried: dict[int, _Try | None]) -> None:
        """Try gap lengths that were not tried yet."""
        new = [length for length in lengths if length <= gap.most and length not in tried]
        info = self._service.bridge.info
        never = {*info.eos_ids, *self._service.prompts.control.names}
        biases = {**dict(self._task.logit_bias), **dict.fromkeys(never, -100.0)}
        drawn = replace(sampling(self._task, seed), logit_bias=tuple(sorted(biases.items())))
        schedule = self._task.schedule
        if schedule.entropy_bound is None:
            schedule = replace(schedule, entropy_bound=ENTROPY_BOUND)
        whole = CanvasRequest(id="", prompt_ids=gap.prompt, canvas=(), sampling=drawn, schedule=schedule)
        reads = await self._read([replace(whole, canvas=gap.canvas(length, info.canvas_length)) for length in new])
        found = [
            None if read is None else self._filled_with(gap, length, read)
            for length, read in zip(new, reads, strict=True)
        ]
        fitting = [each for each in found if each is not None]
        judged = replace(whole, sampling=Sampling(seed=seed))
        noisy = [_with_noisy_gap(gap, each, info.canvas_length) for each in fitting]
        noisy += [_with_noisy_suffix(gap, each, info.canvas_length) for each in fitting]
        scores = [
            sum(logprob for (logprob,) in read.allowed) / len(read.allowed) if read is not None else -math.inf
            for read in await self._read([replace(judged, canvas=canvas, allowed=ids) for canvas, ids in noisy])
        ]
        tried |= dict.fromkeys(new)
        for place, each in enumerate(fitting):
            tried[each.tokens] = replace(each, score=scores[place] + scores[place + len(fitting)])

    async def _read(self, requests: Sequence[CanvasRequest]) -> list[CanvasRead | None]:
        results = await read_canvases(self._service.bridge, requests, param="prompt")
        self._work.canvases += len(results)
        self._work.steps += sum(result.usage.denoise_steps for result in results)
        return [result.read for result in results]

    def _filled_with(self, gap: _Gap, length: int, read: CanvasRead) -> _Try | None:
        """What a canvas came to; None where it does not begin with the spaces that were taken off the prompt."""
        ids = read.token_ids[:length]
        text = self._service.prompts.decode(ids)
        return _Try(text.removeprefix(gap.spaces), ids) if text.startswith(gap.spaces) else None

    def _done(self, seed: int) -> ReplyDone:
        work, now = self._work, time.monotonic()
        return ReplyDone(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=0,  # of one canvas to the next, which is no merit of the prompt
            completion_tokens=work.completion_tokens,
            reasoning_tokens=0,
            canvases=work.canvases,
            steps=work.steps,
            seed=seed,
            seconds=now - self._began,
            seconds_to_first_text=None if work.first_text is None else work.first_text - self._began,
        )


def _with_noisy_gap(gap: _Gap, filled: _Try, canvas_length: int) -> _Judged:
    """The canvas whose gap is noise, to be asked for the tokens that were found in it."""
    return gap.canvas(filled.tokens, canvas_length), tuple((token_id,) for token_id in filled.ids)


def _with_noisy_suffix(gap: _Gap, filled: _Try, canvas_length: int) -> _Judged:
    """The canvas whose gap is filled and the beginning of whose suffix is noise, to be asked for the latter."""
    begins = gap.suffix[: min(JUDGED, canvas_length - filled.tokens)]
    canvas = (*filled.ids, *(None,) * len(begins), *gap.suffix[len(begins) :])[:canvas_length]
    return canvas, tuple((token_id,) for token_id in begins)


def _best(tried: dict[int, _Try | None]) -> _Try | None:
    """The likeliest; of convincing ones as likely, the shortest: a longer one may say the same thing twice."""
    found = [each for each in tried.values() if each is not None]
    highest = max((each.score for each in found), default=0.0)
    near = highest - (ALIKE if highest >= CONVINCING else 0.0)
    return min((each for each in found if each.score >= near), key=lambda each: each.tokens, default=None)
