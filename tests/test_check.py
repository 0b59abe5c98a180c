"""`easel check`: what it says about machines and checkpoints it has not seen before."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import EngineOptions, memory_plans
from server import check, cli
from server.check import GB, Finding, Gpu, Torch, check_fit, check_pools, check_port, check_torch, memory_table, runs_on
from server.checkpoint_check import check_checkpoint, plans_of
from server.config import DEMO_CHECKPOINT
from server.disk_check import check_disk, check_kernels_folder, check_models_folder

CPU_TORCH = Torch(version="2.13.0+cpu", cuda=None, architectures=(), gpus=())


def _gpu(total: float, free: float | None = None, capability: tuple[int, int] = (9, 0)) -> Gpu:
    return Gpu(name="Chip", capability=capability, total=int(total * GB), free=int((free or total) * GB))


def _torch(*gpus: Gpu) -> Torch:
    return Torch(version="2.13.0", cuda="13.0", architectures=("sm_80", "sm_90", "sm_120"), gpus=gpus)


def _levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.what.split(":")[0]: finding.level for finding in findings}


def test_a_machine_without_gpu_is_no_problem() -> None:
    found = [*check_torch(CPU_TORCH, {}), *check_fit(())]
    assert {finding.level for finding in found} == {"good", "note"}


def test_torch_without_cuda_beside_a_gpu_is_a_problem() -> None:
    (problem,) = (f for f in check_torch(CPU_TORCH, {"Chip": "580.1"}) if f.level == "problem")
    assert "built without CUDA" in problem.what
    assert "CUDA build" in problem.advice


def test_a_driver_torch_cannot_use_is_a_problem() -> None:
    (problem,) = (f for f in check_torch(_torch(), {"Chip": "470.1"}) if f.level == "problem")
    assert "470.1" in problem.what
    assert "CUDA 13.0" in problem.advice


def test_a_chip_this_torch_has_no_code_for_is_a_problem() -> None:
    new = _gpu(8, capability=(10, 3))
    assert [f.level for f in check_torch(_torch(_gpu(80)), {"Chip": "580.1"})] == ["good", "good"]
    (problem,) = (f for f in check_torch(_torch(new), {"Chip": "580.1"}) if f.level == "problem")
    assert "10.3" in problem.advice


def test_a_chip_our_kernels_are_not_compiled_for_is_a_problem() -> None:
    turing = replace(_torch(_gpu(24, capability=(7, 5))), architectures=("sm_75",))
    (problem,) = (f for f in check_torch(turing, {"Chip": "580.1"}) if f.level == "problem")
    assert "compute capability 7.5" in problem.what and "8.0" in problem.what
    assert "--device cpu" in problem.advice


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_90",), (12, 0), False),
        (("sm_90", "compute_90"), (12, 0), True),
        (("sm_120",), (12, 1), True),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_100f",), (10, 3), True),
        ((), (8, 0), False),
    ],
)
def test_which_chips_a_build_runs_on(
    architectures: tuple[str, ...], capability: tuple[int, int], expected: bool
) -> None:
    assert runs_on(architectures, capability) is expected


FOUR_BIT = {"nvfp4", "nvfp4, dense fp8", "int4", "int4, dense fp8"}


@pytest.mark.parametrize(
    ("gigabytes", "fitting"),
    [(80, {"bf16", "fp8", *FOUR_BIT}), (34, {"fp8", *FOUR_BIT}), (25.7, FOUR_BIT), (16, set())],
)
def test_which_formats_fit(gigabytes: float, fitting: set[str]) -> None:
    found = list(check_fit([_gpu(gigabytes)]))
    assert {name for name, level in _levels(found).items() if level == "good"} == fitting
    assert {name for name, level in _levels(found).items() if level == "note"} == {"bf16", "fp8", *FOUR_BIT} - fitting
    assert all("context of up to" in f.what for f in found if f.level == "good")
    assert all(
        re.search(r"GB of KV cache \(\d+ pages of full layers, \d+ of sl", f.what) for f in found if f.level == "good"
    )


def test_what_the_model_would_get_here() -> None:
    def said(**options: float) -> str:
        (found,) = check_pools([], EngineOptions(model=str(DEMO_CHECKPOINT), **options))
        return f"{found.level}: {found.what}"

    assert "good: The model would be served here with a context of up to 4096 and 4 requests at a time" in said()
    assert "a context of up to 300 and one request at a time" in said(slots=1, context_length=300)
    assert "problem: The model does not fit here" in said(kv_memory=0.001)
    assert list(check_pools([], EngineOptions(model="some/hub-id"))) == []


def test_slots_and_pages_of_a_large_card() -> None:
    (nvfp4,) = (f.what for f in check_fit([_gpu(141)]) if f.what.startswith("nvfp4: "))
    assert "context of up to 262144 and 4 requests at a time" in nvfp4


def test_table_of_formats_and_cards() -> None:
    title, cards, *rows = memory_table("Title", memory_plans(None)).splitlines()
    assert title == "Title"
    assert cards.split() == ["weights", *(word for size in (12, 16, 24, 32, 48, 96, 128) for word in (str(size), "GB"))]
    cells = {row[:16].strip(): row[16:].split() for row in rows}
    assert cells["bf16"] == ["51.65", "GB", "-", "-", "-", "-", "-", "256k", "256k"]
    assert cells["fp8"][:6] == ["27.23", "GB", "-", "-", "-", cells["fp8"][5]] and cells["fp8"][5].endswith("k")
    assert cells["nvfp4"][:4] == ["18.88", "GB", "-", "-"] and cells["nvfp4"][5:] == ["256k"] * 4
    assert cells.keys() == {"bf16", "fp8", *FOUR_BIT}


def test_the_table_is_of_the_model_that_was_named(tmp_path: Path) -> None:
    demo = plans_of(str(DEMO_CHECKPOINT))
    assert demo == plans_of("owner/no-such-model-anywhere")
    assert "published" in demo[0]
    copy = Path(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "copy"))
    title, plans = plans_of(str(copy))
    assert str(copy) in title
    assert plans[0].max_context == 4096 and plans[0].weights < 1e8


def test_a_gpu_in_use_is_a_problem() -> None:
    (problem,) = (f for f in check_fit([_gpu(80, free=25)]) if f.level == "problem")
    assert "bf16; fp8 would fit this GPU, but only 25.0 GB are free" in problem.what


def test_every_problem_says_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = check_port("127.0.0.1", taken.getsockname()[1])
    found = [port, *check_torch(CPU_TORCH, {"Chip": "1"}), *check_fit([_gpu(80, free=1)])]
    problems = [finding for finding in found if finding.level == "problem"]
    assert len(problems) == 3
    assert all(problem.advice for problem in problems)


def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_TORCH_PROBE", "raise ImportError('libcudart is missing')")
    last = list(check.findings("127.0.0.1", 0, EngineOptions(model="nowhere")))[-1]
    assert last.level == "problem"
    assert "libcudart is missing" in last.what


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EASEL_PORT", "EASEL_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as left:
        cli.main(["check", "--port", "0"])
    said = capsys.readouterr().out
    assert "torch 2." in said
    assert " GB free in " in said
    assert "DiffusionGemma, canvas of" in said
    assert "longest context on a card of" in said
    assert left.value.code == (1 if "problem " in said else 0)


# The disk


def _free(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    usage = type(shutil.disk_usage("/"))(total=10**12, used=0, free=int(gigabytes * GB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


@pytest.mark.parametrize(
    ("free", "wanted", "level", "said"),
    [
        (100, "owner/name", "good", "a checkpoint of any format"),
        (30, "owner/name", "note", "fp8 27.2 GB, nvfp4 18.9 GB, int4 18.8 GB"),
        (3, "owner/name", "problem", "the smallest checkpoint takes 18.8 GB"),
        (3, None, "note", "the smallest checkpoint takes 18.8 GB"),
    ],
)
def test_room_for_a_download(
    free: float, wanted: str | None, level: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch, free)
    found = check_models_folder(tmp_path / "not" / "made" / "yet", wanted)
    assert (found.level, bool(found.advice)) == (level, free == 3)
    assert f"{free}.0 GB free in {tmp_path}" in found.what and said in found.what


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    wanted, idle = check_models_folder(tmp_path, "owner/name"), check_models_folder(tmp_path, None)
    assert (wanted.level, idle.level) == ("problem", "note")
    assert "HF_HOME" in wanted.advice and "HF_HOME" in idle.advice
    kernels = check_kernels_folder(tmp_path)
    assert (kernels.level, kernels.advice) == ("problem", "Set TRITON_CACHE_DIR.")


def test_room_for_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, 0.5)
    assert "has 0.50 GB free" in check_kernels_folder(tmp_path).what
    _free(monkeypatch, 2)
    assert check_kernels_folder(tmp_path).level == "good"


def test_kernels_are_compiled_for_a_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert len(list(check_disk(str(DEMO_CHECKPOINT), gpu=False))) == 1
    assert str(tmp_path) in list(check_disk(str(DEMO_CHECKPOINT), gpu=True))[1].what


# Checkpoint folders


def _write_tensors(path: Path, tensors: dict[str, str], *, cut: int = 0) -> None:
    """A safetensors file whose tensors all hold four bytes."""
    entries = {
        name: {"dtype": dtype, "shape": [2], "data_offsets": [4 * i, 4 * i + 4]}
        for i, (name, dtype) in enumerate(tensors.items())
    }
    header = json.dumps(entries).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4 * len(tensors))
    path.write_bytes(content[: len(content) - cut])


NAMES = ["model.decoder.embed_tokens.weight", "model.decoder.norm.weight", "model.decoder.layers.0.layer_scalar"]


def _checkpoint(folder: Path, *, dtype: str = "BF16", names: list[str] = NAMES, **config: Any) -> Path:
    basis = {"model_type": "diffusion_gemma", "canvas_length": 8, "text_config": {"num_hidden_layers": 1}}
    (folder / "config.json").write_text(json.dumps(basis | config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    for name in ("generation_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    _write_tensors(folder / "model.safetensors", dict.fromkeys(names, dtype))
    return folder


def _only_problem(folder: Path) -> str:
    (problem,) = (f for f in check_checkpoint(str(folder)) if f.level == "problem")
    assert problem.advice
    return problem.what


def test_a_good_folder(tmp_path: Path) -> None:
    found = list(check_checkpoint(str(_checkpoint(tmp_path))))
    assert [f.level for f in found] == ["good", "good"]
    assert "3 tensors" in found[1].what
    assert "bf16" in found[1].what


def test_no_folder_and_no_copy() -> None:
    (found,) = check_checkpoint("owner/no-such-model-anywhere")
    assert found.level == "problem"
    assert "no downloaded copy" in found.what
    (odd,) = check_checkpoint("no/such/folder")
    assert odd.level == "problem"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    (_checkpoint(tmp_path) / name).unlink()
    assert f"{name} is missing" in _only_problem(tmp_path)


def test_another_architecture(tmp_path: Path) -> None:
    assert "model_type 'llama'" in _only_problem(_checkpoint(tmp_path, model_type="llama"))


def test_a_file_cut_short(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    _write_tensors(tmp_path / "model.safetensors", dict.fromkeys(NAMES, "BF16"), cut=3)
    assert "model.safetensors is cut short" in _only_problem(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 4)
    assert "model.safetensors is cut short" in _only_problem(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{]")
    assert "is not a safetensors file" in _only_problem(tmp_path)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, text_config={"num_hidden_layers": 3})
    assert "model.decoder.layers.1.layer_scalar is missing and 1 more" in _only_problem(folder)


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    found = list(check_checkpoint(str(folder)))
    assert [f.level for f in found] == ["good", "good"]
    assert "modelopt NVFP4" in found[1].what
    other = _checkpoint(tmp_path, quantization_config={"quant_method": "gptq"})
    assert "quant_method 'gptq' is not supported; known are" in _only_problem(other)
    plain = _checkpoint(tmp_path, dtype="F8_E4M3")
    assert "stored as F8_E4M3" in _only_problem(plain)


def test_shards(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = {name: f"model-{i}.safetensors" for i, name in enumerate(NAMES)}
    for name, file in shards.items():
        _write_tensors(tmp_path / file, {name: "F32"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert [f.level for f in check_checkpoint(str(tmp_path))] == ["good", "good"]
    index.write_text(json.dumps({"weight_map": shards | {"extra": "model-0.safetensors"}}))
    assert "tensor extra is in the index but in no file" in _only_problem(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    assert "model-1.safetensors is missing" in _only_problem(tmp_path)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_no_driver_is_no_crash() -> None:
    assert check.driver() == check.Driver(gpus={})


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (
            0,
            "NVIDIA H200, 580.1\nNVIDIA, odd, 580.1\n",
            check.Driver(gpus={"NVIDIA H200": "580.1", "NVIDIA, odd": "580.1"}),
        ),
        (18, "Driver/library version mismatch\n", check.Driver(gpus={}, trouble="Driver/library version mismatch")),
        (9, "", check.Driver(gpus={}, trouble="status 9")),
        (6, "No devices were found\n", check.Driver(gpus={})),
    ],
)
def test_what_the_driver_says(status: int, said: str, expected: check.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], status, stdout=said, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert check.driver() == expected


def test_a_driver_in_trouble_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "probe_torch", lambda: CPU_TORCH)
    monkeypatch.setattr(check, "driver", lambda: check.Driver(gpus={}, trouble="version mismatch"))
    found = check.findings("127.0.0.1", 0, EngineOptions(model="nowhere"))
    (problem,) = (f for f in found if f.level == "problem")
    assert "version mismatch" in problem.what
    assert "nvidia-smi" in problem.advice


def test_a_driver_that_hangs_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 60)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "timed out" in check.driver().trouble
    with pytest.raises(check.ProbeError, match="two minutes"):
        check.probe_torch()
