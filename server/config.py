"""What can be set, and where each value comes from: defaults < TOML file < environment (EASEL_*) < flags.

Every setting has one name in all four places: `port` in the `[server]` table, EASEL_PORT, `--port`. The field
descriptions here feed `--help` and the commented files in configs/, so the three cannot drift apart. Knows
nothing of HTTP and loads no model. Invariant: a `Settings` is complete, checked and never changes; a key nobody
reads is an error, not a surprise.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

import engine
from engine import EngineOptions
from server.logs import LogFormat

ENV_PREFIX = "EASEL_"
CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"  # names the file, as --config does
DEMO_CHECKPOINT = Path(engine.__path__[0]) / "demo" / "checkpoint"


class SettingsError(Exception):
    """A setting is unknown or has no usable value. The message is one line and says where it came from."""


def _split_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class _Section(BaseSettings):
    """One TOML table. Values are layered by `load_settings`, where the order of precedence can be read in one line."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


SectionT = TypeVar("SectionT", bound=_Section)


class ServerSettings(_Section):
    """The side that speaks HTTP."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    published: str | None = Field(
        None,
        pattern=r"^http://[^/?#@]+$",
        description="Where a container's port is published; decides, instead of host, whether a key is wanted.",
        examples=["http://127.0.0.1:8000"],
    )
    alias: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)] = Field(
        (), description="Another name clients may call the model by; may be given several times."
    )
    api_key: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_commas)] = Field(
        (),
        description="Keys, any of which clients must send as a bearer token; without one anybody may ask.",
        examples=["a-long-random-string"],
    )
    api_key_file: Path | None = Field(
        None,
        description="File with such keys, one a line; lines with a leading # are comments.",
        examples=["easel-keys.txt"],
    )
    insecure: bool = Field(
        False, description="Serve without a key on an address that other machines reach: anybody there may ask."
    )
    allowed_host: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)] = Field(
        (), description="A name clients without a key may call this server by; may be given several times."
    )
    cors_origin: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)] = Field(
        (),
        description="Origin whose web pages may use this server, as https://app.example; may be given several times.",
    )
    max_body: float = Field(10.0, gt=0, description="Megabytes a request's body may have.")
    max_messages: int = Field(10_000, ge=1, description="Messages a request may have.")
    request_timeout: float = Field(600.0, gt=0, description="Seconds an answer may take, waiting included.")
    step_timeout: float = Field(
        300.0, gt=0, description="Seconds a step of the engine may take; then it is given up and the server ends."
    )
    drain: float = Field(10.0, ge=0, description="Seconds that running replies get when the server is told to stop.")
    log_format: LogFormat = Field("text", description="text, or json: one object a line.")
    log_content: bool = Field(False, description="Write what is asked and answered to the log.")
    otlp_endpoint: str | None = Field(
        None,
        min_length=1,
        description="Where to send OpenTelemetry traces, over HTTP; needs the extra tracing.",
        examples=["http://localhost:4318/v1/traces"],
    )

    @property
    def reached_as(self) -> str:
        """The host name or address by which clients reach us: that of `published`, or `host`."""
        return (urlsplit(self.published).hostname or "") if self.published else self.host

    def keys(self) -> tuple[str, ...]:
        """All API keys, those of the file included. Raises SettingsError."""
        keys = [key.get_secret_value() for key in self.api_key]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"cannot read the API keys in {self.api_key_file}: {error}") from None
            read = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
            if not read:
                raise SettingsError(f"{self.api_key_file} holds no API key; write one on a line of its own")
            keys += read
        return tuple(keys)


class EngineSettings(_Section):
    """The side that runs the model."""

    model: str = Field(
        str(DEMO_CHECKPOINT),
        min_length=1,
        description="Folder of a DiffusionGemma checkpoint, or its hub id; the bundled demo model if left out.",
        examples=["google/diffusiongemma-26B-A4B-it"],
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:\d+)$",
        description="auto (a GPU if there is one), cpu, cuda or cuda:N.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto (bfloat16, or float32 on a CPU without instructions for it), float32 or bfloat16."
    )
    kernels: Literal["auto", "reference", "triton"] = Field(
        "auto", description="Which operations run: auto (triton on a GPU in bfloat16), reference or triton."
    )
    context: int | None = Field(
        None,
        ge=1,
        description="Positions a prompt and its reply may take together; the checkpoint's if left out.",
        examples=[32768],
    )
    slots: int | None = Field(
        None,
        ge=1,
        le=8,
        description="Requests served at the same time, 1 to 8; 4 where memory allows if left out.",
        examples=[4],
    )
    kv_memory: float | None = Field(
        None,
        gt=0,
        description="Gigabytes for keys and values; as much as is of use, where memory allows, if left out.",
        examples=[8.0],
    )
    quantize: Literal["fp8", "nvfp4", "int4"] | None = Field(
        None,
        description="Quantise a bf16 checkpoint while loading: fp8, or the experts to nvfp4 or int4.",
        examples=["nvfp4"],
    )
    quantize_dense: Literal["fp8"] | None = Field(
        None,
        description="fp8: with quantize, take attention and the dense MLP to 8 bit too (quantize fp8 always does).",
        examples=["fp8"],
    )
    images: Literal["auto", "off"] = Field(
        "auto", description="auto (load the vision tower of a model that takes images) or off (text only)."
    )
    max_waiting: int = Field(64, ge=1, description="Requests that may wait for their turn before more are turned away.")

    def options(self, *, progress: bool) -> EngineOptions:
        """What `engine.build_engine` wants; `progress` shows a bar while the weights load."""
        return EngineOptions(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            kernels=self.kernels,
            context_length=self.context,
            slots=self.slots,
            kv_memory=self.kv_memory,
            quantize=self.quantize,
            quantize_dense=self.quantize_dense,
            max_waiting=self.max_waiting,
            images=self.images == "auto",
            progress=progress,
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything the program was told."""

    server: ServerSettings
    engine: EngineSettings

    def as_line(self) -> str:
        """One line for the log, secrets masked."""
        sections = {"server": self.server, "engine": self.engine}
        return json.dumps({name: section.model_dump(mode="json") for name, section in sections.items()})


SECTIONS: Mapping[str, type[_Section]] = {"server": ServerSettings, "engine": EngineSettings}


def load_settings(flags: Mapping[str, object], file: Path | None = None) -> Settings:
    """Settings from all four places. `flags` maps field names to what was typed; None means it was not.

    Raises SettingsError for an unknown key, a value that does not fit, or a file that cannot be read.
    """
    typed = {name: value for name, value in flags.items() if value is not None}
    tables = _read_toml(file) if file is not None else {}
    _reject_unknown_environment(os.environ)
    return Settings(
        server=_layered(ServerSettings, tables.get("server", {}), typed, file),
        engine=_layered(EngineSettings, tables.get("engine", {}), typed, file),
    )


def easel_version() -> str:
    """The installed version."""
    try:
        return version("easel-server")
    except PackageNotFoundError:
        return "(not installed)"  # run from a source tree


def describe(name: str) -> str:
    """The description of a setting, for `--help`."""
    for section in SECTIONS.values():
        if name in section.model_fields:
            return section.model_fields[name].description or ""
    raise KeyError(name)


def commented_toml(title: str, tables: Mapping[str, Mapping[str, object]]) -> str:
    """A config file that explains itself: every setting with its description, commented out where it is not set."""
    lines = [*(f"# {line}" for line in title.splitlines())]
    for table, section in SECTIONS.items():
        lines += ["", f"[{table}]"]
        for name, field in section.model_fields.items():
            lines.append(f"# {field.description}")
            if name in tables.get(table, {}):
                lines.append(f"{name} = {_toml_value(tables[table][name])}")
            else:
                lines.append(f"# {name} = {_toml_value((field.examples or [field.default])[0])}")
    return "\n".join(lines) + "\n"


def _layered(
    section: type[SectionT], table: Mapping[str, object], typed: Mapping[str, object], file: Path | None
) -> SectionT:
    own = {name: value for name, value in typed.items() if name in section.model_fields}
    environment = EnvSettingsSource(section)()
    values: dict[str, Any] = {**table, **environment, **own}
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if name in own:
            where = f"--{name.replace('_', '-')}"
        elif name in environment:
            where = f"{ENV_PREFIX}{name.upper()}"
        else:
            where = f"{file}: {name}"
        shown = "" if name == "api_key" else f" (got {first['input']!r})"
        raise SettingsError(f"{where}: {first['msg']}{shown}") from None


def _read_toml(file: Path) -> dict[str, dict[str, object]]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the config file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not valid TOML: {error}") from None
    for name, table in tables.items():
        if name not in SECTIONS or not isinstance(table, dict):
            _refuse(f"{file}: unknown table or key '{name}'", name, SECTIONS)
        for key in table:
            if key not in SECTIONS[name].model_fields:
                _refuse(f"{file}: unknown key '{key}' in [{name}]", key, SECTIONS[name].model_fields)
    return tables


def _reject_unknown_environment(environment: Mapping[str, str]) -> None:
    known = {ENV_PREFIX + name.upper() for section in SECTIONS.values() for name in section.model_fields}
    known.add(CONFIG_VARIABLE)
    for name in sorted(environment):
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            _refuse(f"unknown environment variable {name}", name.upper(), known)


def _refuse(problem: str, name: str, known: Iterable[str]) -> NoReturn:
    home = [table for table, section in SECTIONS.items() if name in section.model_fields]
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    if home:
        hint = f"it belongs in [{home[0]}]"
    elif close:
        hint = f"did you mean '{close[0]}'?"
    else:
        hint = f"known are {', '.join(sorted(known))}"
    raise SettingsError(f"{problem}; {hint}")


def _toml_value(value: object) -> str:
    # JSON's strings, numbers, booleans and lists are TOML's too.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
