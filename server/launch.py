"""Putting the server together, and its life from the loaded model to the exit status.

build_engine -> Bridge -> PromptRenderer -> ChatService -> create_app -> uvicorn. Knows every part by its constructor
and none by its inside. Invariant: the process ends when it is told to or when its engine is gone, whatever its clients
do; for the latter the exit status is not 0, so that a supervisor starts it again.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from rich.console import Console

from engine import CheckpointError, EngineInfo, build_engine
from server import logs
from server.access import Keys, Names
from server.address import bind, is_loopback, url
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.config import DEMO_CHECKPOINT, ServerSettings, Settings, SettingsError, easel_version
from server.connections import BACKLOG, HEAD_BYTES, bounded
from server.images import ImageReader
from server.prompt import IMAGE, IMAGE_CLOSE, IMAGE_OPEN, PromptRenderer

if TYPE_CHECKING:
    from server.tracing import Tracing

DEMO_NAME = "easel-demo"
ENGINE_GONE = 1  # exit status; 2 says that a setting is wrong, which starting again does not help
_LAST_WORDS = 2.0  # seconds that a reply which was cut off gets to say so
_FORCED_SECONDS = 5.0  # what the engine's thread gets when the user said twice that it is enough
logger = logging.getLogger("easel")


class _Server(uvicorn.Server):
    """uvicorn's server, which tells the bridge too when it is told to stop: what does not end in time gets an error."""

    def __init__(self, config: uvicorn.Config, bridge: Bridge, drain: float) -> None:
        super().__init__(config)
        self._bridge, self._drain = bridge, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what runs."""
        self._bridge.close(self._drain, wait_seconds=0)
        await super().shutdown(sockets)


def serve(settings: Settings) -> None:
    """Load the model and serve until told to stop. Raises SystemExit(ENGINE_GONE) if the engine failed."""
    logs.set_up(settings.server.log_format, content=settings.server.log_content)
    logger.info("settings: %s", settings.as_line())
    keys = checked_keys(settings.server)
    # uvicorn hands a signal on once it has stopped; without this SIGTERM would end us before the engine is closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with closing(bind(settings.server.host, settings.server.port)) as listener, _traced(settings) as tracing:
        server: uvicorn.Server | None = None

        def stop() -> None:
            if server is not None:
                server.should_exit = True

        bridge = build_bridge(settings, stop, tracing)
        service = chat_service(bridge, model_names(settings))
        bridge.start()
        try:
            server = _Server(_uvicorn_config(service, settings, keys, tracing), bridge, settings.server.drain)
            _keep_what_is_there()
            listener.listen(BACKLOG)  # from here on clients are not refused, so what the screen says is true
            _show_screen(settings, service, settings.server.published or url(listener), keys)
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            logger.info("stopped")
        finally:
            _end(bridge, forced=server is not None and server.force_exit)


def _keep_what_is_there() -> None:
    """Leave what was loaded out of garbage collection: looking through it stops all replies for 0.2 s each time."""
    gc.collect()
    gc.freeze()


def _show_screen(settings: Settings, service: ChatService, address: str, keys: tuple[str, ...]) -> None:
    try:
        _start_screen(settings, service, address, keys)
    except OSError as error:  # a full disk, or nobody behind the pipe: no reason not to serve
        logger.warning("the start screen cannot be shown: %s", error)
        sys.stdout = open(os.devnull, "w")  # or what is left of it would fail once more at the end


def _end(bridge: Bridge, *, forced: bool) -> None:
    """Close the engine; leave at once where it cannot be, or with the status that says that it failed."""
    ended = bridge.close(0) if not forced else bridge.close(0, wait_seconds=_FORCED_SECONDS)
    with suppress(OSError):  # a full disk must not change how this ends
        if bridge.failure is not None:
            print(f"easel: the engine stopped: {' '.join(bridge.failure.split())}", file=sys.stderr, flush=True)
    if not ended:
        # The engine's thread stands in a step that does not end: no orderly way out waits for less than it.
        logging.shutdown()
        os._exit(ENGINE_GONE)
    if bridge.failure is not None:
        sys.exit(ENGINE_GONE)


def checked_keys(server: ServerSettings) -> tuple[str, ...]:
    """The API keys. Raises SettingsError where other machines could ask without one."""
    keys = server.keys()
    if keys or server.insecure or is_loopback(server.reached_as):
        return keys
    raise SettingsError(
        f"{server.published or server.host} lets other machines in, so an API key is wanted: set EASEL_API_KEY or "
        "--api-key-file; or --insecure to serve anybody who reaches it"
    )


@contextmanager
def own_server(settings: Settings) -> Iterator[str]:
    """A server of our own on a free loopback port, in a thread: the chat is a client like any other."""
    with closing(bind("127.0.0.1", 0)) as listener, build_bridge(settings) as bridge:
        service = chat_service(bridge, model_names(settings))
        listener.listen()
        server = uvicorn.Server(_uvicorn_config(service, settings, settings.server.keys()))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
        thread.start()
        try:
            yield url(listener)
        finally:
            server.should_exit = True
            thread.join()


def chat_service(bridge: Bridge, names: tuple[str, ...]) -> ChatService:
    """Everything a chat needs, of the engine's checkpoint. Raises CheckpointError."""
    info, prompts = bridge.info, renderer(bridge.info)
    if info.image_id is not None:
        known = [prompts.control.ids.get(name) for name in (IMAGE_OPEN, IMAGE, IMAGE_CLOSE)]
        if None in known or known[1] != info.image_id:
            raise CheckpointError(
                f"config.json of {info.model_path} has image_token_id {info.image_id}, but its tokenizer has "
                f"{known[1]} for {IMAGE}; serve text only with --images off"
            )
    return ChatService(bridge, prompts, names, ImageReader.for_engine(info))


def renderer(info: EngineInfo) -> PromptRenderer:
    """The checkpoint's tokenizer and template. Raises CheckpointError."""
    try:
        return PromptRenderer.from_folder(info.model_path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer of {info.model_path} cannot be loaded: {error}") from error


def model_names(settings: Settings) -> tuple[str, ...]:
    """What clients may call the model, the name to show first: hub id or folder name, then the aliases."""
    model = settings.engine.model
    if Path(model) == DEMO_CHECKPOINT:
        name = DEMO_NAME
    else:
        name = Path(model).resolve().name if Path(model).is_dir() else model
    return (name, *settings.server.alias)


def engine_line(info: EngineInfo) -> str:
    """Where and how the model runs, in one line."""
    return f"{info.device} · weights {info.format}, computing in {info.dtype} · {info.kernels} kernels"


def size_in_words(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def build_bridge(
    settings: Settings, on_failure: Callable[[], None] | None = None, tracing: Tracing | None = None
) -> Bridge:
    """The loaded model with the thread that will own it, not started yet. Raises EngineError."""
    engine = build_engine(settings.engine.options(progress=sys.stderr.isatty()))
    return Bridge(
        engine,
        step_seconds=settings.server.step_timeout,
        on_failure=on_failure,
        on_end=tracing.record if tracing else None,
    )


@contextmanager
def _traced(settings: Settings) -> Iterator[Tracing | None]:
    if settings.server.otlp_endpoint is None:
        yield None
        return
    try:
        from server.tracing import Tracing
    except ImportError as error:
        raise SettingsError(
            f"otlp_endpoint needs the extra tracing: pip install 'easel-server[tracing]' ({error})"
        ) from error
    with closing(Tracing(settings.server.otlp_endpoint, version=easel_version())) as tracing:
        yield tracing


def _uvicorn_config(
    service: ChatService, settings: Settings, keys: tuple[str, ...], tracing: Tracing | None = None
) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service, app_settings(settings.server, keys, tracing)),
        http=bounded(),
        ws="none",
        backlog=BACKLOG,
        h11_max_incomplete_event_size=HEAD_BYTES,
        log_config=None,  # the log goes where ours goes
        log_level="warning",
        access_log=False,  # ours has the request's id, and how long it took
        server_header=False,
        timeout_graceful_shutdown=int(settings.server.drain + _LAST_WORDS)
        + 2,  # streams end themselves first, and say why
    )


def app_settings(
    told: ServerSettings, keys: tuple[str, ...], tracing: Tracing | None = None, *, response_tag: str = ""
) -> AppSettings:
    """What the settings say of the HTTP side."""
    return AppSettings(
        keys=Keys(keys),
        names=_names(told, keys),
        cors_origins=told.cors_origin,
        drain_seconds=told.drain + _LAST_WORDS,
        request_seconds=told.request_timeout,
        max_body_bytes=int(told.max_body * 1e6),
        max_messages=told.max_messages,
        log_content=told.log_content,
        response_tag=response_tag,
        span=tracing.span if tracing else None,
    )


def _names(told: ServerSettings, keys: tuple[str, ...]) -> Names | None:
    """What keyless clients may call us. With a key, or for anybody on purpose, any name will do."""
    if keys or (told.insecure and not told.allowed_host):
        return None
    hosts = frozenset(name.lower() for name in (told.host, told.reached_as, *told.allowed_host))
    return Names(hosts, frozenset(origin.rstrip("/").lower() for origin in told.cors_origin))


def _start_screen(settings: Settings, service: ChatService, address: str, keys: tuple[str, ...]) -> None:
    info = service.bridge.info
    name, *aliases = service.model_names
    question = {"model": name, "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    key = " -H 'Authorization: Bearer YOUR_KEY'" if keys else ""
    asked_for = f"{len(keys)} API key{'s' if len(keys) > 1 else ''}" if keys else "no API key"
    if not is_loopback(settings.server.reached_as):
        asked_for += ", from any machine that reaches it"
    lines = {
        "model": " = ".join([name, *aliases]) + f", {_count(info.parameters)} parameters, from {info.model_path}",
        "device": engine_line(info),
        "memory": f"{size_in_words(info.weight_bytes)} of weights, {size_in_words(info.kv_bytes)} of KV cache",
        "pages": " · ".join(f"{count} in {kind} layers" for kind, count in sorted(info.pages.items()))
        + f", of {info.page_length} tokens each",
        "context": f"{info.context_length} tokens, canvases of {info.canvas_length}; "
        + (f"{info.slots} requests at a time" if info.slots > 1 else "one request at a time"),
        "images": f"yes, {info.image_tokens} tokens each at most",
        "access": asked_for,
        "address": f"{address} (OpenAI base URL: {address}/v1)",
    }
    if not info.image_tokens:
        del lines["images"]
    console = Console(highlight=False)
    console.print(f"\n[bold]easel {easel_version()}[/] is ready; the model took {info.load_seconds:.1f} s to load\n")
    for title, text in lines.items():
        console.print(f"  {title:<8} {text}", markup=False, soft_wrap=True)
    console.print("\nTry it:\n")
    body = json.dumps(question)
    command = f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    console.print(command, markup=False, soft_wrap=True)
    console.print()


def _count(count: float) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
