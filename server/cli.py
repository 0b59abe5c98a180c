"""The `easel` command, and the composition root: here, and only here, the parts are put together.

build_engine -> Bridge -> PromptRenderer -> ChatService -> create_app -> uvicorn. Knows every part by its
constructor and none by its inside. Imports of what is slow to import stand in the commands that need it, so that
`easel --help` answers at once. Invariant: what the user did wrong is one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from engine import (
    BENCH_FORMATS,
    BENCH_GROUPS,
    SHAPES,
    BenchOptions,
    CheckpointError,
    EngineError,
    EngineInfo,
    build_engine,
    quantize_checkpoint,
)
from server.address import AddressError, bind, url
from server.config import DEMO_CHECKPOINT, Settings, SettingsError
from server.flags import takes_settings

if TYPE_CHECKING:
    import uvicorn

    from server.chat import ChatService
    from server.prompt import PromptRenderer

DEMO_NAME = "easel-demo"
GRACE_SECONDS = 10  # what running replies get when the server is told to stop
logger = logging.getLogger("easel")
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A local OpenAI-compatible server for DiffusionGemma, a block-diffusion language model.",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status."""
    from server.terminal_chat import ChatError

    try:
        app(args=arguments, prog_name="easel")
    except (EngineError, SettingsError, AddressError, ChatError) as error:
        print(f"easel: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _version() -> str:
    try:
        return version("easel-server")
    except PackageNotFoundError:
        return "(not installed)"  # run from a source tree


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"easel {_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Options that come before the command."""


@app.command()
@takes_settings("server", "engine")
def serve(settings: Settings) -> None:
    """Start the server."""
    import uvicorn

    _log_to_stderr()
    logger.info("settings: %s", settings.as_line())
    # uvicorn hands a signal on once it has stopped; without this SIGTERM would end us before the engine is closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with closing(bind(settings.server.host, settings.server.port)) as listener, _service(settings) as service:
        server = uvicorn.Server(_uvicorn_config(service, settings, access_log=True))
        listener.listen()  # from here on clients are not refused, so what the screen says is true
        _start_screen(settings, service, url(listener))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            logger.info("stopped")


@app.command()
@takes_settings("engine")
def chat(
    settings: Settings,
    typed: list[str],
    server_url: Annotated[
        str | None, typer.Option("--url", help="Address of a running server; without it the model is loaded here.")
    ] = None,
    think: Annotated[bool, typer.Option("--think", help="Let the model think before it answers.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show each canvas while it is denoised.")] = False,
) -> None:
    """Talk to the model in the terminal."""
    from server.terminal_chat import ChatClient, TerminalChat

    if server_url is not None and typed:
        raise SettingsError(
            f"{typed[0]} is about loading a model, but --url names a server that has loaded one already"
        )
    key = settings.server.api_key
    with _own_server(settings) if server_url is None else _elsewhere(server_url) as address:
        client = ChatClient(address, api_key=key.get_secret_value() if key else None)
        with closing(client):
            console = Console(highlight=False)
            if console.is_terminal and sys.stdin.isatty():
                import readline  # noqa: F401  # gives input() a history and an editable line
            TerminalChat(client, console, model=client.model(), thinking=think, watch=watch).run(input)


@app.command()
@takes_settings("engine")
def bench(
    settings: Settings,
    typed: list[str],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help="What to ask; may be given several times. Stories if left out. With --shape: tokens."
        ),
    ] = None,
    requests: Annotated[int | None, typer.Option("--requests", min=1, help="How many requests to time.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest reply.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the JSON document there too.")] = None,
    turns: Annotated[int | None, typer.Option("--turns", min=1, help="Time conversations of so many turns.")] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, help="With --turns: so many, one after the other and at once.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help=f"Random weights of a real size instead of a model: {', '.join(SHAPES)}."),
    ] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="With --shape: random.")] = None,
    form: Annotated[
        list[str] | None,
        typer.Option("--format", help=f"With --shape, may be given several times: {', '.join(BENCH_FORMATS)}."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="With --shape: denoise passes of a canvas.")] = None,
    canvases: Annotated[
        list[int] | None, typer.Option("--canvases", help="With --shape, may be given several times: open at a time.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help=f"With --shape, may be given several times: {', '.join(BENCH_GROUPS)}."),
    ] = None,
    start_up: Annotated[bool, typer.Option("--start-up", help="With --shape: time cold and warm starts too.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="With --shape: kernels of a step by time.")] = False,
    computed: Annotated[
        bool, typer.Option("--computed", help="With --shape: the limits of cards that are not here; measures nothing.")
    ] = False,
) -> None:
    """Measure speed on this machine. The last line printed is one JSON document."""
    from server import shape_bench, turns_bench

    ours: dict[str, object] = {"--requests": requests, "--max-tokens": max_tokens}
    ours |= {"--turns": turns, "--parallel": parallel}
    theirs: dict[str, object] = {
        "--weights": weights,
        "--format": form,
        "--steps": steps,
        "--canvases": canvases,
        "--only": only,
    }
    theirs |= {"--start-up": start_up, "--profile": profile, "--computed": computed}
    if shape is None:
        _refuse(theirs, "belongs to --shape, which measures a model of random weights")
        if turns is not None:
            _refuse({"--requests": requests}, "has no meaning with --turns, which asks one question a turn")
            loaded = partial(build_engine, settings.engine.options(progress=sys.stderr.isatty()))
            bench = turns_bench.Bench(loaded, _renderer, turns=turns, parallel=parallel or 1, max_tokens=max_tokens)
            bench.report(prompt, _engine_line, json_path)
            return
        _refuse({"--parallel": parallel}, "belongs to --turns")
        _bench_requests(settings, prompt, requests or 5, max_tokens, json_path)
        return
    loading: dict[str, object] = {flag: True for flag in typed if flag not in ("--device", "--dtype", "--kernels")}
    _refuse(ours | loading, "has no meaning with --shape, which loads no model and serves no requests")
    if weights not in (None, "random"):
        raise SettingsError(f"--weights must be random, not {weights!r}; leave --shape out to measure a checkpoint")
    options = BenchOptions(
        shape=shape,
        formats=tuple(form or BenchOptions.formats),
        steps=BenchOptions.steps if steps is None else steps,
        prompts=tuple(map(shape_bench.token_count, prompt)) if prompt else BenchOptions.prompts,
        slots=tuple(canvases or BenchOptions.slots),
        only=tuple(only or BENCH_GROUPS),
        start_up=start_up,
        profile=profile,
        device=settings.engine.device,
        dtype=settings.engine.dtype,
        kernels=settings.engine.kernels,
    )
    if not shape_bench.run(options, json_path, computed=computed):
        raise typer.Exit(1)


def _refuse(given: dict[str, object], why: str) -> None:
    for flag, value in given.items():
        if value:
            raise SettingsError(f"{flag} {why}")


def _bench_requests(
    settings: Settings, prompt: list[str] | None, requests: int, max_tokens: int | None, path: Path | None
) -> None:
    from server import bench as measuring

    asked = prompt or list(measuring.story_prompts(requests))
    with closing(build_engine(settings.engine.options(progress=sys.stderr.isatty()))) as engine:
        renderer = _renderer(engine.info)
        prompts = [(text, renderer.render([{"role": "user", "content": text}]).ids) for text in asked]
        first_text, first_ids = prompts[0]
        measuring.measure(engine, first_text, first_ids, seed=0, max_tokens=max_tokens)  # warm-up, not counted
        results = []
        for number in range(requests):
            text, ids = prompts[number % len(prompts)]
            results.append(measuring.measure(engine, text, ids, seed=number + 1, max_tokens=max_tokens))
            if sys.stderr.isatty():
                print(f"\r{number + 1} of {requests}", end="\r", file=sys.stderr)
        console = Console(highlight=False)
        console.print(_engine_line(engine.info))
        console.print(measuring.table(results))
        document = json.dumps(measuring.document(engine, results))
    if path is not None:
        path.write_text(document + "\n", encoding="utf-8")
    print(document)


@app.command()
@takes_settings("server", "engine")
def check(settings: Settings) -> None:
    """Look at this machine: what hardware, which checkpoint format fits, what is wrong."""
    from server.check import Finding, findings, memory_table
    from server.checkpoint_check import check_checkpoint, plans_of

    console = Console(highlight=False)
    styles = {"good": "green", "note": "dim", "problem": "bold red"}
    problems = 0

    def show(found: Iterator[Finding]) -> None:
        nonlocal problems
        for finding in found:
            problems += finding.level == "problem"
            line = Text.assemble((f"{finding.level:<8}", styles[finding.level]), finding.what)
            if finding.advice:
                line.append(f"\n        -> {finding.advice}", style="italic")
            console.print(line, soft_wrap=True)

    show(findings(settings.server.host, settings.server.port, settings.engine.options(progress=False)))
    before = problems
    show(check_checkpoint(settings.engine.model))
    if problems == before:
        console.print(f"\n{memory_table(*plans_of(settings.engine.model))}\n", soft_wrap=True)
    console.print("No problems." if not problems else f"{problems} problem{'s' if problems > 1 else ''}.")
    raise typer.Exit(1 if problems else 0)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder of a bf16 checkpoint, or its hub id.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    form: Annotated[str, typer.Option("--format", help="fp8, or nvfp4 or int4 for the experts.")],
    quantize_dense: Annotated[
        str | None, typer.Option(help="fp8: attention and dense MLP too; --format fp8 always takes them.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Write a quantised copy of a checkpoint in the published layout, for any engine that reads compressed-tensors."""
    shown = sys.stderr.isatty()
    written = quantize_checkpoint(source, target, form, quantize_dense, device=device, progress=shown)
    size = sum(path.stat().st_size for path in written.iterdir())
    print(f"{written}: {_size(size)}")


@contextmanager
def _service(settings: Settings) -> Iterator[ChatService]:
    """The loaded model with its engine thread running; closed on the way out."""
    from server.bridge import Bridge
    from server.chat import ChatService

    engine = build_engine(settings.engine.options(progress=sys.stderr.isatty()))
    with Bridge(engine) as bridge:
        yield ChatService(bridge, _renderer(bridge.info), model_names(settings))


@contextmanager
def _own_server(settings: Settings) -> Iterator[str]:
    """A server of our own on a free loopback port, in a thread: the chat is a client like any other."""
    import uvicorn

    with closing(bind("127.0.0.1", 0)) as listener, _service(settings) as service:
        listener.listen()
        server = uvicorn.Server(_uvicorn_config(service, settings, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
        thread.start()
        try:
            yield url(listener)
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def _elsewhere(address: str) -> Iterator[str]:
    yield address


def _renderer(info: EngineInfo) -> PromptRenderer:
    from server.prompt import PromptRenderer

    try:
        return PromptRenderer.from_folder(info.model_path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer of {info.model_path} cannot be loaded: {error}") from error


def _uvicorn_config(service: ChatService, settings: Settings, *, access_log: bool) -> uvicorn.Config:
    import uvicorn

    from server.app import AppSettings, create_app

    key = settings.server.api_key
    application = create_app(
        service, AppSettings(api_key=key.get_secret_value() if key else None, drain_seconds=GRACE_SECONDS)
    )
    # log_config=None: the log goes where ours goes.
    return uvicorn.Config(
        application,
        log_config=None,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        timeout_graceful_shutdown=GRACE_SECONDS + 2,  # streams end themselves first, and say why
    )


def model_names(settings: Settings) -> tuple[str, ...]:
    """What clients may call the model, the name to show first: hub id or folder name, then the aliases."""
    model = settings.engine.model
    if Path(model) == DEMO_CHECKPOINT:
        name = DEMO_NAME
    else:
        name = Path(model).resolve().name if Path(model).is_dir() else model
    return (name, *settings.server.alias)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for chatty in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _engine_line(info: EngineInfo) -> str:
    return f"{info.device} · weights {info.format}, computing in {info.dtype} · {info.kernels} kernels"


def _start_screen(settings: Settings, service: ChatService, address: str) -> None:
    info = service.bridge.info
    name, *aliases = service.model_names
    question = {"model": name, "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.server.api_key else ""
    lines = {
        "model": " = ".join([name, *aliases]) + f", {_count(info.parameters)} parameters, from {info.model_path}",
        "device": _engine_line(info),
        "memory": f"{_size(info.weight_bytes)} of weights, {_size(info.kv_bytes)} of KV cache",
        "pages": " · ".join(f"{count} in {kind} layers" for kind, count in sorted(info.pages.items()))
        + f", of {info.page_length} tokens each",
        "context": f"{info.context_length} tokens, canvases of {info.canvas_length}; "
        + (f"{info.slots} requests at a time" if info.slots > 1 else "one request at a time"),
        "address": f"{address} (OpenAI base URL: {address}/v1)",
    }
    console = Console(highlight=False)
    console.print(f"\n[bold]easel {_version()}[/] is ready; the model took {info.load_seconds:.1f} s to load\n")
    for title, text in lines.items():
        console.print(f"  {title:<8} {text}", markup=False, soft_wrap=True)
    console.print("\nTry it:\n")
    body = json.dumps(question)
    command = f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    console.print(command, markup=False, soft_wrap=True)
    console.print()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _count(count: float) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
