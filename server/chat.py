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
from server.call_memory import CallMemory
from server.choice import Choice
from server.drafts import Drafts
from server.errors import ApiError
from server.exchange import ChatTask, ChoiceDone, Delta, Draft, ReplyDone, StreamItem
from server.images import ImageReader, Patches, read_images
from server.prompt import Prompt, PromptRenderer, PromptTooLong
from server.replies import Folded, fold, without_drafts
from server.structure import Structures

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
                Choice(index, task, prompts[index // task.choices], self.prompts, self._calls)
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


@dataclass
class _Running:
    """One choice being generated."""

    request: GenerationRequest
    events: AsyncIterator[Event]
    choice: Choice
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
        if len(self._running) == 1:  # nearly always; no task is needed to wait for one
            async for event in self._running[0].events:
                yield self._running[0], event
            return
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
