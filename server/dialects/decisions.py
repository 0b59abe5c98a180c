"""OpenAI's decisions: questions with fixed answers, each read off one denoise pass.

The model is asked for the letter of an option. Its reply is laid out on the canvas with the letters left free, and
what one pass finds there, at temperature 1 and among the letters that stand for an option, are the probabilities: no
text is generated. Each question has a canvas of its own; with `joint` all share one, on which no answer knows of the
others. Knows this one wire format and the wording of the questions.

Invariant: the letters' tokens are distinct, and each is one token at its place.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from engine import CanvasRequest, Sampling
from server.canvases import CanvasResult, read_canvases
from server.chat import ChatService
from server.dialects.decisions_schema import ChoiceQuestion, DecisionsRequest, Predicate, Question, ScoreQuestion
from server.errors import context_length_exceeded, invalid, unknown_model
from server.prompt import CHANNEL_CLOSE, CHANNEL_OPEN, PromptRenderer, PromptTooLong
from server.schema import parse

Json = dict[str, Any]

_NO_THOUGHT = f"{CHANNEL_OPEN}thought\n{CHANNEL_CLOSE}"  # outside of the canvas, where the model expects it
_TURN_END = "<turn|>"
MAX_CHARACTERS = 8_000_000  # of input, counted once for each canvas: tokenising them takes seconds
_ONE = "Answer with the letter of one option only."
_SEVERAL = "Answer every question with the letter of one option only, one line each: its number, a colon, the letter."


@dataclass(frozen=True)
class _Layout:
    """A reply with its letters left free: the canvas, and the tokens that may stand at each free place."""

    canvas: tuple[int | None, ...]
    allowed: tuple[tuple[int, ...], ...]


async def decide(service: ChatService, document: bytes) -> Json:
    """Answer a request. Raises ApiError."""
    request = parse(DecisionsRequest, document)
    if request.model is not None and request.model not in service.model_names:
        raise unknown_model(request.model, service.model_names)
    # Long inputs take a while to tokenise; other replies go on meanwhile.
    reads = await asyncio.to_thread(_reads, service, request)
    results = await read_canvases(service.bridge, reads, param="input")
    found = [logprobs for result in results if result.read is not None for logprobs in result.read.allowed]
    answers = [_answer(question, logprobs) for question, logprobs in zip(request.questions, found, strict=True)]
    return {
        "answers": answers,
        "model": request.model or service.model_names[0],
        "usage": _usage(results),
        "easel": {
            "steps": sum(result.usage.denoise_steps for result in results),
            # how much of the whole vocabulary's probability the options have: little means it wanted to say else
            "label_mass": [round(sum(map(math.exp, logprobs)), 6) for logprobs in found],
        },
    }


def _reads(service: ChatService, request: DecisionsRequest) -> list[CanvasRequest]:
    """The canvases to read. Raises ApiError."""
    groups = [request.questions] if request.joint else [[question] for question in request.questions]
    evidence = request.evidence
    if len(groups) * len(evidence) > MAX_CHARACTERS:
        message = f"The input would be read {len(groups)} times, more than {MAX_CHARACTERS} characters together"
        raise invalid(f"{message}. Ask fewer questions at a time, or set 'joint'.", param="questions")
    letters = _letters(service.prompts, max(len(question.options) for question in request.questions))
    sampling = Sampling(seed=request.seed % 2**64)
    reads = []
    for group in groups:
        layout = _layout(service, group, letters)
        prompt = _prompt(service, question_text(evidence, group, letters))
        reads.append(
            CanvasRequest(id="", prompt_ids=prompt, canvas=layout.canvas, sampling=sampling, allowed=layout.allowed)
        )
    return reads


def question_text(evidence: str, questions: Sequence[Question], letters: Sequence[str] = ascii_uppercase) -> str:
    """What the model is asked."""
    asked = []
    for number, question in enumerate(questions, 1):
        lines = [f"Question {number}: {question.asked}" if len(questions) > 1 else f"Question: {question.asked}"]
        for letter, (option, description) in zip(letters, question.options, strict=False):
            lines.append(f"{letter}: {option} - {description}" if description else f"{letter}: {option}")
        asked.append("\n".join(lines))
    return "\n\n".join((evidence, *asked)) + "\n" + (_SEVERAL if len(questions) > 1 else _ONE)


def _letters(prompts: PromptRenderer, count: int) -> list[str]:
    """Letters for so many options: capitals, small ones, then pairs of capitals, of which a tokenizer has some as one
    token. Raises ApiError (400) if this one has too few."""
    pairs = (first + second for first in ascii_uppercase for second in ascii_uppercase)
    single = (
        letter
        for letter in itertools.chain(ascii_uppercase, ascii_lowercase, pairs)
        if len(prompts.encode(letter)) == 1
    )
    letters = list(itertools.islice(single, count))
    if len(letters) < count:
        message = f"This model's tokenizer has letters for {len(letters)} options of a question, and {count} were given"
        raise invalid(message, param="questions")
    return letters


def _prompt(service: ChatService, text: str) -> tuple[int, ...]:
    prompts, context = service.prompts, service.bridge.info.context_length
    messages = [{"role": "user", "content": text}]
    try:
        prompt = prompts.render(messages, (), {"enable_thinking": False}, context)
    except PromptTooLong as error:
        raise context_length_exceeded(
            exact=False, prompt_tokens=error.tokens, completion_tokens=1, context_length=context, param="input"
        ) from error
    tail = tuple(prompts.encode_raw(_NO_THOUGHT, begin=False)) if CHANNEL_OPEN in prompts.control.ids else ()
    return prompt.ids if prompt.ids[-len(tail) :] == tail else prompt.ids + tail


def _layout(service: ChatService, questions: Sequence[Question], letters: Sequence[str]) -> _Layout:
    """The reply to some questions. Raises ApiError (400) if it does not fit a canvas."""
    prompts, several = service.prompts, len(questions) > 1
    spaced = several and all(len(prompts.encode(f" {letter}")) == 1 for letter in letters)
    canvas: list[int | None] = []
    allowed = []
    for number, question in enumerate(questions, 1):
        if several:
            canvas += prompts.encode(f"{number}:" if number == 1 else f"\n{number}:")
        canvas.append(None)
        spelled = (f" {letter}" if spaced else letter for letter in letters[: len(question.options)])
        allowed.append(tuple(prompts.encode(each)[0] for each in spelled))
    canvas.append(prompts.control.ids[_TURN_END])
    if len(canvas) > service.bridge.info.canvas_length:
        message = f"'joint' takes as many questions as fit {service.bridge.info.canvas_length} tokens of reply"
        raise invalid(f"{message}: these take {len(canvas)}. Ask fewer, or without 'joint'.", param="questions")
    return _Layout(tuple(canvas), tuple(allowed))


def _answer(question: Question, logprobs: Sequence[float]) -> Json:
    """The answer in its typed form. `confidence` is the chosen option's share of the whole vocabulary's probability."""
    highest = max(logprobs)
    weights = [math.exp(each - highest) for each in logprobs]
    shares = [weight / sum(weights) for weight in weights]
    top = logprobs.index(highest)
    head: Json = {"type": question.type, "name": question.name}
    if isinstance(question, Predicate):
        return {**head, "probability": shares[1]}
    if isinstance(question, ChoiceQuestion):
        values = [choice.value for choice in question.choices]
        return {
            **head,
            "choice": values[top],
            "confidence": math.exp(highest),
            "probabilities": [
                {"value": value, "probability": share} for value, share in zip(values, shares, strict=True)
            ],
        }
    assert isinstance(question, ScoreQuestion)
    return {
        **head,
        "score": sum(value * share for value, share in enumerate(shares)),
        "confidence": math.exp(highest),
        "probabilities": [
            {"value": value, "label": level.label, "probability": share}
            for value, (level, share) in enumerate(zip(question.levels, shares, strict=True))
        ],
    }


def _usage(results: Sequence[CanvasResult]) -> Json:
    prompt = sum(result.usage.prompt_tokens for result in results)
    cached = sum(result.usage.cached_tokens for result in results)
    answered = sum(result.usage.completion_tokens for result in results)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "output_tokens": answered,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + answered,
    }
