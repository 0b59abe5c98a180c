"""Looks a checkpoint folder over without loading it: configuration, files, tensor headers.

Reads JSON and the headers of safetensors files, a few kilobytes of however many gigabytes. Says what is missing
or cut short; whether every tensor has the right shape is the loader's to say. Invariant: a folder without a
problem here has all its files, whole.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import CheckpointError, MemoryPlan, memory_plans, stored_format
from server.check import GB, Finding
from server.config import DEMO_CHECKPOINT
from server.disk_check import downloaded

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LOADABLE_DTYPES = {"BF16": "bf16", "F32": "fp32"}
_NO_SCHEME = "config.json has no quantization_config that explains this; download the checkpoint again."
_AGAIN = "Download the checkpoint again, or name another folder."


class _Broken(Exception):
    """Something that stops the look at this folder."""


def check_checkpoint(model: str) -> Iterator[Finding]:
    """Findings about a folder, or about a hub id's downloaded copy."""
    folder = Path(model)
    if not folder.is_dir():
        cached = downloaded(model)
        if cached is None:
            yield Finding(
                "problem",
                f"Model {model}: no such folder, and no downloaded copy of a checkpoint of that name",
                "Check the name; a hub id is downloaded when `easel serve` first needs it, if there is a network.",
            )
            return
        folder = cached
    try:
        config = _read_json(folder / "config.json")
        yield from _check_config(folder, config)
        tensors = _tensors(folder)
        yield from _check_tensors(folder, config, tensors)
    except _Broken as error:
        yield Finding("problem", f"Model {folder}: {error}", _AGAIN)


def plans_of(model: str) -> tuple[str, Sequence[MemoryPlan]]:
    """What `easel check` shows the memory of, and its plans: the named model, or for the demo or one that is not
    here yet the published checkpoint. Raises CheckpointError."""
    folder = Path(model) if Path(model).is_dir() else downloaded(model)
    if folder is None or folder == DEMO_CHECKPOINT:
        return "The published checkpoint: longest context on a card of", memory_plans(None)
    return f"{model}: longest context on a card of", memory_plans(str(folder))


def _check_config(folder: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("model_type") != "diffusion_gemma":
        raise _Broken(f"config.json says model_type {config.get('model_type')!r}; only diffusion_gemma can be served")
    for name in ("generation_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise _Broken(f"{name} is missing")
    in_config = "chat_template" in _read_json(folder / "tokenizer_config.json")
    if not in_config and not (folder / "chat_template.jinja").is_file():
        raise _Broken("chat_template.jinja is missing")
    yield Finding("good", f"Model {folder}: DiffusionGemma, canvas of {config.get('canvas_length')} tokens")


def _check_tensors(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, str]) -> Iterator[Finding]:
    text = config.get("text_config", {})
    wanted = ["model.decoder.embed_tokens.weight", "model.decoder.norm.weight"]
    wanted += [f"model.decoder.layers.{layer}.layer_scalar" for layer in range(text.get("num_hidden_layers", 0))]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise _Broken(f"tensor {missing[0]} is missing" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    summary = f"{len(tensors)} tensors, {size / GB:.2f} GB"
    dtypes = {_LOADABLE_DTYPES.get(dtype, dtype) for dtype, _ in Counter(tensors.values()).most_common()}
    try:
        quantised = stored_format(str(folder))
    except CheckpointError as error:
        yield Finding("problem", f"Weights: {summary}. {error}", "Choose a checkpoint in a known format.")
        return
    if quantised is not None:
        yield Finding("good", f"Weights: {summary}, {quantised}, no file cut short")
    elif unknown := dtypes - set(_LOADABLE_DTYPES.values()):
        yield Finding("problem", f"Weights: {summary}, stored as {', '.join(sorted(unknown))}", _NO_SCHEME)
    else:
        yield Finding("good", f"Weights: {summary}, {' and '.join(sorted(dtypes))}, no file cut short")


def _tensors(folder: Path) -> dict[str, str]:
    """Tensor name -> dtype, from the headers of all weight files."""
    index = folder / _INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        found: dict[str, str] = {}
        for name in sorted(set(weight_map.values())):
            found |= _header(folder / name)
        lost = sorted(set(weight_map) - set(found))
        if lost:
            raise _Broken(f"tensor {lost[0]} is in the index but in no file")
        return found
    return _header(folder / _WEIGHTS)


def _header(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise _Broken(f"{path.name} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise _Broken(f"{path.name} is cut short")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            dtypes = {name: str(entry["dtype"]) for name, entry in tensors.items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Broken(f"{path.name} is not a safetensors file") from None
    if size != 8 + length + end:
        raise _Broken(f"{path.name} is cut short: {size} bytes, {8 + length + end} expected")
    return dtypes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise _Broken(f"{path.name} is missing") from None
    except ValueError:
        raise _Broken(f"{path.name} is not valid JSON") from None
    if not isinstance(content, dict):
        raise _Broken(f"{path.name} does not hold an object")
    return content
