"""Settings as command-line flags: made from the fields, so that `--help` and the config files cannot differ.

Knows typer and the settings classes, no command. Invariant: a flag that was not typed does not exist, so it never
hides what the environment or a file says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from server.config import CONFIG_VARIABLE, ENV_PREFIX, SECTIONS, Settings, load_settings

# A secret in a command line can be read by everybody on the machine.
NEVER_TYPED = frozenset({"api_key"})
_TYPES: dict[str, Any] = {  # str for all others
    "port": int,
    "context": int,
    "slots": int,
    "kv_memory": float,
    "max_waiting": int,
    "alias": list[str],
    "api_key_file": Path,
    "insecure": bool,
    "allowed_host": list[str],
    "cors_origin": list[str],
    "max_body": float,
    "max_messages": int,
    "request_timeout": float,
    "step_timeout": float,
    "drain": float,
    "log_content": bool,
}


def takes_settings(*tables: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these tables and --config; it gets the loaded `settings` instead of them.

    A command with a parameter `typed` is also told which of the flags were typed, as the user spells them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter for parameter in parameters if parameter.name not in ("settings", "typed")]
        tells_typed = "typed" in inspect.signature(command).parameters
        flags = [
            _flag(table, name) for table in tables for name in SECTIONS[table].model_fields if name not in NEVER_TYPED
        ]

        def run(**values: Any) -> None:
            typed = {flag.name: values.pop(flag.name) for flag in flags}
            file: Path | None = values.pop("config")
            settings: Settings = load_settings(
                {name: None if value == [] else value for name, value in typed.items()}, file
            )
            if tells_typed:
                values["typed"] = [f"--{name.replace('_', '-')}" for name, value in typed.items() if value is not None]
            command(settings=settings, **values)

        signature = inspect.Signature([*own, _CONFIG, *flags])
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature  # type: ignore[attr-defined]  # read by typer, which turns it into options
        run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        return run

    return decorate


def _flag(table: str, name: str) -> inspect.Parameter:
    description = SECTIONS[table].model_fields[name].description
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{description} ({ENV_PREFIX}{name.upper()})",
        rich_help_panel=f"Settings of the {table}",
        show_default=False,
    )
    return _optional(name, _TYPES.get(name, str), option)


def _optional(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[Optional[kind], option]  # noqa: UP045  # `kind | None` is no expression for a variable
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_CONFIG = _optional(
    "config",
    Path,
    typer.Option(
        "--config",
        envvar=CONFIG_VARIABLE,
        show_envvar=False,
        help=f"TOML file with settings, as those in configs/. ({CONFIG_VARIABLE})",
        show_default=False,
    ),
)
