"""What the bodies of all wire formats share: sampling fields, refusals by name, and faults located in the document.

Knows shapes and ranges, not models, prompts or replies. Three kinds of fields: honoured (declared in a model), hints
and extras that cannot change the reply (accepted, dropped) and fields that would change it but are not built
(`UNSUPPORTED`). Invariant: a field of the third kind is a 400 that names it, unless its value means "off".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from engine import MAX_DENOISING_STEPS, MAX_LOGPROBS, PRESETS, Schedule
from server.errors import ApiError, invalid

MAX_REPORTED_ERRORS = 10
MAX_MESSAGE_CHARACTERS = 300
OPEN = ConfigDict(extra="allow", frozen=True)
ModelT = TypeVar("ModelT", bound=BaseModel)
MeansOff = Callable[[Any], bool]


def refuse(field: str, detail: str = "is not supported yet") -> PydanticCustomError:
    """The error for a field that is understood and not honoured. Raise it inside a validator."""
    # The field's name goes in as context, not as template text: it may contain braces.
    return PydanticCustomError("unsupported_value", "'{field}' {detail}", {"field": field, "detail": detail})


def refuse_unbuilt(data: Any, table: Mapping[str, MeansOff]) -> None:
    """Refuse the first field of the table that is set to something. null, [] and {} always mean "off"."""
    if not isinstance(data, dict):
        return
    for name, means_off in table.items():
        value = data.get(name)
        if value is None or value == [] or value == {} or means_off(value):
            continue
        raise refuse(name, _INSTEAD.get(name, "is not supported yet"))


class StreamOptions(BaseModel):
    """Only `include_usage` changes anything here; obfuscation is padding this server does not add."""

    model_config = OPEN
    include_usage: bool | None = None


def off(*values: object) -> MeansOff:
    """A test for 'this value means off'; null and empty always do."""
    return lambda value: any(value == each and type(value) is type(each) for each in values)


def zero(value: Any) -> bool:
    """Zero means off."""
    return isinstance(value, int | float) and value == 0


def one(value: Any) -> bool:
    """One means off."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 1


UNSUPPORTED: Mapping[str, MeansOff] = {
    "prompt_logprobs": zero,
    "repetition_penalty": one,
    "length_penalty": one,
    "typical_p": one,
    "min_tokens": zero,
    "bad_words": off(),
    "allowed_token_ids": off(),
    "stop_token_ids": off(),
    "ignore_eos": off(False),
    "include_stop_str_in_output": off(False),
    "skip_special_tokens": off(True),
    "return_tokens_as_token_ids": off(False),
    "return_token_ids": off(False),
    "truncate_prompt_tokens": off(),
    "logits_processors": off(),
    "use_beam_search": off(False),
    "best_of": one,
    "echo": off(False),
    "suffix": off(""),
    "functions": off(),
    "function_call": off("none", "auto"),
    "audio": off(),
    "modalities": off(["text"]),
    "web_search_options": off(),
    "moderation": off(),
    "chat_template": off(),
    "documents": off(),
    "continue_final_message": off(False),
    "add_generation_prompt": off(True),
    "include_reasoning": off(True),
}

_INSTEAD = {
    "functions": "is OpenAI's retired form of tools: send 'tools'",
    "function_call": "is OpenAI's retired form of tool calls: send 'tool_choice' and 'tool_calls'",
}

Seed = Annotated[int, Field(ge=-(2**63), lt=2**64, strict=True)]
TokenLimit = Annotated[int, Field(ge=1, strict=True)]
MAX_STOP_STRINGS = 4
MAX_BIASES = 1024


_Nats = Annotated[float, Field(ge=0, le=1000, strict=True, allow_inf_nan=False)]
_Passes = Annotated[int, Field(strict=True, le=MAX_DENOISING_STEPS)]


_OF_A_SCHEDULE = [each.name for each in fields(Schedule)]


class EaselOptions(BaseModel):
    """`easel` in a request: how its canvases are denoised. Single values go over what the preset says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["quality", "balanced", "fast"] | None = None
    max_denoising_steps: Annotated[_Passes, Field(ge=1)] | None = None
    entropy_bound: _Nats | None = None
    confidence_threshold: _Nats | None = None
    stability_threshold: Annotated[_Passes, Field(ge=0)] | None = None

    def schedule(self) -> Schedule:
        """The options as the engine wants them."""
        own = {name: getattr(self, name) for name in _OF_A_SCHEDULE if getattr(self, name) is not None}
        return replace(PRESETS[self.preset or "balanced"], **own)


def _as_biases(value: object) -> object:
    if value is None or not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("invalid_value", "takes at most {most} tokens", {"most": MAX_BIASES})
    if not all(isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 for key in value):
        raise PydanticCustomError("invalid_value", "must map token ids to numbers from -100 to 100")
    return {int(key): bias for key, bias in value.items()}


_Bias = Annotated[float, Field(ge=-100, le=100, strict=True, allow_inf_nan=False)]
_Biases = Annotated[dict[int, _Bias], BeforeValidator(_as_biases)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)]


class DrawFields(BaseModel):
    """How tokens are found and drawn: what OpenAI's bodies have in common, the extras of other servers among it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_k: Annotated[int, Field(ge=-1, lt=2**31, strict=True)] | None = None
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    logit_bias: _Biases | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: Seed | None = None
    easel: EaselOptions | None = None

    def draw(self, temperature: float = 1.0) -> dict[str, Any]:
        """The fields as `ChatTask` wants them; `temperature` is used where the request has none."""
        own = self.temperature
        return {
            **draw(temperature if own is None else own, self.top_p, self.top_k),
            "min_p": self.min_p or 0.0,
            "logit_bias": tuple(sorted((self.logit_bias or {}).items())),
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            # Negative seeds are allowed on the wire; two's complement keeps them distinct.
            "seed": None if self.seed is None else self.seed % 2**64,
            "schedule": schedule(self.easel),
        }


def schedule(options: EaselOptions | None) -> Schedule:
    """The schedule a body asks for."""
    return options.schedule() if options is not None else Schedule()


class SamplingFields(DrawFields):
    """What OpenAI's chat and completions bodies have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=8, strict=True)] | None = None

    @model_validator(mode="after")
    def _check_stop(self) -> SamplingFields:
        check_stop_strings("stop", self.stop_strings)
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, whichever form they came in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, temperature: float = 1.0) -> dict[str, Any]:
        """The fields as `ChatTask` wants them; `temperature` is used where the request has none."""
        return {**self.draw(temperature), "stop": self.stop_strings, "choices": self.n or 1}


def draw(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """How tokens are drawn, with defaults, as `ChatTask` wants it."""
    kept = {"temperature": 1.0 if temperature is None else temperature, "top_k": max(top_k or 0, 0)}
    if top_p == 0:  # a nucleus of nothing is the likeliest token alone
        return {**kept, "top_p": 1.0, "top_k": 1}
    return {**kept, "top_p": 1.0 if top_p is None else top_p}


def check_stop_strings(field: str, strings: tuple[str, ...]) -> None:
    """Raise inside a validator when there are too many stop strings or an empty one."""
    if len(strings) > MAX_STOP_STRINGS:
        raise PydanticCustomError(
            "invalid_value", "takes at most {most} strings", {"field": field, "most": MAX_STOP_STRINGS}
        )
    if "" in strings:
        raise PydanticCustomError("invalid_value", "strings must not be empty", {"field": field})


def parse(model: type[ModelT], body: bytes) -> ModelT:
    """Check a request body. Raises ApiError (400) naming the first field at fault."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(error) from error


def _as_api_error(error: ValidationError) -> ApiError:
    faults = error.errors(include_url=False, include_context=True, include_input=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        return invalid(f"The request body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    lines = []
    # Bounded: an answer must not grow with what was sent.
    for fault in faults[:MAX_REPORTED_ERRORS]:
        where = _where(fault)
        lines.append(f"{where}: {fault['msg']}"[:MAX_MESSAGE_CHARACTERS] if where else fault["msg"])
    code = {"missing": "missing_required_parameter", "unsupported_value": "unsupported_value"}.get(first["type"])
    return invalid("; ".join(lines), param=_where(first) or None, code=code or "invalid_value")


def _where(fault: ErrorDetails) -> str:
    """The field at fault: its path, and the name a validator of the whole object put in."""
    path, named = _path(fault["loc"]), str(fault.get("ctx", {}).get("field", ""))
    if not named.isidentifier():
        return path
    return f"{path}.{named}" if path else named


# pydantic also reports which branch of a union it tried: no part of the client's document
_BRANCHES = frozenset({"system", "developer", "user", "assistant", "tool", "str", "list", "list[str]", "dict[str,any]"})
BRANCH = "~"  # begins the names of all other branches, some of which are also names of fields


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "user", "content", "list", 1)` -> `messages[0].content[1]`."""
    path = ""
    for position, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif position > 0 and (part in _BRANCHES or part.startswith(BRANCH)):
            continue
        else:
            path += f".{part}" if path else str(part)
    return path
