"""Writes a quantised copy of a checkpoint in the published layout, so that other engines load it too.

The layout is compressed-tensors': experts one by one, in shards, with an index and a quantization_config. Tensors
pass one after the other, so memory is needed for one shard and for one chunk of a matrix. Knows no model.

Invariant: the folder appears whole or not at all, and never in place of something. Loading it gives, bit for bit,
what loading the original with the same choice gives.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.checkpoint import (
    DESCRIPTION,
    INDEX,
    Stored,
    check_tensors,
    open_tensors,
    plan_checkpoint,
    quantized_chunks,
    resolve_folder,
)
from engine.config import read_json
from engine.formats import Choice, Module, Part, Scheme, modules
from engine.interface import EngineError
from engine.kernels.weights import expert
from engine.quantization_config import SCHEMES, WRITTEN, described
from engine.quantize import parts_of
from engine.tensor_names import Place, tensor_table

SHARD_BYTES = 4 * 10**9
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".gguf", ".bin", ".pt", ".pth")  # not copied


def write_quantized(
    source: str | Path, target: Path, choice: Choice, device: torch.device, *, progress: bool = True
) -> Path:
    """Quantise the unquantised checkpoint `source` (folder or hub id) into the new folder `target`; returns it.

    The work is done on `device`. Raises EngineError if the folder is there already or the disk has no room, and
    CheckpointError for a source that cannot be quantised.
    """
    if not choice:
        raise EngineError("nothing to quantise: choose a format")
    partial = target.with_name(target.name + ".partial")
    for path in (target, partial):
        if path.exists():
            raise EngineError(f"{path} exists already; name another folder, or delete it first")
    plan = plan_checkpoint(source, choice)
    folder = resolve_folder(plan.source, (*DESCRIPTION, "*.safetensors"))
    with ExitStack() as stack:
        stored = open_tensors(folder, stack)
        check_tensors(stored, plan.layout, folder)
        partial.mkdir(parents=True)
        stack.callback(shutil.rmtree, partial, ignore_errors=True)  # has its final name by then, if all went well
        other = sum(tensor.bytes for name, tensor in stored.items() if name not in plan.layout.pieces)
        _require_room(partial, plan.layout.weight_bytes(2) + other)
        try:
            _write_tensors(partial, stored, tensor_table(plan.config), choice, device, progress)
            _copy_the_rest(folder, partial, choice)
            partial.rename(target)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{target} could not be written, and nothing of it is left: {error}") from error
    return target


def _write_tensors(
    folder: Path,
    stored: Mapping[str, Stored],
    table: Mapping[str, Place],
    choice: Choice,
    device: torch.device,
    progress: bool,
) -> None:
    total = sum(tensor.bytes for tensor in stored.values())
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="writing", disable=not progress) as bar:
        shards = _Shards(folder)
        for name in sorted(stored, key=lambda each: (str(stored[each].path), each)):
            for written, tensor in _tensors(stored[name], table.get(name), choice, device):
                shards.add(written, tensor)
            bar.update(stored[name].bytes)
        shards.close()


def _tensors(source: Stored, place: Place | None, choice: Choice, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """What becomes of one stored tensor: itself, or the tensors of the linear layers it holds."""
    form = choice.format_of(place.name) if place else None
    if place is None or form is None:
        yield source.name, source.file.get_tensor(source.name)
        return
    scheme = SCHEMES[WRITTEN[form]][0]
    layers = list(modules(source.name, place))
    if layers[0].expert is None:
        pieces = [parts_of(weight) for _, _, weight in quantized_chunks(source, form, device)]
        whole = {field: torch.cat([piece[field] for piece in pieces]) for field in pieces[0]}
        yield from _module(layers[0], scheme, whole)
        return
    for start, count, weight in quantized_chunks(source, form, device):
        for layer in layers:
            if layer.expert is not None and start <= layer.expert < start + count:
                matrix = parts_of(expert(weight, layer.expert - start))
                rows = {field: tensor[layer.start : layer.start + layer.rows] for field, tensor in matrix.items()}
                yield from _module(layer, scheme, rows)


def _module(layer: Module, scheme: Scheme, fields: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one linear layer: the inverse of how the reader places them."""
    for part in scheme.parts:
        if part.required:
            yield f"{layer.name}.{part.suffix}", _stored(part, fields, layer).cpu().contiguous()


def _stored(part: Part, fields: Mapping[str, Tensor], layer: Module) -> Tensor:
    shape = part.shape(layer.rows, layer.columns)
    if part.field is None:
        return torch.tensor([layer.rows, layer.columns])  # weight_shape, the only part that nobody here reads
    field = fields[part.field]
    match part.how:
        case "bytes":
            return field.contiguous().view(torch.int32)
        case "fill reciprocal":
            return field[0].reciprocal().reshape(shape)  # exact: the quantiser's global scales are powers of two
        case "copy" | "fill":
            # a row's scale is a bfloat16 number already
            return (field.bfloat16() if part.field == "row_scale" else field).reshape(shape)


class _Shards:
    """Collects tensors and writes them in files of some gigabytes, then the index that lists them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self._total = 0
        self._names: list[list[str]] = []  # of each shard

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held_bytes + tensor.nbytes > SHARD_BYTES and self._held:
            self._write()
        # a copy: views of one tensor cannot be saved, and the source file will be closed
        self._held[name] = tensor.clone()
        self._held_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is held and give the files their names."""
        self._write()
        count = len(self._names)
        index: dict[str, str] = {}
        for number, names in enumerate(self._names, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._folder / f"{number}.safetensors").rename(self._folder / final)
            index |= dict.fromkeys(names, final)
        content = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(index.items()))}
        (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        self._names.append(list(self._held))
        save_file(self._held, self._folder / f"{len(self._names)}.safetensors", metadata={"format": "pt"})
        self._total += self._held_bytes
        self._held, self._held_bytes = {}, 0


def _copy_the_rest(folder: Path, target: Path, choice: Choice) -> None:
    """Every other file of the checkpoint, and its config.json with our quantization_config."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
    config = read_json(folder / "config.json") | {"quantization_config": described(choice)}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EngineError(f"{needed / 1e9:.1f} GB are needed in {folder}, and {free / 1e9:.1f} GB are free")
