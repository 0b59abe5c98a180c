"""Everything that may cross the wall between the server and the engine.

Plain frozen dataclasses and one protocol; standard library only. The engine speaks token ids, never text;
the server speaks text, never tensors. Invariant: every accepted request ends in exactly one `Finished`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "error"]


class EngineError(Exception):
    """Base of everything the engine raises for a caller's mistake or a broken checkpoint."""


class CheckpointError(EngineError):
    """A checkpoint cannot be loaded. The message names the file, key or tensor and says what to do."""


class RequestTooLong(EngineError):
    """Prompt (plus at least one token of reply) does not fit the context."""

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        super().__init__(f"prompt of {prompt_tokens} tokens does not fit a context of {context_length} tokens")
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class ConstraintError(EngineError):
    """A constraint cannot go on: its automaton met a limit of its own, or allows nothing at all."""


class QueueFull(EngineError):
    """The bounded waiting queue is full; the caller should retry later."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request draws. The first five shape only the draw at each position; acceptance, stopping and
    self-conditioning keep the schedule (design decision 8).

    The last three change what the model finds, its argmax included: they are added to the logits (softcapped, at
    temperature 1) of every pass. Penalties count the ids of the reply committed so far and, at each position of a
    canvas, the accepted positions before it (not when it is re-drawn, for they may have kept it from converging); ids
    that end a reply, and what fills a canvas behind one, never count.
    """

    seed: int  # 0 <= seed < 2**64
    temperature: float = 1.0  # multiplies the schedule's temperature; 0 = argmax
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # share of the likeliest id's probability; 0 = off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, nats); -100 bans it
    presence_penalty: float = 0.0  # nats off an id that has occurred
    frequency_penalty: float = 0.0  # nats off for each time it has


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How one request's canvases are denoised; None = as the checkpoint says."""

    max_denoising_steps: int | None = None  # passes a canvas may take, 1..MAX_DENOISING_STEPS
    entropy_bound: float | None = None  # nats: positions are accepted while their entropies add up to no more
    confidence_threshold: float | None = None  # nats: a canvas is done when its mean entropy is below
    stability_threshold: int | None = None  # and its argmax has stayed the same for so many passes


# What each changes of the checkpoint's schedule; README has what it costs and brings on the demo model.
PRESETS: Mapping[str, Schedule] = MappingProxyType(
    {
        "quality": Schedule(confidence_threshold=0.002, stability_threshold=2),
        "balanced": Schedule(),
        "fast": Schedule(entropy_bound=0.15, confidence_threshold=0.01, stability_threshold=0),
    }
)
MAX_DENOISING_STEPS = 256
MAX_LOGPROBS = 20


class Constraint(Protocol):
    """Which replies are allowed: an automaton over token ids that stands somewhere in its reply.

    It belongs to one request and moves on the engine's thread only. Eos ids end a reply and are not part of it: the
    automaton is never moved over one. Whatever it allows to begin can be brought to an end. Every method may raise
    ConstraintError.
    """

    def advance(self, token_ids: Sequence[int]) -> int:
        """Move on by ids as long as they are allowed; returns by how many."""

    def rollback(self, count: int) -> None:
        """Move back by so many of the ids it last moved on by."""

    def forced(self) -> tuple[int, ...]:
        """Ids that must come next; none where there is a choice, or where the reply may end. Does not move."""

    def allowed(self) -> bytes:
        """Which ids may come next, eos ids included: bit i of 32-bit words in the machine's order, for all of the
        model's vocabulary. At least one is set."""

    def closing(self) -> bytes:
        """Those of the allowed ids that close something, so that the reply comes nearer to its end; all bits are 0 if
        there are none."""

    def ends(self) -> tuple[int, ...]:
        """The eos ids that may come next, the most natural one first; none if the reply is not complete here."""

    @property
    def must_end(self) -> bool:
        """True where the reply is complete and nothing may follow. It may also be False there: then `allowed` tells."""


@dataclass(frozen=True, kw_only=True)
class ImagePatches:
    """One image of a prompt, as the checkpoint's image processor cuts it up.

    Its soft tokens stand at prompt positions `at` to `at + tokens`, where `prompt_ids` has the model's image id.
    """

    at: int
    tokens: int
    columns: int  # patches from left to right
    rows: int  # patches from top to bottom
    pixels: bytes  # float32 in the machine's order, [rows * columns, values of a patch], row by row

    @cached_property
    def number(self) -> int:
        """What tells images of different content apart, wherever they stand: of 96 bits, never negative."""
        digest = sha256(f"{self.columns} {self.rows} ".encode())
        digest.update(self.pixels)
        return int.from_bytes(digest.digest()[:12], "big")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One reply to generate. `max_tokens` counts reply tokens, the eos token included."""

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    schedule: Schedule = field(default_factory=Schedule)
    logprobs: int | None = None  # how many likeliest ids to report at each position, 0..MAX_LOGPROBS; None = nothing
    constraint: Constraint | None = None
    drafts: bool = False  # report the canvas after every pass
    images: tuple[ImagePatches, ...] = ()  # in the order of their positions; no two of them touch


@dataclass(frozen=True, kw_only=True)
class CanvasRequest:
    """One canvas some of whose positions are held: what infill and decisions are made of.

    `canvas` has the id each position is held at, None where it is free; behind it the checkpoint's pad id is held. It
    is denoised until it is done, like any other, or, with `allowed` (some ids for each free position, in order), read
    after a single pass. It ends with a CanvasRead and Finished("stop"), and is never committed.
    """

    id: str
    prompt_ids: tuple[int, ...]
    canvas: tuple[int | None, ...]
    sampling: Sampling
    schedule: Schedule = field(default_factory=Schedule)
    allowed: tuple[tuple[int, ...], ...] | None = None

    @property
    def images(self) -> tuple[ImagePatches, ...]:
        """None: its prompt is text."""
        return ()

    @property
    def max_tokens(self) -> int:
        """What it counts as."""
        return max(1, self.free)

    @property
    def free(self) -> int:
        """How many positions are not held."""
        return self.canvas.count(None)


Request = GenerationRequest | CanvasRequest


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token and work counts of one request so far."""

    prompt_tokens: int
    cached_tokens: int = 0  # prompt tokens whose KV was reused
    completion_tokens: int = 0  # reply tokens, the eos token included
    canvases: int = 0  # canvases delivered
    denoise_steps: int = 0  # denoise passes, re-drawn canvases included
    redrawn_canvases: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model found one delivered id, and the likeliest ids there, in nats.

    Read off the pass that finished the canvas: softcapped logits at temperature 1, over the whole vocabulary, before
    any bias or penalty.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), likeliest first


@dataclass(frozen=True, kw_only=True)
class CanvasDone:
    """A finished canvas. `token_ids` are final: cut before the eos id and at max_tokens, never retracted."""

    request_id: str
    index: int  # 0-based canvas number within the reply
    token_ids: tuple[int, ...]
    steps: int
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each of `token_ids`, if the request asked


@dataclass(frozen=True, kw_only=True)
class CanvasDraft:
    """A canvas after a pass, for a request that asked. Nothing in it is final; a canvas of C positions.

    The pass that uses up a first attempt has none: its canvas is noise again.
    """

    request_id: str
    index: int  # 0-based canvas number within the reply
    step: int  # 1-based number of the pass, re-drawn ones included
    token_ids: tuple[int, ...]  # [C] the likeliest id of every position, also behind the end of the reply
    entropy: tuple[float, ...]  # [C] nats
    accepted: tuple[int, ...]  # positions that keep what was drawn; the others are noise in the next pass


@dataclass(frozen=True, kw_only=True)
class CanvasRead:
    """What a CanvasRequest came to. Log-probabilities as in TokenLogprobs."""

    request_id: str
    token_ids: tuple[int, ...]  # at every position of its canvas: the id held or the likeliest found
    logprobs: tuple[float, ...]  # of each of them, also of those held
    allowed: tuple[tuple[float, ...], ...] = ()  # of the allowed ids of each free position
    steps: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of one request; exactly one per accepted request, whatever happened."""

    request_id: str
    reason: FinishReason
    usage: Usage
    stop_id: int | None = None  # the eos id that ended the reply, when reason is "stop"
    error: str | None = None  # what went wrong, when reason is "error"; "length" after a canvas that never converged


Event = CanvasDone | CanvasDraft | CanvasRead | Finished


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Facts about the loaded model that the server and the command line may show or rely on."""

    model_path: str
    canvas_length: int
    context_length: int  # positions a prompt and its reply may take together
    vocab_size: int
    eos_ids: frozenset[int]
    device: str
    dtype: str
    format: str  # of the experts: "fp8", "nvfp4" or "int4"; if nothing is quantised "bf16" or "fp32", as stored
    kernels: str  # which op set runs: "reference" or "triton"
    parameters: int
    weight_bytes: int
    kv_bytes: int
    load_seconds: float
    slots: int = 1  # requests at a time
    page_length: int = 64  # positions in a page of keys and values
    pages: Mapping[str, int] = field(default_factory=dict)  # by kind of layer: "full", "sliding"
    image_tokens: int = 0  # soft tokens that one image may take; 0 = the model takes no images
    image_id: int | None = None  # the id that stands for a soft token in a prompt; None = the model takes no images
    choices: tuple[str, ...] = ()  # which ways of computing start-up found fastest on this chip, a line each


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Pages of one kind of layer. Those neither held nor kept are free."""

    pages: int
    held: int  # by running requests
    kept: int  # only for what they contain; given away when there is need
    evictions: int  # of kept pages, since the start


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory of the GPU in bytes, whoever uses it; at most a second old when it was taken."""

    used: int
    total: int


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine is at, and counts since the start."""

    slots: int
    running: tuple[str, ...]  # ids of the requests in slots
    waiting: tuple[str, ...]  # ids of the requests without one, first in line first
    pools: Mapping[str, PoolStats]  # by kind of layer: "full", "sliding"
    prompt_tokens: int  # of requests that got a slot
    cached_tokens: int  # prompt tokens whose KV was reused
    committed_tokens: int  # prompts and replies
    preemptions: int  # requests that lost their slot for a while because memory was short
    memory: DeviceMemory | None = None  # None without a GPU


class Engine(Protocol):
    """One loaded model. Not thread-safe: one thread submits, cancels, steps and closes."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do: a submitted request has not finished, or the end of a reply is still
        to be committed, which nobody waits for."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestTooLong or QueueFull; nothing is queued then."""

    def cancel(self, request_id: str) -> None:
        """End a request at the next step with Finished("cancelled"). Unknown or finished ids are ignored."""

    def step(self) -> list[Event]:
        """Advance by one unit of work (a commit chunk and/or one denoise pass) and return what happened."""

    def stats(self) -> EngineStats:
        """A snapshot, taken between two steps."""

    def close(self) -> None:
        """Free the model's memory. Requests still running are dropped without an event."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to build an engine. `auto` values are resolved at build time and reported in `EngineInfo`."""

    model: str  # folder or hub id
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto (float32 on cpu, bfloat16 on cuda) | float32 | bfloat16
    kernels: str = "auto"  # auto (triton on a GPU in bfloat16) | reference | triton
    context_length: int | None = None  # None = the checkpoint's, as far as memory goes
    slots: int | None = None  # requests at a time, 1 to 8; None = 4 where memory allows
    kv_memory: float | None = None  # GB for keys and values; None = what is of use, as far as memory goes
    max_waiting: int = 64  # bound of the waiting queue
    quantize: str | None = None  # fp8 | nvfp4 | int4: quantise a bf16 checkpoint while loading
    quantize_dense: str | None = None  # fp8: attention and dense MLP too, where `quantize` leaves them
    commit_chunk: int | None = None  # prompt tokens committed between two steps; None = what suits the device
    images: bool = True  # load the vision tower of a checkpoint that takes images
    progress: bool = True  # show a progress bar while loading
