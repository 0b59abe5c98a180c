"""A checkpoint folder (or hub id) becomes named weights on the device.

`plan_checkpoint` reads configuration only and says what will be needed; `read_checkpoint` copies the stored tensors
one by one from the mapped file into their final place, quantising on the way if asked, so nothing is held twice.
Which tensors there must be is `engine.formats`' to say. Knows no layer's maths and builds no model.

Invariant: a folder loads completely or not at all. Every missing, unexpected or mis-shaped tensor is a
CheckpointError that names it; only the vision tower's are skipped where images are not served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from engine.config import (
    GenerationDefaults,
    ModelConfig,
    load_generation_defaults,
    load_model_config,
    read_json,
)
from engine.formats import SCHEMES, Choice, Format, Layout, Piece, layout
from engine.interface import CheckpointError
from engine.kernels.weights import Weight, nbytes, plain, shape
from engine.quantization_config import load_quantization
from engine.quantize import CHUNK, allocate, parts_of, quantize

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
PLAIN_FORMATS = {"BF16": "bf16", "F32": "fp32"}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4, "I64": 8}
DESCRIPTION = ("*.json", "*.jinja", "*.model")  # of a checkpoint: all but its weights


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint. `tensors` has our names, see `tensor_names.tensor_table`; tied weights are there once."""

    path: Path
    config: ModelConfig
    generation: GenerationDefaults
    tensors: MutableMapping[str, Weight]
    format: str  # of the experts: "fp8", "nvfp4" or "int4"; if nothing is quantised "bf16" or "fp32", as stored
    eight_bit: bool  # rows that meet fp8 weights may be rounded to 8 bit: these are to be run so

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return plain(self.tensors["embedding"]).device

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantised, and what the model computes in."""
        return plain(self.tensors["embedding"]).dtype

    @property
    def parameters(self) -> int:
        """Number of weights of the text model."""
        return sum(prod(shape(tensor)) for name, tensor in self.tensors.items() if not name.startswith("vision."))

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights take on the device."""
        return sum(nbytes(tensor) for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """What a checkpoint says of itself, before any weight is read. `source` as given, `path` the local folder."""

    source: str | Path
    path: Path
    config: ModelConfig
    generation: GenerationDefaults
    layout: Layout
    quantized: bool  # by the checkpoint itself
    eight_bit: bool  # as in `Checkpoint`

    @property
    def title(self) -> str:
        """Format of the experts; "bf16", for whatever the model computes in, if nothing is quantised."""
        return self.layout.format or "bf16"


def load_checkpoint(
    path_or_hub_id: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    choice: Choice | None = None,
) -> Checkpoint:
    """Load a folder, or a hub id such as "google/diffusiongemma-26B-A4B-it", onto `device`.

    What is not quantised becomes `dtype`; `choice` names what to quantise on the way. Raises CheckpointError, which
    says what is wrong with which file, key or tensor and what to do.
    """
    return read_checkpoint(plan_checkpoint(path_or_hub_id, choice), device, dtype, progress)


def plan_checkpoint(path_or_hub_id: str | Path, choice: Choice | None = None, *, images: bool = True) -> CheckpointPlan:
    """Read the configuration, and of a hub id download no more than that. Raises CheckpointError.

    `images`: with the vision tower of a checkpoint that takes images."""
    folder = resolve_folder(path_or_hub_id, DESCRIPTION)
    config = load_model_config(folder, images=images)
    generation = load_generation_defaults(folder)
    quantization = load_quantization(folder)
    if quantization is not None and choice:
        raise CheckpointError(
            f"{folder} is quantised already, so it cannot be quantised while loading; leave --quantize out"
        )
    return CheckpointPlan(
        source=path_or_hub_id,
        path=folder,
        config=config,
        generation=generation,
        layout=layout(config, quantization.scheme_of) if quantization else layout(config, choice=choice),
        quantized=quantization is not None,
        eight_bit=quantization.eight_bit if quantization else bool(choice and choice.eight_bit),
    )


def read_checkpoint(plan: CheckpointPlan, device: torch.device, dtype: torch.dtype, progress: bool) -> Checkpoint:
    """Load what was planned. Raises CheckpointError."""
    folder = resolve_folder(plan.source, (*DESCRIPTION, "*.safetensors"))
    with ExitStack() as stack:
        stored = open_tensors(folder, stack)
        check_tensors(stored, plan.layout, folder)
        tensors = _read(stored, plan.layout, device, dtype, progress)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what quantising worked in: the context is sized by what is free next
        kinds: Counter[str] = Counter()
        for name, piece in plan.layout.pieces.items():
            if piece.scheme is None:
                kinds[stored[name].kind] += stored[name].numel
    return Checkpoint(
        path=folder,
        config=plan.config,
        generation=plan.generation,
        tensors=tensors,
        format=plan.layout.format or PLAIN_FORMATS[kinds.most_common(1)[0][0]],
        eight_bit=plan.eight_bit,
    )


def resolve_folder(path_or_hub_id: str | Path, wanted: tuple[str, ...]) -> Path:
    """The local folder of a checkpoint; of a hub id the `wanted` files are downloaded first. Raises CheckpointError."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and {WEIGHTS}")
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {name}; give a checkpoint folder or a hub id (owner/name)")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(wanted)))
    except (HFValidationError, httpx.HTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a folder nor could it be downloaded: {error}. Check the name, the network and, for "
            "a gated model, that you are logged in; or download it elsewhere and give the folder"
        ) from error


@dataclass(frozen=True)
class Stored:
    """One tensor of an open safetensors file."""

    name: str
    file: Any  # safe_open, untyped
    path: Path
    shape: tuple[int, ...]
    kind: str  # safetensors' dtype name

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.kind]


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Stored]:
    """Every tensor stored in the folder, by name. The files stay open as long as `stack`."""
    stored: dict[str, Stored] = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, though {INDEX} lists it; download it again") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or not fully downloaded ({error}); download it again") from error
        for name in file.keys():
            if name in stored:
                raise CheckpointError(f"tensor {name} is stored twice, in {stored[name].path} and {path}")
            entry = file.get_slice(name)
            stored[name] = Stored(name, file, path, tuple(entry.get_shape()), entry.get_dtype())
    return stored


def _weight_files(folder: Path) -> Iterator[Path]:
    if (folder / WEIGHTS).exists():
        yield folder / WEIGHTS
        return
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; it is not a complete checkpoint")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to files; download it again")
    for shard in sorted(set(shards.values())):
        yield folder / shard


def check_tensors(stored: Mapping[str, Stored], plan: Layout, folder: Path) -> None:
    """Raise CheckpointError unless the stored tensors are exactly those of the layout, plus the vision tower's."""
    if missing := sorted(name for name, piece in plan.pieces.items() if piece.required and name not in stored):
        scheme = plan.pieces[missing[0]].scheme
        module = missing[0].rpartition(".")[0]
        why = (
            f"quantization_config says that {module} is stored as {scheme.title}; it contradicts the tensors, or the "
            "download is incomplete"
            if scheme
            else "it says how images are cut up, but has no tower for them; serve text only with --images off"
            if missing[0].startswith(VISION)
            else "the download is incomplete or for another model"
        )
        raise CheckpointError(f"{folder} lacks {_names(missing)}; {why}")
    surplus = sorted(name for name in stored.keys() - plan.pieces.keys() if not name.startswith(VISION))
    if surplus:
        module, _, suffix = surplus[0].rpartition(".")
        quantised = any(suffix == part.suffix for scheme in SCHEMES for part in scheme.parts)
        raise CheckpointError(
            f"{folder} holds {_names(surplus)}, which this model does not have; config.json does not match the weights"
            + (f": its quantization_config leaves {module} unquantised, or names another scheme" if quantised else "")
        )
    for name, piece in plan.pieces.items():
        if name in stored:
            _check_tensor(name, stored[name], piece)


def _check_tensor(name: str, tensor: Stored, piece: Piece) -> None:
    scalars = ((), (1,))  # written either way
    if tensor.shape != piece.shape and not (tensor.shape in scalars and piece.shape in scalars):
        raise CheckpointError(
            f"tensor {name} in {tensor.path} has shape {list(tensor.shape)}, but config.json asks for "
            f"{list(piece.shape)}; they belong to different models"
        )
    if tensor.kind not in piece.kinds:
        raise CheckpointError(
            f"tensor {name} in {tensor.path} is stored as {tensor.kind}; only {' and '.join(piece.kinds)} are "
            f"supported for {piece.scheme.title if piece.scheme else 'an unquantised tensor'}"
        )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor {', '.join(names[:3])}{more}"


def _read(
    stored: Mapping[str, Stored], plan: Layout, device: torch.device, dtype: torch.dtype, progress: bool
) -> dict[str, Weight]:
    """Allocate our weights on the device and copy every stored tensor into its place."""
    weights: dict[str, Weight] = {}
    wanted = {name: piece for name, piece in plan.pieces.items() if piece.read and name in stored}
    total = sum(stored[name].bytes for name in wanted)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="loading", disable=not progress) as bar:
        for name, piece in sorted(wanted.items(), key=lambda item: (str(stored[item[0]].path), item[0])):
            spec = plan.weights[piece.name]
            if piece.name not in weights:
                weights[piece.name] = allocate(spec, dtype, device)
            weight = weights[piece.name]
            if spec.format is not None and piece.scheme is None:
                for start, count, chunk in quantized_chunks(stored[name], spec.format, device):
                    for field, tensor in parts_of(chunk).items():
                        parts_of(weight)[field].narrow(0, piece.start + start, count).copy_(tensor)
                    bar.update(stored[name].bytes * count // piece.rows)
            else:
                _copy(stored[name].file.get_tensor(name), piece, parts_of(weight)[piece.field or ""])
                bar.update(stored[name].bytes)
    return weights


def _copy(tensor: Tensor, piece: Piece, target: Tensor) -> None:
    """One stored tensor into its rows of `target`, a field of our weight."""
    place = (target if piece.expert is None else target[piece.expert])[piece.start : piece.start + piece.rows]
    match piece.how:
        case "copy":
            place.copy_(tensor.reshape(place.shape))
        case "bytes":
            place.copy_(tensor.view(place.dtype))
        case "fill":
            place.fill_(tensor.item())
        case "fill reciprocal":
            place.fill_(tensor.reciprocal().item())  # in float32, as the tensor is


def quantized_chunks(source: Stored, form: Format, device: torch.device) -> Iterator[tuple[int, int, Weight]]:
    """A stored matrix, quantised some rows or experts at a time: first of them, their number, the weight.

    Raises CheckpointError if a value is not finite.
    """
    entry = source.file.get_slice(source.name)
    step = max(1, CHUNK // prod(source.shape[1:]))
    for start in range(0, source.shape[0], step):
        chunk = entry[start : start + step].to(device)
        try:
            yield start, len(chunk), quantize(chunk, form)
        except ValueError as error:
            raise CheckpointError(f"tensor {source.name} in {source.path} cannot be quantised: {error}") from None
