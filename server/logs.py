"""Where log lines go and how they look: for people, or one JSON object a line for machines.

Knows logging and the id of the request that is being answered. Invariant: a line written while a request is answered
carries the request's id. What is wrong with a text is often said by quoting it, so of an exception outside the engine,
which knows none, the log has the class and where it was raised, but not its words.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="-")
_KNOW_NO_TEXT = ("engine", "server.bridge")
# The last one writes what it sends at DEBUG.
_CHATTY = ("httpx", "huggingface_hub", "transformers", "opentelemetry", "sse_starlette")


def set_up(form: LogFormat, *, content: bool = False) -> None:
    """Send everything from INFO on to stderr. `content`: texts may be among it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_request_id)
    if not content:
        handler.addFilter(_hide_words)
    if form == "json":
        from pythonjsonlogger.json import JsonFormatter

        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s %(request_id)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
                datefmt="%Y-%m-%dT%H:%M:%S%z",
            )
        )
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


def _hide_words(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[1] and not record.name.startswith(_KNOW_NO_TEXT):
        record.exc_text = "\n".join(_without_words(record.exc_info[1]))
        record.exc_info = None
    return True


def _without_words(error: BaseException) -> Iterator[str]:
    """The traceback, and before it those of the exceptions that led to it."""
    before = error.__context__ if error.__cause__ is None and not error.__suppress_context__ else error.__cause__
    if before is not None:
        yield from _without_words(before)
        yield ""
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    yield f"{type(error).__name__} (--log-content shows what it says)"
