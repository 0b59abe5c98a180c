"""The flow of a chat: task -> prompt -> engine events -> deltas. Read this file first.

Knows no HTTP and no wire format: those are in `app` and `dialects`. Both renderings of a reply come from the one
stream made here; the non-streamed body is its fold. Invariant: leaving a reply early cancels its engine work.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace

from engine import (
    CanvasDone,
    CanvasDraft,
    Constraint,
    Event,
    Finished,
    GenerationRequest,
    QueueFull,
    RequestTooLong,
    Sampling,
)
from server import errors, tool_schema
from server.bridge import Bridge, EngineUnavailable
from server.call_memory import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, CallMemory, CallSpans
from server.drafts import Drafts
from server.errors import ApiError
from server.exchange import ChatTask, ChoiceDone, Delta, Draft, FinishReason, ReplyDone, StreamItem, ToolCall
from server.grammar import held, needs_grammar
from server.images import ImageReader, Patches, read_images
from server.likelihoods import Likelihoods
from server.output_parser import OutputParser, Parsed, StopStrings
from server.prompt import Marker, Prompt, PromptRenderer, PromptTooLong
from server.replies import Folded, fold, without_drafts
from server.structure import Structures
from server.tool_calls import new_call_id

# Random seeds stay below 2**53 so that they survive JavaScript's numbers and can be sent back.
_RANDOM_SEED_BITS = 53


class ChatService:
    """Answers chat tasks with one engine and one tokenizer. The first model name is the primary one."""

    def __init__(
        self, bridge: Bridge, prompts: PromptRenderer, model_names: Sequence[str], images: ImageReader | None = None
    ) -> None:
        """`images`: None for a model that takes none."""
        if not model_names:
            raise ValueError("a chat service needs at least one model name")
        self.bridge = bridge
        self.prompts = prompts
        self._images = images
        info = bridge.info
        self._structures = Structures(prompts, vocab_size=info.vocab_size, eos_ids=info.eos_ids)
        self.model_names = tuple(dict.fromkeys(model_names))
        self._calls = CallMemory()
        self._drafts = Drafts(prompts)
        self.loaded_at = int(time.time())

    async def open(self, task: ChatTask) -> ChatReply:
        """Check, render and start a task. Raises ApiError before anything of the reply exists.

        The caller must `close` the reply, whatever happens.
        """
        began = time.monotonic()
        if task.model is not None and task.model not in self.model_names:
            raise errors.unknown_model(task.model, self.model_names)
        # Long prompts take a while to tokenise, grammars to compile; other replies go on meanwhile.
        prompts = await asyncio.to_thread(self.render, task)
        constraints = await asyncio.to_thread(self._constraints, task, prompts)
        seed = choose_seed(task)
        requests = [request for prompt in prompts for request in self._engine_requests(task, prompt, seed)]
        requests = [
            replace(request, constraint=constraint) for request, constraint in zip(requests, constraints, strict=True)
        ]
        reply_id = secrets.token_hex(12)
        requests = [replace(request, id=f"{reply_id}/{index}") for index, request in enumerate(requests)]
        async with AsyncExitStack() as stack:
            try:
                streams = [await stack.enter_async_context(self.bridge.generate(request)) for request in requests]
            except RequestTooLong as error:
                raise self._too_long(task, error.prompt_tokens, error.context_length) from error
            except QueueFull as error:
                raise errors.queue_full() from error
            except EngineUnavailable as error:
                raise errors.unavailable(str(error).capitalize()) from error
            choices = [
                _Choice(index, task, prompts[index // task.choices], self.prompts, self._calls)
                for index in range(len(requests))
            ]
            running = [
                _Running(request, stream, choice)
                for request, stream, choice in zip(requests, streams, choices, strict=True)
            ]
            return ChatReply(
                self.bridge,
                self._drafts,
                running,
                stack.pop_all(),
                model=task.model or self.model_names[0],
                logprobs=task.logprobs,
                prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
                choices_each=task.choices,
                began=began,
            )

    def render(self, task: ChatTask) -> list[Prompt]:
        """The prompts of a task: one, unless it carries several itself. Raises ApiError (400)."""
        most = self.bridge.info.context_length
        try:
            if task.prompts:
                return [self.prompts.raw(prompt, most) for prompt in task.prompts]
            tools = tool_schema.for_template(task.tools)
            written, images, options = self._calls.recall(task.messages), self.read_images(task), task.template_options
            return [self.prompts.render(task.messages, tools, options, most, calls=written, images=images)]
        except PromptTooLong as error:
            raise self._too_long(task, error.tokens, most, exact=False) from error

    def read_images(self, task: ChatTask) -> list[Patches]:
        """The images of a task's messages. Raises ApiError (400)."""
        return read_images(self._images, task.messages, self.bridge.info.context_length)

    def _constraints(self, task: ChatTask, prompts: Sequence[Prompt]) -> list[Constraint | None]:
        """One for each choice of each prompt: each stands somewhere else in its reply."""
        return [self._structures.constraint(task, prompt.opens_in) for prompt in prompts for _ in range(task.choices)]

    def _engine_requests(self, task: ChatTask, prompt: Prompt, seed: int) -> list[GenerationRequest]:
        left = self.bridge.info.context_length - len(prompt.ids)
        if left < 1:
            raise self._too_long(task, len(prompt.ids), self.bridge.info.context_length)
        check_biases(task, self.bridge.info.vocab_size)
        return [
            GenerationRequest(
                id="",  # numbered by the caller
                prompt_ids=prompt.ids,
                # A limit above what is left is no mistake: many clients send a generous one unasked.
                max_tokens=left if task.max_tokens is None else min(left, task.max_tokens),
                sampling=sampling(task, (seed + index) % 2**64),
                schedule=task.schedule,
                logprobs=task.logprobs,
                drafts=task.drafts,
                images=prompt.images,
            )
            for index in range(task.choices)
        ]

    @staticmethod
    def _too_long(task: ChatTask, prompt_tokens: int, context_length: int, *, exact: bool = True) -> ApiError:
        return errors.context_length_exceeded(
            exact=exact,
            prompt_tokens=prompt_tokens,
            completion_tokens=task.max_tokens or 1,
            context_length=context_length,
            param="prompt" if task.prompts else "messages",
        )


def choose_seed(task: ChatTask) -> int:
    """The seed asked for, or one of our own."""
    if task.seed is not None:
        return task.seed
    return 0 if task.temperature == 0 else secrets.randbits(_RANDOM_SEED_BITS)


def check_biases(task: ChatTask, vocab_size: int) -> None:
    """Raise ApiError (400) for a bias of a token that there is not."""
    for token_id, _ in task.logit_bias:
        if token_id >= vocab_size:
            message = f"'logit_bias' has a token id outside 0..{vocab_size - 1}: {token_id}"
            raise errors.invalid(message, param="logit_bias")


def sampling(task: ChatTask, seed: int) -> Sampling:
    """How the task draws, as the engine wants it."""
    return Sampling(
        seed=seed,
        temperature=task.temperature,
        top_k=task.top_k,
        top_p=task.top_p,
        min_p=task.min_p,
        logit_bias=task.logit_bias,
        presence_penalty=task.presence_penalty,
        frequency_penalty=task.frequency_penalty,
    )


class _Choice:
    """Text side of one choice: ids to deltas, and why it ended."""

    def __init__(self, index: int, task: ChatTask, prompt: Prompt, prompts: PromptRenderer, memory: CallMemory) -> None:
        self.index = index
        self._detokenizer = prompts.detokenizer()
        self.parser = OutputParser(
            prompt.opens_in, tools=_read_by(task), raw=bool(task.prompts), exact=needs_grammar(task)
        )
        self.echo = _written(task, index, prompts) if task.echo else ""
        self._stop = StopStrings(task.stop)
        self._most_calls = None if task.parallel_tool_calls else 1
        self._calls = 0
        self._likelihoods = None if task.logprobs is None else Likelihoods(prompts)
        self._memory = memory
        self._spans = CallSpans(*(prompts.control.ids.get(marker) for marker in (TOOL_CALL_OPEN, TOOL_CALL_CLOSE)))

    @property
    def satisfied(self) -> bool:
        """True when nothing the engine may still produce would be shown."""
        return self._stop.hit or self.parser.ended or self._calls == self._most_calls

    def canvas(self, done: CanvasDone) -> Delta | None:
        """What a canvas adds; None when all of it is held back."""
        if self.satisfied:
            return None
        if self._likelihoods is None:
            for token_id in done.token_ids:
                self._push(token_id, self._detokenizer.push(token_id))
            return self._delta(self.parser.take())
        whole = Parsed()
        for token_id, found in zip(done.token_ids, done.logprobs, strict=True):
            pieces = self._detokenizer.push(token_id)
            self._likelihoods.push(token_id, found, pieces)
            self._push(token_id, pieces)
            part = self.parser.take()
            self._likelihoods.parsed(len(part.content))
            whole = whole + part
        return self._delta(whole)

    def _push(self, token_id: int, pieces: Sequence[str | Marker]) -> None:
        self.parser.push(pieces)
        self._spans.push(token_id, self.parser.calls)

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, if one was."""
        return self._stop.matched

    def end(self, *, complete: bool) -> Delta | None:
        """What was held back until now. `complete`: the model ended the reply, it was not cut."""
        if self._stop.hit:
            return None
        if self._calls == self._most_calls:
            return self._delta(Parsed(), last=True)
        pieces = self._detokenizer.finish()
        self.parser.push(pieces)
        parsed = self.parser.finish(complete=complete)
        if self._likelihoods is not None:
            self._likelihoods.finish(pieces)
            self._likelihoods.parsed(len(parsed.content))
        return self._delta(parsed, last=True)

    def finish_reason(self, finished: Finished) -> FinishReason:
        """The one place where the reason is decided. Raises ApiError when the engine gave up."""
        if finished.reason == "error":
            raise errors.generation_failed(f"Generation failed: {finished.error or 'unknown cause'}")
        if finished.reason == "cancelled" and not self.satisfied:
            raise errors.unavailable("The server is shutting down")
        # A cut call must stay visible as "length", also when an earlier call is complete.
        if finished.reason == "length" and not self.satisfied:
            return "length"
        return "tool_calls" if self._calls else "stop"

    def _delta(self, parsed: Parsed, *, last: bool = False) -> Delta | None:
        content = self._stop.push(parsed.content)
        if last:
            content += self._stop.finish()
        calls = parsed.calls if self._most_calls is None else parsed.calls[: self._most_calls - self._calls]
        numbered = tuple(
            ToolCall(id=new_call_id(), index=self._calls + offset, name=call.name, arguments=call.arguments)
            for offset, call in enumerate(calls)
        )
        for call in numbered:
            if (written := self._spans.found.get(call.index)) is not None:
                self._memory.remember(call.id, call.name, call.arguments, written)
        self._calls += len(numbered)
        if not (parsed.reasoning or content or numbered):
            return None
        return Delta(
            choice=self.index,
            reasoning=parsed.reasoning,
            content=content,
            tool_calls=numbered,
            logprobs=() if self._likelihoods is None else self._likelihoods.take(len(content)),
        )


def _read_by(task: ChatTask) -> dict[str, tool_schema.Json] | None:
    """The schemas to read calls by. What is held to its schema says exactly what it means: nothing is to be guessed."""
    if not task.tools:
        return None
    declared = tool_schema.parameters(task.tools)
    if not needs_grammar(task):
        return declared
    functions = [tool["function"] for tool in task.tools]
    return {each["name"]: {} if held(task, each) else declared[each["name"]] for each in functions}


def _written(task: ChatTask, index: int, prompts: PromptRenderer) -> str:
    """The prompt of a choice as its client wrote it."""
    prompt = task.prompts[index // task.choices]
    return prompt if isinstance(prompt, str) else prompts.decode(prompt)


@dataclass
class _Running:
    """One choice being generated."""

    request: GenerationRequest
    events: AsyncIterator[Event]
    choice: _Choice
    finished: Finished | None = None


@dataclass
class ChatReply:
    """A reply on its way. Stream it or fold it, once; then close it."""

    _bridge: Bridge
    _drafts: Drafts
    _running: list[_Running]
    _stack: AsyncExitStack
    model: str = field(kw_only=True)
    logprobs: int | None = field(default=None, kw_only=True)  # as in ChatTask
    prompt_tokens: int = field(kw_only=True)  # of all prompts together
    choices_each: int = field(kw_only=True)  # per prompt
    began: float = field(kw_only=True)
    created: int = field(default_factory=lambda: int(time.time()), kw_only=True)

    @property
    def id(self) -> str:
        """The reply's id, the same on every chunk; a wire format puts its own word in front."""
        return self._running[0].request.id.partition("/")[0]

    @property
    def choices(self) -> int:
        """How many choices the reply has."""
        return len(self._running)

    async def close(self) -> None:
        """Cancel whatever still runs. May be called at any time, also twice."""
        await self._stack.aclose()

    def stream(self) -> AsyncGenerator[StreamItem, None]:
        """The reply as it comes. Raises ApiError when the engine gives up."""
        return without_drafts(self.watched())

    async def watched(self) -> AsyncGenerator[StreamItem | Draft, None]:
        """The same, with the drafts between if the task asked for them."""
        first_text: float | None = None
        for running in self._running:
            if running.choice.echo:
                yield Delta(choice=running.choice.index, content=running.choice.echo)
        async with aclosing(self._merged()) as events:
            async for running, event in events:
                choice, delta = running.choice, None
                if isinstance(event, CanvasDraft) and not choice.satisfied:
                    yield self._drafts.draft(choice.index, event)
                if isinstance(event, CanvasDone):
                    delta = choice.canvas(event)
                    if choice.satisfied:
                        self._bridge.cancel(running.request.id)
                elif isinstance(event, Finished):
                    running.finished = event
                    delta = choice.end(complete=event.reason == "stop")
                if delta is not None:
                    if first_text is None:
                        first_text = time.monotonic()
                        self._bridge.metrics.first_text(first_text - self.began)
                    yield delta
                if isinstance(event, Finished):
                    reason = choice.finish_reason(event)
                    yield ChoiceDone(choice=choice.index, finish_reason=reason, stop_string=choice.stop_string)
        yield self._done(first_text)

    async def fold(self) -> Folded:
        """The whole reply at once: the sum of its stream."""
        async with aclosing(self.stream()) as items:
            return await fold(items, self.choices)

    async def _merged(self) -> AsyncGenerator[tuple[_Running, Event], None]:
        """Events of all choices in the order they happen."""
        waiting = {asyncio.ensure_future(anext(running.events)): running for running in self._running}
        try:
            while waiting:
                ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in sorted(ready, key=lambda each: waiting[each].choice.index):
                    running = waiting.pop(future)
                    event = future.result()
                    if not isinstance(event, Finished):
                        waiting[asyncio.ensure_future(anext(running.events))] = running
                    yield running, event
        finally:
            for future in waiting:
                future.cancel()

    def _done(self, first_text: float | None) -> ReplyDone:
        usages = [running.finished.usage for running in self._running if running.finished is not None]
        return ReplyDone(
            prompt_tokens=self.prompt_tokens,
            # each prompt counts once: its first choice found what was there before this request
            cached_tokens=sum(usage.cached_tokens for usage in usages[:: self.choices_each]),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            reasoning_tokens=sum(running.choice.parser.reasoning_tokens for running in self._running),
            canvases=sum(usage.canvases for usage in usages),
            steps=sum(usage.denoise_steps for usage in usages),
            seed=self._running[0].request.sampling.seed,
            seconds=time.monotonic() - self.began,
            seconds_to_first_text=None if first_text is None else first_text - self.began,
        )
