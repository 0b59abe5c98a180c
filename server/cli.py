"""The `easel` command.

Knows what each command is called and takes, not how a server is put together (`launch`). Imports of what is slow to
import stand in the commands that need it, so that `easel --help` answers at once. Invariant: what the user did wrong is
one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from engine import (
    BENCH_FORMATS,
    BENCH_GROUPS,
    SHAPES,
    BenchOptions,
    EngineError,
    build_engine,
    pull_checkpoint,
    quantize_checkpoint,
)
from server.address import AddressError
from server.config import Settings, SettingsError, easel_version
from server.flags import takes_settings

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


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"easel {easel_version()}")
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
    from server import launch

    launch.serve(settings)


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
    from server import launch

    key = next(iter(settings.server.keys()), None)
    with launch.own_server(settings) if server_url is None else _elsewhere(server_url) as address:
        client = ChatClient(address, api_key=key)
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
        int | None,
        typer.Option("--parallel", min=1, help="With --turns: several, one after the other and so many at a time."),
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
    from server import launch, shape_bench, turns_bench

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
            bench = turns_bench.Bench(
                loaded, launch.renderer, turns=turns, parallel=parallel or 1, max_tokens=max_tokens
            )
            bench.report(prompt, launch.engine_line, json_path)
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
    from server import launch

    asked = prompt or list(measuring.story_prompts(requests))
    with closing(build_engine(settings.engine.options(progress=sys.stderr.isatty()))) as engine:
        renderer = launch.renderer(engine.info)
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
        console.print(launch.engine_line(engine.info))
        console.print(measuring.table(results))
        document = json.dumps(measuring.document(engine, results))
    if path is not None:
        path.write_text(document + "\n", encoding="utf-8")
    print(document)


@app.command()
@takes_settings("server", "engine")
def check(settings: Settings) -> None:
    """Look at this machine: what hardware, which checkpoint format fits, what is wrong."""
    from server.check import Finding, driver, findings, memory_table
    from server.checkpoint_check import check_checkpoint, plans_of
    from server.disk_check import check_disk

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
    show(check_disk(settings.engine.model, gpu=bool(driver().gpus)))
    before = problems
    show(check_checkpoint(settings.engine.model))
    if problems == before:
        console.print(f"\n{memory_table(*plans_of(settings.engine.model))}\n", soft_wrap=True)
    console.print("No problems." if not problems else f"{problems} problem{'s' if problems > 1 else ''}.")
    raise typer.Exit(1 if problems else 0)


@app.command()
def pull(model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, as owner/name.")]) -> None:
    """Download a checkpoint, from where an earlier try broke off. The last line printed is its folder."""
    print(pull_checkpoint(model))


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
    from server.launch import size_in_words

    shown = sys.stderr.isatty()
    written = quantize_checkpoint(source, target, form, quantize_dense, device=device, progress=shown)
    size = sum(path.stat().st_size for path in written.iterdir())
    print(f"{written}: {size_in_words(size)}")


@contextmanager
def _elsewhere(address: str) -> Iterator[str]:
    yield address
