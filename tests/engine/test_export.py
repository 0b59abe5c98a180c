"""Quantised checkpoints that we write: loaded again they are bit for bit the same, and the library reads them."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine import export
from engine.checkpoint import INDEX, WEIGHTS, load_checkpoint
from engine.export import write_quantized
from engine.formats import FORMATS, choose, modules
from engine.interface import CheckpointError, EngineError
from engine.kernels.weights import dense
from engine.quantize import parts_of
from engine.tensor_names import tensor_table
from tests.engine.quantised_models import SIZES
from tests.engine.small_models import CPU, random_model, save, small_config

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [("fp8", None), ("nvfp4", None), ("int4", None), ("nvfp4", "fp8"), ("int4", "fp8")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unquantised checkpoint; read only."""
    folder = save(random_model(small_config(**SIZES)).bfloat16(), tmp_path_factory.mktemp("plain"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write(source: Path, target: Path, form: str, dense_form: str | None = None) -> Path:
    return write_quantized(source, target, choose(form, dense_form), CPU, progress=False)


def stored(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for file in set(index.values()):
        tensors |= load_file(folder / file)
    assert tensors.keys() == index.keys()
    return tensors


@pytest.mark.parametrize(("form", "dense_form"), CASES)
def test_round_trip_is_bit_exact(
    form: str, dense_form: str | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.CHUNK", 10_000)  # several chunks a matrix
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    folder = write(source, tmp_path / "made", form, dense_form)
    written = load_checkpoint(folder, CPU, torch.float32, progress=False)
    direct = load_checkpoint(source, CPU, torch.float32, progress=False, choice=choose(form, dense_form))
    assert written.format == direct.format == form
    assert written.tensors.keys() == direct.tensors.keys()
    for name, weight in direct.tensors.items():
        ours, theirs = parts_of(weight), parts_of(written.tensors[name])
        assert ours.keys() == theirs.keys(), name
        for field, tensor in ours.items():
            assert torch.equal(tensor.view(torch.uint8), theirs[field].view(torch.uint8)), (name, field)


@pytest.mark.parametrize(("form", "dense_form"), CASES)
def test_the_library_reads_it(form: str, dense_form: str | None, source: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors.base")
    matching = pytest.importorskip("compressed_tensors.utils.match")
    folder = write(source, tmp_path / "made", form, dense_form)
    config = library.QuantizationConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    tensors = stored(folder)
    loaded = load_checkpoint(folder, CPU, torch.float32, progress=False)
    linear = torch.nn.Linear(1, 1)
    checked = set()
    for name, place in tensor_table(loaded.config).items():
        for module in modules(name, place):
            schemes = [
                scheme
                for scheme in config.config_groups.values()
                if matching.is_match(module.name, linear, scheme.targets, config.ignore)
            ]
            parts = {key.rpartition(".")[2]: part for key, part in tensors.items() if key.startswith(module.name + ".")}
            assert len(schemes) == ("weight_scale" in parts), module.name
            if not schemes:
                continue
            packing = schemes[0].format if config.format == "mixed-precision" else config.format
            compressor = compressors.BaseCompressor.get_value_from_registry(packing)
            assert set(compressor.compression_param_names(schemes[0])) == parts.keys()
            if packing != "nvfp4-pack-quantized":  # of which the library makes bfloat16, exact here
                parts["weight_scale"] = parts["weight_scale"].float()
            read = compressor.decompress(parts, schemes[0])["weight"].float()
            ours = dense(loaded.tensors[place.name], torch.float32)
            ours = ours if module.expert is None else ours[module.expert]
            assert torch.equal(ours[module.start : module.start + module.rows], read), module.name
            checked.add(module.name.rpartition(".")[2])
    expected = {"gate_proj", "up_proj", "down_proj"}
    assert checked == expected | ({"q_proj", "k_proj", "v_proj", "o_proj"} if "fp8" in (form, dense_form) else set())


def test_gate_and_up_of_an_expert_share_their_global_scale(source: Path, tmp_path: Path) -> None:
    """Other engines fuse the two and have one scale for both."""
    tensors = stored(write(source, tmp_path / "made", "nvfp4"))
    experts = [name for name in tensors if name.endswith("gate_proj.weight_global_scale")]
    assert len(experts) == SIZES["num_experts"] * 5
    for name in experts:
        assert torch.equal(tensors[name], tensors[name.replace("gate_proj", "up_proj")])


def test_everything_else_is_copied(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "deep" / "made", "nvfp4")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((each / "config.json").read_text()) for each in (source, folder))
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before
    original, tensors = load_file(source / WEIGHTS), stored(folder)
    kept = [name for name in original if not name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert any("vision_tower" in name for name in kept)
    assert all(torch.equal(tensors[name], original[name]) for name in kept)
    assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize("left", ["made", "made.partial"])
def test_nothing_is_overwritten(source: Path, tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(EngineError, match=f"{left} exists already"):
        write(source, tmp_path / "made", "fp8")
    assert not list((tmp_path / left).iterdir())


def test_a_quantised_source_is_refused(source: Path, tmp_path: Path) -> None:
    folder = write(source, tmp_path / "made", "fp8")
    with pytest.raises(CheckpointError, match="quantised already"):
        write(folder, tmp_path / "again", "nvfp4")
    assert not (tmp_path / "again").exists()


def test_a_disk_without_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(EngineError, match=r"GB are needed in .*made.partial, and 0.0 GB are free"):
        write(source, tmp_path / "made", "int4")
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(export, "_copy_the_rest", fail)
    with pytest.raises(EngineError, match="nothing of it is left: the disk went away"):
        write(source, tmp_path / "made", "fp8")
    assert not list(tmp_path.iterdir())


def test_all_formats_are_written() -> None:
    assert {form for form, _ in CASES} == set(FORMATS)


def test_a_disk_that_fills_up_leaves_nothing(source: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(EngineError, match=r"could not be written, and nothing of it is left: .*File too large"):
            write(source, tmp_path / "out", "nvfp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
