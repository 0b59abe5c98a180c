"""Quantisers: how near they come, and what they must hold exactly; quantising while loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import quantize as quantisers
from engine.checkpoint import WEIGHTS, Checkpoint, load_checkpoint
from engine.engine import DiffusionEngine
from engine.formats import FORMATS, Format, choose, fields
from engine.interface import CheckpointError, EngineError, EngineOptions
from engine.kernels.weights import Fp8Weight, Int4Weight, Nvfp4Weight, dense
from engine.quantize import allocate, parts_of, quantize
from tests.engine.quantised_models import SIZES
from tests.engine.small_models import CPU, random_model, save, small_config

pytestmark = pytest.mark.usefixtures("one_thread")
# Relative error (root of the mean square) on normally distributed values.
ERRORS: dict[Format, float] = {"fp8": 0.028, "nvfp4": 0.085, "int4": 0.09}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def error(matrix: Tensor, form: Format) -> float:
    return float((dense(quantize(matrix, form), torch.float32) - matrix).norm() / matrix.norm())


@pytest.mark.parametrize("form", FORMATS)
def test_error_on_normal_values(form: Format, device: torch.device) -> None:
    assert error(normal(64, 704).to(device), form) < ERRORS[form]


@pytest.mark.parametrize("form", FORMATS)
def test_size_of_the_values_does_not_matter(form: Format) -> None:
    for factor in (1e-4, 3e3):
        assert error(factor * normal(64, 704), form) < ERRORS[form]


@pytest.mark.parametrize(("form", "group"), [("nvfp4", 16), ("int4", 32)])
def test_the_search_beats_the_usual_scale(form: Format, group: int) -> None:
    """The usual scale: the largest of a group becomes the largest number of the format."""
    matrix = normal(64, 704)
    groups = matrix.unflatten(-1, (-1, group))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    if form == "nvfp4":
        scale = (largest / 6).to(torch.float8_e4m3fn).float()
        steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = steps[(groups.abs() / scale)[..., None].sub(steps).abs().argmin(dim=-1)]
        usual = nearest * groups.sign() * scale
    else:
        scale = largest / 7
        usual = (groups / scale).round() * scale
    assert error(matrix, form) < 0.95 * float((usual - groups).norm() / matrix.norm())


@pytest.mark.parametrize("form", FORMATS)
def test_what_the_format_holds_is_kept_exactly(form: Format) -> None:
    """Quantising what was quantised changes nothing: the search finds the scales again, or as good ones."""
    once = dense(quantize(normal(32, 96), form), torch.float32)
    assert torch.equal(dense(quantize(once, form), torch.float32), once)


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_outliers_and_subnormals(form: Format) -> None:
    matrix = normal(8, 64)
    matrix[0] = 0
    matrix[1, 5] = 1e4
    matrix[2] *= 1e-30
    values = dense(quantize(matrix, form), torch.float32)
    assert values.isfinite().all() and (values[0] == 0).all()
    assert abs(values[1, 5] / 1e4 - 1) < 0.1
    assert (values[2].abs() < 1e-3).all()


@pytest.mark.parametrize("form", FORMATS)
def test_all_zero_matrix(form: Format) -> None:
    assert not dense(quantize(torch.zeros(4, 64), form), torch.float32).any()


@pytest.mark.parametrize("form", FORMATS)
def test_chunks_experts_and_dtype_of_the_input_change_nothing(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(3, 40, 64).bfloat16()
    whole = parts_of(quantize(matrix, form))
    monkeypatch.setattr(quantisers, "CHUNK", 7 * 64)
    for chunked in (quantize(matrix, form), quantize(matrix.float(), form)):
        assert all(torch.equal(bits(part), bits(whole[name])) for name, part in parts_of(chunked).items())
    for expert, rows in enumerate(matrix):
        alone = parts_of(quantize(rows, form))
        assert all(torch.equal(bits(part), bits(whole[name][expert])) for name, part in alone.items())


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_scales_are_numbers_that_checkpoints_store() -> None:
    eight = quantize(normal(32, 64), "fp8")
    assert isinstance(eight, Fp8Weight) and torch.equal(eight.row_scale.bfloat16().float(), eight.row_scale)
    four = quantize(normal(2, 32, 64), "nvfp4")
    assert isinstance(four, Nvfp4Weight)
    assert torch.equal(four.row_scale.log2(), four.row_scale.log2().round())
    assert torch.equal(four.row_scale.reciprocal().reciprocal(), four.row_scale)
    assert all(len(rows.unique()) == 1 for rows in four.row_scale)
    exact = dense(four, torch.float32)
    assert torch.equal(exact.bfloat16().float(), exact)
    assert isinstance(quantize(normal(32, 64), "int4"), Int4Weight)


@pytest.mark.parametrize(("form", "columns"), [("nvfp4", 24), ("int4", 48)])
def test_columns_that_no_group_divides(form: Format, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{columns} columns"):
        quantize(normal(4, columns), form)


def test_values_that_are_not_finite() -> None:
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="finite"):
            quantize(torch.full((2, 32), bad), "fp8")


@pytest.mark.parametrize("form", FORMATS)
def test_allocated_fields_are_those_the_plan_counts(form: Format) -> None:
    from engine.formats import Spec

    spec = Spec((3, 8, 64), form)
    parts = parts_of(allocate(spec, torch.float32, CPU))
    assert {name: (tuple(part.shape), part.element_size()) for name, part in parts.items()} == fields(spec)
    assert spec.bytes(4) == sum(part.nbytes for part in parts.values())


# while loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unquantised checkpoint; read only."""
    return save(random_model(small_config(**SIZES)).bfloat16(), tmp_path_factory.mktemp("plain"))


def load(folder: Path, quantize: str | None = None, dense: str | None = None) -> Checkpoint:
    return load_checkpoint(folder, CPU, torch.float32, progress=False, choice=choose(quantize, dense))


EXPERTS = {"expert_gate_up", "expert_down"}
DENSE = {"qkv", "out", "gate_up", "down"}


@pytest.mark.parametrize(
    ("form", "dense_form", "held"),
    [
        ("fp8", None, dict.fromkeys(EXPERTS | DENSE, Fp8Weight)),
        ("fp8", "fp8", dict.fromkeys(EXPERTS | DENSE, Fp8Weight)),
        ("nvfp4", None, dict.fromkeys(EXPERTS, Nvfp4Weight)),
        ("nvfp4", "fp8", dict.fromkeys(EXPERTS, Nvfp4Weight) | dict.fromkeys(DENSE, Fp8Weight)),
        ("int4", None, dict.fromkeys(EXPERTS, Int4Weight)),
        ("int4", "fp8", dict.fromkeys(EXPERTS, Int4Weight) | dict.fromkeys(DENSE, Fp8Weight)),
    ],
)
def test_what_is_quantised_while_loading(
    folder: Path, form: str, dense_form: str | None, held: dict[str, type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.CHUNK", 10_000)  # several chunks a matrix
    plain, quantised = load(folder), load(folder, form, dense_form)
    assert quantised.format == form
    assert quantised.parameters == plain.parameters
    assert quantised.tensors.keys() == plain.tensors.keys()
    for name, weight in quantised.tensors.items():
        kind = name.rpartition(".")[2]
        original = plain.tensors[name]
        assert isinstance(original, Tensor)
        if kind in held and name.startswith("layers."):
            assert isinstance(weight, held[kind]), name
            difference = (dense(weight, torch.float32) - original).norm() / original.norm()
            assert difference < 0.1, name
        else:
            assert isinstance(weight, Tensor) and torch.equal(weight, original), name


def test_progress_reaches_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_checkpoint(folder, CPU, torch.float32, choice=choose("nvfp4", None))
    assert "100%" in capsys.readouterr().err


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = save(random_model(small_config(**SIZES)).bfloat16(), tmp_path / "broken")
    name = "model.decoder.layers.1.experts.down_proj"
    tensors = load_file(broken / WEIGHTS)
    tensors[name][1, 2, 3] = torch.inf
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{name}.*not finite"):
        load(broken, "int4")


def test_a_matrix_that_no_group_divides_is_named(small_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expert_gate_up has 48 columns, no multiple of the 32"):
        load(small_checkpoint, "int4")


@pytest.mark.parametrize(
    ("quantize", "dense", "said"),
    [
        ("int8", None, "unknown format 'int8'.*fp8, nvfp4, int4"),
        ("nvfp4", "int4", "fp8 only, not 'int4'"),
        (None, "fp8", "quantize_dense needs quantize"),
    ],
)
def test_options_that_make_no_sense(quantize: str | None, dense: str | None, said: str, folder: Path) -> None:
    with pytest.raises(EngineError, match=said):
        DiffusionEngine.from_options(EngineOptions(model=str(folder), quantize=quantize, quantize_dense=dense))


def test_options_reach_the_engine(folder: Path) -> None:
    def info(**options: str) -> tuple[str, int]:
        engine = DiffusionEngine.from_options(EngineOptions(model=str(folder), device="cpu", progress=False, **options))
        engine.close()
        return engine.info.format, engine.info.weight_bytes

    sizes: Callable[..., int] = lambda **options: info(**options)[1]  # noqa: E731
    assert info(quantize="nvfp4", quantize_dense="fp8")[0] == "nvfp4"
    assert sizes() > sizes(quantize="nvfp4") > sizes(quantize="nvfp4", quantize_dense="fp8")
