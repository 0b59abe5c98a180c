"""The bench without a checkpoint, end to end on a tiny shape: every figure, its roofline, and what goes wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import options as choices
from engine.denoise import Denoiser
from engine.interface import EngineError
from engine.measure import figures
from engine.measure.__main__ import main
from engine.measure.clock import Clock
from engine.measure.figure import Figure
from engine.measure.figures import Bench
from engine.measure.memory import Memory
from engine.measure.options import GROUPS, BenchOptions
from engine.measure.profile import SUMS, profile, union
from engine.measure.rig import Rig
from engine.measure.roofline import Ceilings, Work
from engine.measure.run import bench, described
from engine.measure.start_up import start_up_figures
from engine.measure.summary import main as summarise
from engine.random_weights import plan_random, random_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["--shape", "tiny", "--device", "cpu", "--prompt", "16", "--steps", "3", "--slots", "1", "2"]
EVERYTHING = {
    "start",
    "step@16",
    "engine@16",
    "canvas@16",
    "commit@16",
    "reply@16",
    "first_text@64/4",
    "first_text@16/3",
    "memory",
    "prefill@64",
    "prefill@128",
    "prefill@256",
    "prefix@256",
    "turn@128",
    "beside@128",
    "slots@1",
    "slots@2",
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few laps: what is tested is that figures come, not how exact they are."""
    monkeypatch.setattr(figures, "LAPS", 4)
    monkeypatch.setattr(figures, "SECONDS", 0.1)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, float | int):
        yield value


def test_every_figure_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    assert main([*TINY, "--format", "bf16", "nvfp4+fp8", "--profile", "--json", str(path)]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert json.loads(path.read_text(encoding="utf-8")) == document
    assert [run["format"] for run in document["runs"]] == ["bf16", "nvfp4+fp8"]
    assert all(math.isfinite(number) for number in numbers(document))
    assert all(ceiling > 0 for ceiling in document["ceilings"].values())
    for run in document["runs"]:
        assert run["figures"].keys() == EVERYTHING
        for key, figure in run["figures"].items():
            if key == "memory":
                assert (figure["value"], figure["note"]) == (None, "counted on a GPU only")
                continue
            assert figure["note"] is None
            assert figure["value"] > 0 or key == "commit@16", key  # a difference of two medians, which may be noise
            if key != "start":
                roofline = figure["roofline"]
                assert roofline["bytes"] > 0 and roofline["flops"] > 0 and roofline["milliseconds"] > 0, key
                assert roofline["share"] == pytest.approx(roofline["milliseconds"] / figure["milliseconds"]), key
        assert len(run["profiles"]) == 3
        for rows in run["profiles"].values():
            names = [row["name"] for row in rows]
            assert "aten::mm" in names
            assert tuple(names[-3:]) == SUMS
    assert summarise([str(path)]) == 0
    heading, columns, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.endswith(f", torch {torch.__version__}")
    assert columns == "| | bf16 | nvfp4+fp8 |"
    (commit,) = (row for row in rows if "extra for the commit" in row)
    assert commit.count(" ms = ") == commit.count(" steps") == 2
    (memory,) = (row for row in rows if "memory over weights" in row)
    assert memory.endswith("| - | - |")
    (step,) = (row for row in rows if "| denoise step, prefix 16 |" in row)
    assert step.count(" ms (") == step.count(" %)") == 2
    assert any(line.startswith("nvfp4+fp8: denoise step, prefix 16 ") for line in shown)
    assert any(line.startswith("aten::mm ") for line in shown)


def test_rooflines_are_of_what_was_measured() -> None:
    options = BenchOptions(shape="tiny", prompts=(16, 32), steps=3, device="cpu", only=("step", "slots"), slots=(1, 2))
    *_, document = bench(options)
    found = {figure.key: figure for figure in document.runs[0].figures}
    works = {key: figure.work for key, figure in found.items()}
    assert works["step@16"] == works["slots@1"]
    step, canvas = works["step@32"], works["canvas@32"]
    assert isinstance(step, Work) and isinstance(canvas, Work)
    assert 2 * step.bytes < canvas.bytes < 3 * step.bytes  # the first of three passes is not self-conditioned
    slots = works["slots@2"]
    assert slots is not None and works["slots@1"] is not None
    assert slots.flops == pytest.approx(2 * works["slots@1"].flops)
    assert found["canvas@16"].also == (pytest.approx(16_000 / (found["canvas@16"].value or 0)), "tokens/s")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Every pass that is run: slots of its canvases, lengths of what it commits."""
    seen: list[tuple[list[int], list[int]]] = []
    step = Denoiser.step

    def watched(denoiser: Denoiser, canvases: Any, caches: Any, commits: Any = ()) -> None:
        seen.append(([canvas.slot for canvas in canvases], [len(ids) for ids, _ in commits]))
        step(denoiser, canvases, caches, commits)

    monkeypatch.setattr(Denoiser, "step", watched)
    monkeypatch.setattr(figures, "WARM_UP", 0)
    monkeypatch.setattr(figures, "FEW", 1)
    return seen


def rigged(slots: int) -> Bench:
    plan = plan_random("tiny", "bf16")
    checkpoint = random_checkpoint(plan, torch.device("cpu"), torch.float32)
    rig = Rig(checkpoint, title="tiny", kernels="reference", context=1024, slots=slots)
    return Bench(rig, Clock(torch.device("cpu")), plan.layout, Ceilings(bandwidth=1e10, matrix_rate=1e12), 4, steps=2)


def test_the_passes_are_those_of_the_engine(passes: list[tuple[list[int], list[int]]]) -> None:
    bench = rigged(1)
    bench.rig.serve(bench.rig.ids(700))
    bench.rig.serving()
    served = passes.copy()
    bench.rig.served()
    assert served == [([], [512]), ([0], [188]), ([0], [])]
    passes.clear()
    figures.first_text_figure(bench, 700, 2)
    assert passes == served


def test_a_prompt_beside_a_reply_comes_in_as_in_the_engine(passes: list[tuple[list[int], list[int]]]) -> None:
    bench = rigged(2)
    bench.rig.serve(bench.rig.ids(16))
    bench.rig.submit(bench.rig.ids(48))
    passes.clear()
    for _ in range(2):
        bench.rig.serving()
    served = passes.copy()
    bench.rig.served()
    assert served == [([0], [16]), ([0], [16])]
    passes.clear()
    figures.beside_figure(bench, 48, 16)
    assert passes[-3:] == [([0], [16])] * 3


def test_a_figure_that_has_no_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> Figure:
        raise torch.OutOfMemoryError("tried to take 9 GiB")

    monkeypatch.setattr(figures, "canvas_figure", full)
    assert main([*TINY, "--only", "step", "first-text"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["figures"]
    assert (found["canvas@16"]["value"], found["canvas@16"]["note"]) == (None, "no memory: tried to take 9 GiB")
    assert found["first_text@16/3"]["value"] > 0


def test_a_figure_that_fails_is_told_by_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> Figure:
        raise EngineError("logits of random weights are non-finite")

    monkeypatch.setattr(figures, "step_figure", broken)
    assert main([*TINY, "--only", "step"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["figures"]
    assert found["step@16"]["note"] == "logits of random weights are non-finite"
    assert found["canvas@16"]["value"] > 0


def test_a_run_that_is_killed_leaves_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> Figure:
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "canvas_figure", killed)
    path = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        main([*TINY, "--json", str(path)])
    found = json.loads(path.read_text(encoding="utf-8"))["runs"][0]["figures"]
    assert found.keys() == {"start", "step@16", "engine@16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "unknown shape 'huge'; choose 26b-a4b or tiny"),
        (["--format", "fp3"], "unknown format 'fp3'; choose bf16, fp8"),
        (["--steps", "49"], "steps must be in 2..48, not 49"),
        (["--prompt", "9999"], "a prompt must have 1 to 896 tokens"),
        (["--slots", "0"], "slots must be in 1..64"),
        (["--only", "luck"], f"unknown figures luck; choose {', '.join(GROUPS)}"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--json", "/nowhere/at/all.json", "--only", "start"], "/nowhere/at/all.json cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choices, "available_memory", lambda device: int(24e9))
    assert main(["--shape", "26b-a4b", "--device", "cpu", "--dtype", "bfloat16", "--format", "nvfp4", "bf16"]) == 2
    said = capsys.readouterr().err
    assert "as bf16 it needs 52." in said and "24.0 GB of memory are free on cpu" in said
    assert "what fits there is --format nvfp4 (context up to" in said


class FakeEvent:
    """An event of a GPU whose time passes by a millisecond a record."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As much of a GPU as timing and memory ask for."""
    told = {
        "synchronize": None,
        "empty_cache": None,
        "_sleep": None,
        "reset_peak_memory_stats": None,
        "max_memory_reserved": 5 * 2**30,
        "max_memory_allocated": 4 * 2**30,
        "mem_get_info": (2**30, 10 * 2**30),
        "get_device_name": "NVIDIA Imaginary",
        "get_device_capability": (9, 0),
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    properties = SimpleNamespace(total_memory=10 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    return torch.device("cuda", 0)


def test_the_devices_own_time_is_between_events(fake_gpu: torch.device) -> None:
    clock, calls = Clock(fake_gpu), []
    assert clock.device(lambda: calls.append(1), most=3, seconds=1.0, prepare=lambda: calls.append(0)) == 1.0
    assert calls == [0, 1, 0, 1, 0, 1]
    assert len(clock.laps(lambda: None, most=2, seconds=1.0)) == 2
    assert Clock(torch.device("cpu")).device(lambda: None, most=3, seconds=1.0) is None


def test_memory_is_what_was_taken_less_the_weights(fake_gpu: torch.device) -> None:
    memory = Memory(fake_gpu)
    memory.begin()
    figure = memory.figure(2 * 2**30, 128)
    assert (figure.value, figure.unit) == (3.0, "GiB")
    assert figure.detail["device_used_bytes"] == 9 * 2**30
    assert figure.detail["peak_in_use_bytes"] == 4 * 2**30


def test_a_gpu_is_named(fake_gpu: torch.device) -> None:
    facts = described(BenchOptions(shape="tiny"), fake_gpu, torch.bfloat16, "triton")
    assert (facts["device"], facts["capability"], facts["memory_bytes"]) == ("NVIDIA Imaginary", [9, 0], 10 * 2**30)
    assert json.loads(json.dumps(facts))["dtype"] == "bfloat16"


def test_profile_adds_up() -> None:
    left = torch.ones(64, 64)
    rows = profile(torch.device("cpu"), lambda: left @ left + left)
    *ops, everything, busy, wall = rows
    assert {"aten::mm", "aten::add"} <= {row["name"] for row in ops}
    assert sum(float(row["milliseconds"] or 0) for row in ops) == pytest.approx(float(everything["milliseconds"] or 0))
    assert sum(float(row["share"] or 0) for row in ops) == pytest.approx(1)
    assert 0 < float(busy["milliseconds"] or 0) <= float(wall["milliseconds"] or 0)


def test_what_overlaps_is_counted_once() -> None:
    assert union([]) == 0
    assert union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_start_up_is_measured_in_processes_of_its_own() -> None:
    options = BenchOptions(shape="tiny", device="cpu")
    cold, warm = start_up_figures(options, "bf16")
    assert (cold.key, warm.key) == ("start_up@cold", "start_up@warm")
    assert (cold.value or 0) > 0 and (warm.value or 0) > 0
    with pytest.raises(EngineError, match=r"a start ended with status 2: .*unknown format 'fp3'"):
        start_up_figures(options, "fp3")


def test_needs_no_server_and_counting_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "for name in ('fastapi', 'typer', 'rich', 'pydantic', 'uvicorn', 'starlette', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "from engine.measure.__main__ import main\n"
        "sys.exit(main(['--computed', '--format', 'bf16', 'nvfp4']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    steps = json.loads(done.stdout.splitlines()[-1])["steps"]
    assert {row["format"] for row in steps} == {"bf16", "nvfp4"}
