"""The command line as a user meets it: exit statuses, messages, a chat in a terminal, a server as a process."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from server.access import Keys
from server.address import AddressError, bind, url
from server.app import AppSettings, create_app
from server.bench import measure, story_prompts, summary
from server.bridge import Bridge
from server.chat import ChatService
from server.config import DEMO_CHECKPOINT, load_settings
from server.launch import model_names
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Template, byte_tokenizer, script

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-c", "from server.cli import main; main()"]
PATIENCE = 60.0  # seconds until a test gives up on a process


def clean_environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EASEL_")}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | extra


def _easel(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@contextmanager
def _server(engine: FakeEngine, *, api_key: str | None = None) -> Iterator[str]:
    """The real application on a scripted engine and a free port."""
    with closing(bind("127.0.0.1", 0)) as listener, Bridge(engine) as bridge:
        service = ChatService(bridge, PromptRenderer(byte_tokenizer(), Template()), ["scripted"])
        application = create_app(service, AppSettings(keys=Keys([api_key] if api_key else [])))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(application, log_config=None, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield url(listener)
        finally:
            server.should_exit = True
            thread.join()


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, which tests may be, ignore it
            os.execve(COMMAND[0], [*COMMAND, *arguments], clean_environment(TERM="xterm-256color"))
        self.screen = ""

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until the text stands on the screen, and drop what came before it."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.screen:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} never came; the screen holds {self.screen!r}"
            try:
                self.screen += os.read(self._terminal, 65536).decode(errors="replace")
            except OSError:  # the program has left
                assert text in self.screen, f"{text!r} never came; the screen holds {self.screen!r}"
        self.screen = self.screen.split(text, 1)[1]

    def exit_status(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self._terminal], [], [], 0.05)[0]:
                try:
                    os.read(self._terminal, 65536)
                except OSError:
                    time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("the program did not leave")


# What the user did wrong


def test_version_and_help() -> None:
    assert re.fullmatch(r"easel \S.*\n", _easel("--version").stdout)
    shown = _easel("--help")
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("serve", "chat", "bench", "check"))


def test_help_shows_every_setting_with_its_description() -> None:
    shown = _easel("serve", "--help").stdout
    for flag in (
        "--host",
        "--port",
        "--alias",
        "--model",
        "--device",
        "--dtype",
        "--kernels",
        "--context",
        "--quantize",
        "--config",
    ):
        assert flag in shown
    assert "EASEL_MAX_WAITING" in shown
    assert not re.search(r"--api-key\s", shown)


def test_an_unknown_config_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "easel.toml"
    file.write_text("[server]\nprot = 1\n")
    done = _easel("serve", "--config", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"easel: {file}: unknown key 'prot' in [server]; did you mean 'port'?\n"


def test_a_port_in_use_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _easel("serve", "--port", str(port), "--model", "/nowhere/at all")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"easel: port {port} is in use; choose another with --port {port + 1}"


# Address and names


def test_a_bound_port_cannot_be_bound_again() -> None:
    with closing(bind("127.0.0.1", 0)) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(AddressError, match=f"port {port} is in use"):
            bind("127.0.0.1", port)


def test_addresses_are_shown_as_a_client_types_them() -> None:
    with closing(bind("0.0.0.0", 0)) as wildcard:
        assert url(wildcard).startswith("http://127.0.0.1:")
    with pytest.raises(AddressError, match=r"no such address: no\.such"):
        bind("no.such.host.invalid", 0)


def test_model_names(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert model_names(load_settings({})) == ("easel-demo",)
    assert model_names(load_settings({"model": str(folder), "alias": ["a", "b"]})) == ("my-model", "a", "b")
    assert model_names(load_settings({"model": "owner/name"})) == ("owner/name",)


# Chat


def test_chat_from_a_pipe() -> None:
    engine = FakeEngine([script("Hello, ", "Ana."), script("Again.")])
    with _server(engine) as address:
        done = _easel("chat", "--url", address, stdin="Hi\n/system Be brief.\nMore\n")
    assert done.returncode == 0, done.stderr
    assert "Hello, Ana.\n" in done.stdout
    assert "2 canvases · 6 steps" in done.stdout
    asked = [bytes_of(request.prompt_ids) for request in engine.requests]
    assert asked[0].endswith("<|turn>user\nHi<turn|>\n<|turn>model\n")
    assert "<|turn>system\nBe brief.<turn|>" in asked[1]
    assert "<|turn>model\nHello, Ana.<turn|>\n<|turn>user\nMore<turn|>" in asked[1]


def test_chat_commands() -> None:
    engine = FakeEngine([script("One."), script("<|channel>thought\nHm.\n<channel|>Two.")])
    with _server(engine) as address:
        done = _easel("chat", "--url", address, stdin="A\n/reset\n/think\n/thnk\n/help\nB\n/quit\nC\n")
    assert done.returncode == 0, done.stderr
    assert "Did you mean /think?" in done.stdout
    assert "Hm.\nTwo.\n" in done.stdout
    assert len(engine.requests) == 2
    second = bytes_of(engine.requests[1].prompt_ids)
    assert "One." not in second
    assert "<|think|>" in second


def test_chat_sends_the_key_and_shows_refusals() -> None:
    with _server(FakeEngine([script("Yes.")]), api_key="secret") as address:
        assert "Yes." in _easel("chat", "--url", address, stdin="A\n", EASEL_API_KEY="secret").stdout
        refused = _easel("chat", "--url", f"{address}/v1/", stdin="A\n")
    assert refused.returncode == 2
    assert "API key" in refused.stderr


def test_chat_goes_on_after_a_failed_reply() -> None:
    broken = script("Half", reason="error", error="it broke")
    engine = FakeEngine([broken, script("Whole.")])
    with _server(engine) as address:
        done = _easel("chat", "--url", address, stdin="First\nSecond\n")
    assert done.returncode == 0, done.stderr
    assert "Whole." in done.stdout
    assert "First" not in bytes_of(engine.requests[1].prompt_ids)


def test_chat_keeps_control_characters_from_the_terminal() -> None:
    with _server(FakeEngine([script("a\x1b[31mb")])) as address:
        assert "a[31mb" in _easel("chat", "--url", address, stdin="A\n").stdout


def test_ctrl_c_stops_the_reply_and_not_the_program() -> None:
    endless = script(*["word " * 12] * 500, steps=2, step_seconds=0.05)
    engine = FakeEngine([endless, script("Short.")])
    with _server(engine) as address:
        terminal = Terminal("chat", "--url", address)
        terminal.wait_for("> ")
        terminal.type("Go\n")
        terminal.wait_for("word word")
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        assert _soon(lambda: engine.ended == [engine.requests[0].id]), "the server went on working"
        terminal.wait_for("> ")
        terminal.type("\x03")
        terminal.wait_for("(ctrl-D leaves)")
        terminal.type("Next\n")
        terminal.wait_for("Short.")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.exit_status() == 0
    # What was on the screen is in the history.
    assert "<|turn>model\nword word" in bytes_of(engine.requests[1].prompt_ids)


# Bench


def test_measure_reports_what_the_engine_did() -> None:
    engine = FakeEngine([script("abcd", "ef", steps=4)])
    ticks = iter(range(100))
    one = measure(engine, "Q", (2, 3), seed=5, clock=lambda: float(next(ticks)))
    assert (one.prompt_tokens, one.completion_tokens, one.canvases, one.denoise_steps) == (2, 7, 2, 8)
    assert (one.seconds_to_first_text, one.seconds, one.finish_reason) == (1.0, 2.0, "stop")
    total = summary([one, one])
    assert total["tokens_per_second"] == 14 / 4
    assert total["steps_per_canvas"] == 4
    assert total["tokens_per_forward"] == 14 / 16
    assert total["milliseconds_per_step"] == 250
    assert engine.requests[0].max_tokens == engine.context_length - 2


def test_what_cannot_be_measured_is_null() -> None:
    one = measure(FakeEngine([script()]), "Q", (2,), seed=0)
    assert one.seconds_to_first_text is None
    assert summary([one])["tokens_per_forward"] is None


def test_story_prompts_differ() -> None:
    prompts = list(story_prompts(64))
    assert prompts[0] == "Write a story about Mia and a fox."
    assert len(set(prompts)) == 64


# The real thing: the bundled model in a process of its own


def test_serve_answers_and_stops_on_sigterm() -> None:
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--device", "cpu", "--alias", "gpt-4o"],
        env=clean_environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        screen = ""
        while "curl " not in screen:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            screen += line
        assert "easel-demo = gpt-4o" in screen
        curl = screen.splitlines()[-1]
        found = re.fullmatch(r"curl (http://127.0.0.1:\d+/v1/chat/completions) -H '(.*): (.*)' -d '(.*)'", curl)
        assert found, curl
        answer = httpx.post(found[1], content=found[4], headers={found[2]: found[3]}, timeout=PATIENCE, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, log
    assert f'"model": "{DEMO_CHECKPOINT}"' in log
    assert "Traceback" not in log


def test_chat_with_the_model_in_the_same_process() -> None:
    done = _easel("chat", "--device", "cpu", stdin="What is 2 + 2?\n")
    assert done.returncode == 0, done.stderr
    assert "tokens per forward" in done.stdout


def test_bench_ends_with_one_json_document() -> None:
    done = _easel("bench", "--device", "cpu", "--requests", "2", "--max-tokens", "40", "--prompt", "Who are you?")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert any("forward" in line for line in table)
    document = json.loads(last)
    assert len(document["requests"]) == document["summary"]["requests"] == 2
    assert document["summary"]["tokens_per_second"] > 0
    assert document["summary"]["steps_per_canvas"] >= 1
    assert document["engine"]["device"] == "cpu"


def test_bench_of_a_shape_ends_with_the_same_document(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    done = _easel(
        *("bench", "--shape", "tiny", "--weights", "random", "--format", "nvfp4", "--device", "cpu", "--steps", "3"),
        *("--prompt", "16", "--only", "step", "--only", "memory", "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    document = json.loads(last)
    assert json.loads(path.read_text(encoding="utf-8")) == document
    figures = document["runs"][0]["figures"]
    assert list(figures) == ["step@16", "engine@16", "canvas@16", "memory"]
    (step,) = (line for line in table if "denoise step, prefix 16" in line)
    assert f"{figures['step@16']['value']:.2f} ms" in step and step.count("%") == 1
    assert any("memory over weights" in line and "counted on a GPU only" in line for line in table)
    assert "nvfp4: denoise step, prefix 16: " in done.stderr


def test_bench_of_a_shape_counts_for_cards_that_are_not_here() -> None:
    done = _easel("bench", "--shape", "26b-a4b", "--format", "bf16", "--format", "nvfp4", "--computed")
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first.startswith("Computed, not measured")
    assert any(line.split() == ["DGX", "Spark", "191.0", "71.02"] for line in lines)
    assert json.loads(last)["bench"] == "computed"


def bytes_of(ids: tuple[int, ...]) -> str:
    """The prompt as text, control tokens spelled out."""
    return byte_tokenizer().decode(list(ids), skip_special_tokens=False)


def _soon(condition: object, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def test_quantize_writes_a_checkpoint_that_answers(tmp_path: Path) -> None:
    out = tmp_path / "demo-nvfp4"
    done = _easel("quantize", str(DEMO_CHECKPOINT), str(out), "--format", "nvfp4", "--quantize-dense", "fp8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: ") and done.stdout.endswith(" MB\n")
    asked = _easel("bench", "--model", str(out), "--requests", "1", "--prompt", "What is 17 + 25?")
    assert asked.returncode == 0
    assert "weights nvfp4" in asked.stdout
