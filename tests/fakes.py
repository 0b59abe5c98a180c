"""Stand-ins for tests: a scripted engine and a small fast tokenizer with Gemma's control tokens.

They know no server module. Invariant: `FakeEngine` keeps every rule of `engine.interface.Engine`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from engine import (
    CanvasDone,
    CanvasDraft,
    CanvasRead,
    CanvasRequest,
    EngineInfo,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    QueueFull,
    Request,
    RequestTooLong,
    TokenLogprobs,
    Usage,
)

CONTROL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|image|>": 55,
    "<|image>": 56,
    "<image|>": 57,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}

TEMPLATE = """
{%- macro value(v) -%}
{%- if v is string -%}<|"|>{{ v }}<|"|>
{%- elif v is boolean -%}{{ 'true' if v else 'false' }}
{%- elif v is none -%}null
{%- elif v is mapping -%}{{ '{' }}{% for k, e in v | dictsort %}{{ k }}:{{ value(e) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}
{%- elif v is sequence -%}[{% for e in v %}{{ value(e) }}{{ ',' if not loop.last }}{% endfor %}]
{%- else -%}{{ v }}{%- endif -%}
{%- endmacro -%}
{%- macro fields(d) -%}{% for k, e in d | dictsort %}{{ k }}:{{ value(e) }}{{ ',' if not loop.last }}{% endfor %}{%- endmacro -%}
{{- '<bos>' -}}
{%- set ns = namespace(open=false) -%}
{%- set has_system = messages and messages[0].role in ('system', 'developer') -%}
{%- if enable_thinking or tools or has_system -%}
{{- '<|turn>system\\n' -}}
{%- if enable_thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
{%- if has_system -%}{{- messages[0].content | trim -}}{%- endif -%}
{%- for t in tools or [] -%}
{{- '<|tool>declaration:' + t.function.name + '{' + fields({'description': t.function.description or '', 'parameters': t.function.parameters or {}}) + '}<tool|>' -}}
{%- endfor -%}
{{- '<turn|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|turn>user\\n' + m.content | trim + '<turn|>\\n' -}}
{%- elif m.role in ('system', 'developer') and not loop.first -%}{{- '<|turn>system\\n' + m.content + '<turn|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{%- if not ns.open -%}{{- '<|turn>model\\n' -}}{%- endif -%}
{%- set ns.open = false -%}
{%- for c in m.tool_calls or [] -%}{{- '<|tool_call>call:' + c.function.name + '{' + fields(c.function.arguments) + '}<tool_call|>' -}}{%- set ns.open = true -%}{%- endfor -%}
{{- m.content -}}
{%- if not ns.open -%}{{- '<turn|>\\n' -}}{%- endif -%}
{%- elif m.role == 'tool' -%}{{- '<|tool_response>response:' + m.name + '{value:' + value(m.content) + '}<tool_response|>' -}}{%- set ns.open = true -%}
{%- endif -%}
{%- endfor -%}
{%- if not ns.open -%}{{- '<|turn>model\\n' -}}
{%- elif enable_thinking -%}{{- '<|channel>thought\\n' -}}{%- endif -%}
"""  # noqa: E501


def byte_tokenizer(**options: Any) -> Tokenizer:
    """Gemma-like: control tokens at Gemma 4's ids, one token per byte or per printable ASCII character."""
    vocabulary = {f"<unused{index}>": index for index in range(107)}
    vocabulary = {name: index for name, index in vocabulary.items() if index not in CONTROL.values()} | CONTROL
    vocabulary["\n"] = 107
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = 108 + byte
    for char in [chr(code) for code in range(33, 127)] + ["\u2581"]:
        vocabulary[char] = len(vocabulary)
    for word in ("he", "ll", "hell"):
        vocabulary[word] = len(vocabulary)
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>", **options)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    return tokenizer


class Template:
    """Renders `TEMPLATE`; the part of a transformers tokenizer that the prompt renderer needs."""

    def __init__(self, source: str = TEMPLATE) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(source)

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[Any] | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str:
        return self._template.render(
            messages=conversation, tools=tools, add_generation_prompt=add_generation_prompt, **options
        )


@dataclass(frozen=True)
class Script:
    """What the fake says to one request: canvases of ids, then how it ends."""

    canvases: Sequence[Sequence[int]] = ()
    reason: FinishReason = "stop"
    stop_id: int | None = 106
    error: str | None = None
    steps: int = 3  # per canvas
    step_seconds: float = 0.0


def script(*canvases: str, **options: Any) -> Script:
    """A script from text with control tokens in it."""
    tokenizer = byte_tokenizer()
    return Script([tokenizer.encode(text, add_special_tokens=False).ids for text in canvases], **options)


def engine_info(
    name: str, *, canvas_length: int, context_length: int, vocab_size: int, eos_ids: Iterable[int]
) -> EngineInfo:
    """What an engine without weights says of itself."""
    return EngineInfo(
        model_path=name,
        canvas_length=canvas_length,
        context_length=context_length,
        vocab_size=vocab_size,
        eos_ids=frozenset(eos_ids),
        device="cpu",
        dtype="float32",
        format="f32",
        kernels="reference",
        parameters=0,
        weight_bytes=0,
        kv_bytes=0,
        load_seconds=0.0,
    )


@dataclass
class _Running:
    request: Request
    script: Script
    canvas: int = 0
    step: int = 0
    tokens: int = 0
    steps: int = 0


def _logprobs(ids: Sequence[int], top: int | None) -> tuple[TokenLogprobs, ...]:
    """Half of the probability for what is said, and ever smaller shares for the ids from 105 on."""
    if top is None:
        return ()
    others = [(105 + place, -2.0 - place) for place in range(top)]
    return tuple(TokenLogprobs(-0.75, tuple([(token_id, -0.75), *others][:top])) for token_id in ids)


def _drafts(running: _Running) -> list[Event]:
    """The canvas after a step, if anybody watches: noise, and from the left ever more of what is said."""
    if not running.request.drafts:
        return []
    ids = [*running.script.canvases[running.canvas], 106][:64]
    ids += [0] * (64 - len(ids))
    known = 64 * running.step // running.script.steps
    return [
        CanvasDraft(
            request_id=running.request.id,
            index=running.canvas,
            step=running.step,
            token_ids=(*ids[:known], *(110 + (7 * place + running.step) % 90 for place in range(known, 64))),
            entropy=tuple(0.0 if place < known else 1 + place % 5 for place in range(64)),
            accepted=tuple(range(known)),
        )
    ]


def first_allowed(request: CanvasRequest) -> CanvasRead:
    """A quarter less than half of the probability for the first id allowed, then ever smaller shares."""
    allowed = request.allowed or ((),) * request.free
    ids = iter([ids[0] if ids else 110 for ids in allowed])
    return CanvasRead(
        request_id=request.id,
        token_ids=tuple(next(ids) if held is None else held for held in request.canvas),
        logprobs=tuple(-0.5 if held is None else 0.0 for held in request.canvas),
        allowed=tuple(tuple(math.log(0.4) - place for place in range(len(ids))) for ids in allowed),
        steps=1,
    )


@dataclass
class FakeEngine:
    """Plays scripts, one request at a time, one `step` per denoise pass, each call on one and the same thread."""

    scripts: Callable[[GenerationRequest], Script] | Sequence[Script]
    context_length: int = 4096
    max_waiting: int = 64
    image_tokens: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    canvases: list[CanvasRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    steps: int = 0
    closed: bool = False
    crash_at_step: int | None = None
    reader: Callable[[CanvasRequest], CanvasRead | None] | None = None  # None: the first id allowed is the likeliest

    def __post_init__(self) -> None:
        self._queue: deque[_Running] = deque()
        self._cancel: set[str] = set()
        self._thread: int | None = None

    @property
    def info(self) -> EngineInfo:
        return replace(
            engine_info(
                "fake", canvas_length=64, context_length=self.context_length, vocab_size=512, eos_ids={1, 106, 50}
            ),
            image_tokens=self.image_tokens,
            image_id=CONTROL["<|image|>"] if self.image_tokens else None,
        )

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    def submit(self, request: Request) -> None:
        self._check_thread()
        if len(request.prompt_ids) + 1 > self.context_length:
            raise RequestTooLong(len(request.prompt_ids), self.context_length)
        if len(self._queue) > self.max_waiting:
            raise QueueFull("full")
        if isinstance(request, CanvasRequest):
            self.canvases.append(request)
            self._queue.append(_Running(request, Script(steps=1)))
            return
        said = self.scripts(request) if callable(self.scripts) else self.scripts[len(self.requests) % len(self.scripts)]
        self.requests.append(request)
        self._queue.append(_Running(request, said))

    def cancel(self, request_id: str) -> None:
        self._check_thread()
        self.cancelled.append(request_id)
        self._cancel.add(request_id)

    def step(self) -> list[Event]:
        self._check_thread()
        self.steps += 1
        if self.crash_at_step is not None and self.steps >= self.crash_at_step:
            raise RuntimeError("the fake engine broke")
        events: list[Event] = []
        for running in [each for each in self._queue if each.request.id in self._cancel]:
            events.append(self._finish(running, "cancelled"))
        self._cancel.clear()
        if self._queue and not events:
            events += self._advance(self._queue[0])
        return events

    def stats(self) -> EngineStats:
        ids = tuple(running.request.id for running in self._queue)
        return EngineStats(
            slots=1,
            running=ids[:1],
            waiting=ids[1:],
            pools={},
            prompt_tokens=sum(len(request.prompt_ids) for request in self.requests),
            cached_tokens=0,
            committed_tokens=0,
            preemptions=0,
        )

    def close(self) -> None:
        self.closed = True
        self._thread = None  # another bridge may take it over

    def _advance(self, running: _Running) -> list[Event]:
        if isinstance(running.request, CanvasRequest):
            return self._read(running, running.request)
        said = running.script
        time.sleep(said.step_seconds)
        if running.canvas >= len(said.canvases):
            return [self._finish(running, said.reason)]
        running.step += 1
        running.steps += 1
        events: list[Event] = _drafts(running)
        if running.step < said.steps:
            return events
        left = running.request.max_tokens - running.tokens
        ids = tuple(said.canvases[running.canvas])[:left]
        running.tokens += len(ids)
        events.append(
            CanvasDone(
                request_id=running.request.id,
                index=running.canvas,
                token_ids=ids,
                steps=running.step,
                logprobs=_logprobs(ids, running.request.logprobs),
            )
        )
        running.canvas += 1
        running.step = 0
        if running.tokens >= running.request.max_tokens:
            events.append(self._finish(running, "length"))
        elif running.canvas == len(said.canvases) and said.reason != "error":
            events.append(self._finish(running, said.reason))
        return events

    def _read(self, running: _Running, request: CanvasRequest) -> list[Event]:
        running.canvas, running.steps, running.tokens = 1, 1, request.max_tokens - 1
        read = (self.reader or first_allowed)(request)
        return [self._finish(running, "length")] if read is None else [read, self._finish(running, "stop")]

    def _finish(self, running: _Running, reason: FinishReason) -> Finished:
        self._queue.remove(running)
        self.ended.append(running.request.id)
        stopped = reason == "stop"
        usage = Usage(
            prompt_tokens=len(running.request.prompt_ids),
            completion_tokens=running.tokens + stopped,
            canvases=running.canvas,
            denoise_steps=running.steps,
        )
        return Finished(
            request_id=running.request.id,
            reason=reason,
            usage=usage,
            stop_id=running.script.stop_id if stopped else None,
            error=running.script.error if reason == "error" else None,
        )

    def _check_thread(self) -> None:
        current = threading.get_ident()
        if self._thread is None:
            self._thread = current
        assert self._thread == current, "the engine was touched from two threads"


def wait_until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Returns once the condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)
