"""The server's life as a process: what it logs, how it ends, what it exits with."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server import cli, logs
from server.config import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
# `easel serve` on a scripted engine, as `engine` says; the model of a real one takes seconds to load.
PROGRAM = """
import sys, threading
sys.path.insert(0, {root!r})
from server import launch
from server.cli import main
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Script, Template, byte_tokenizer, script
LONG = Script([[173]] * 100_000, steps=1, step_seconds=0.002)

class Stuck(FakeEngine):
    def step(self):
        if self.steps == 3:
            threading.Event().wait()
        return super().step()

launch.build_engine = lambda options: {engine}
launch.renderer = lambda info: PromptRenderer(byte_tokenizer(), Template())
main(["serve", "--port", "0", *sys.argv[1:]])
"""
BODY = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4000}


class Process:
    """A running server."""

    client: httpx.Client | None = None
    stream: Any = None

    def __init__(self, engine: str, *flags: str, before: str = "", screen: str = "curl") -> None:
        """`before`: what the program does first; `screen`: how its last line begins, if there is one."""
        program = textwrap.dedent(PROGRAM.format(root=str(ROOT), engine=engine))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EASEL_")}
        self.running = subprocess.Popen(
            [sys.executable, "-c", before + program, *flags],
            env=environment | {"COLUMNS": "200", "NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.screen = ""
        assert self.running.stdout is not None
        for line in self.running.stdout if screen else ():
            self.screen += line
            if "  address " in line:
                self.address = line.split()[1]
            if line.startswith(screen):
                break

    def end(self, seconds: float = 30) -> tuple[int, str]:
        """The exit status and what stands on stderr."""
        _, said = self.running.communicate(timeout=seconds)
        return self.running.returncode, said


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def one(engine: str, *flags: str, **options: str) -> Process:
        started.append(Process(engine, *flags, **options))
        return started[-1]

    yield one
    for process in started:
        if process.client is not None:
            process.stream.__exit__(None, None, None)
            process.client.close()
        process.running.kill()
        process.running.communicate()


def test_an_engine_that_dies_takes_the_process_with_it(start: Callable[..., Process]) -> None:
    process = start("FakeEngine([LONG], crash_at_step=20)", "--log-format", "json")
    answer = httpx.post(f"{process.address}/v1/chat/completions", json=BODY, timeout=20)
    assert "the fake engine broke" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    status, said = process.end()
    assert status == 1
    *lines, last = said.splitlines()
    assert last == "easel: the engine stopped: RuntimeError: the fake engine broke"
    read = [json.loads(line) for line in lines]
    asked = [line for line in read if line["logger"] == "easel.access"]
    assert [(line["path"], line["status"], line["method"]) for line in asked] == [("/v1/chat/completions", 200, "POST")]
    assert asked[0]["request_id"] == answer.headers["x-request-id"]
    assert any("the fake engine broke" in line.get("exc_info", "") for line in read)


def test_an_engine_that_stands_still_takes_the_process_with_it(start: Callable[..., Process]) -> None:
    process = start("Stuck([LONG])", "--step-timeout", "0.3")
    answer = httpx.post(f"{process.address}/v1/chat/completions", json=BODY, timeout=20)
    assert "did not end within 0.3 seconds" in answer.text
    status, said = process.end()
    assert status == 1
    assert said.splitlines()[-1] == "easel: the engine stopped: a step did not end within 0.3 seconds"


def streaming(process: Process) -> Any:
    """The lines of a reply that has begun."""
    process.client = httpx.Client(timeout=20)  # kept, for it is closed when nobody knows it any more
    process.stream = process.client.stream("POST", f"{process.address}/v1/chat/completions", json=BODY)
    lines = process.stream.__enter__().iter_lines()
    while not next(lines).startswith("data:"):
        pass
    return lines


def test_sigterm_lets_a_running_reply_end(start: Callable[..., Process]) -> None:
    process = start("FakeEngine([Script([[173]] * 100, steps=1, step_seconds=0.005)])")
    lines = streaming(process)
    process.running.send_signal(signal.SIGTERM)
    rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    assert not any('"error"' in line for line in rest)
    assert process.end()[0] == 0


def test_what_does_not_end_in_time_is_told(start: Callable[..., Process]) -> None:
    process = start("FakeEngine([LONG])", "--drain", "0.2")
    lines = streaming(process)
    process.running.send_signal(signal.SIGTERM)
    *_, error, done = [line for line in lines if line.startswith("data: ")]
    assert (json.loads(error[6:])["error"]["message"], done) == ("The server is shutting down", "data: [DONE]")
    assert process.end()[0] == 0


def test_a_second_interrupt_waits_for_nobody(start: Callable[..., Process]) -> None:
    process = start("FakeEngine([LONG])", "--drain", "600")
    lines = streaming(process)
    process.running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.running.poll() is None
    process.running.send_signal(signal.SIGINT)
    process.end(20)
    with pytest.raises(httpx.RemoteProtocolError):
        list(lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_below_the_log_and_the_screen_stops_nothing(start: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    full = "import os; [os.dup2(os.open('/dev/full', os.O_WRONLY), stream) for stream in (1, 2)]\n"
    process = start("FakeEngine([script('Hello')] * 9, crash_at_step=8)", "--port", port, before=full, screen="")
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.running.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/ready").status_code == 200:
                break
        time.sleep(0.05)
    said = httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=20).text
    assert "Hello" in said and '"error"' not in said
    while '"error"' not in said:  # its eighth step is one of the next request's, or of the one behind it
        said = httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=20).text
    assert process.end()[0] == 1  # as the engine's failure says, not as the full disk does


def test_there_are_no_more_connections_than_files(start: Callable[..., Process]) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))\n"
    process = start("FakeEngine([script('x')])", before=few)
    host, _, port = process.address.removeprefix("http://").partition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(100)]
    idle[-1].settimeout(20)
    refused = b"".join(iter(lambda: idle[-1].recv(4096), b""))
    assert refused.startswith(b"HTTP/1.1 503 ") and b"All 32 connections of this server are taken" in refused
    for connection in idle:
        connection.close()
    for _ in range(200):  # it hears of their end a moment later
        answer = httpx.get(f"{process.address}/v1/models")
        if answer.status_code == 200:
            break
    assert answer.status_code == 200
    process.running.send_signal(signal.SIGTERM)
    status, said = process.end()
    assert (status, "Too many open files" in said) == (0, False)


def test_one_that_was_killed_comes_back_on_its_port(start: Callable[..., Process]) -> None:
    process = start("FakeEngine([LONG])")
    lines = streaming(process)
    process.running.kill()
    with pytest.raises(httpx.TransportError):
        list(lines)
    assert process.end()[0] == -signal.SIGKILL
    again = start("FakeEngine([script('Hello')])", "--port", process.address.rpartition(":")[2])
    assert "Hello" in httpx.post(f"{again.address}/v1/chat/completions", json=BODY, timeout=20).text


def test_the_screen_says_who_may_ask(start: Callable[..., Process]) -> None:
    process = start("FakeEngine([script('x')])")
    assert "  access   no API key\n" in process.screen
    assert httpx.get(f"{process.address}/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(f"{process.address}/v1/models").status_code == 200


def test_a_line_carries_the_id_of_its_request(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.set_up("json")
        token = logs.request_id.set("req_7")
        logging.getLogger("x").info("hello %s", "you", extra={"status": 200})
        logs.request_id.reset(token)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["request_id"], line["status"], line["level"]) == ("hello you", "req_7", 200, "INFO")
    assert line["time"]


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [("server.sse", False, False), ("server.sse", True, True), ("engine.engine", False, True)],
)
def test_an_exception_may_quote_a_text(
    form: Any, name: str, content: bool, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.set_up(form, content=content)
        try:
            try:
                int("a-secret")
            except ValueError as error:
                raise KeyError("another-secret") from error
        except KeyError:
            logging.getLogger(name).exception("it failed")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    said = capsys.readouterr().err
    assert all(word in said for word in ("it failed", "test_launch.py", "ValueError", "KeyError"))
    assert ("invalid literal" in said, "'a-secret'" in said) == (shown, shown)


def test_pull_downloads_what_is_served_and_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    done = CliRunner().invoke(cli.app, ["pull", "owner/name"])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path))
    ((name, patterns),) = asked
    assert name == "owner/name"
    assert {"*.safetensors", "*.json", "*.jinja"} <= set(patterns)


def test_pull_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for model, said in (
        ("owner/name", "No space left on device"),
        ("nonsense", "give a checkpoint folder or a hub id"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["pull", model])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_the_systemd_unit_names_flags_that_exist() -> None:
    unit = (ROOT / "configs" / "easel.service").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ExecStart=\S+ serve (.*)$", unit, re.M)
    names = {name.replace("_", "-") for section in SECTIONS.values() for name in section.model_fields} | {"config"}
    assert set(re.findall(r"--([a-z-]+)", command)) <= names
    assert "RestartPreventExitStatus=2" in unit
