"""Which stored tensors make up one matrix, and how: the layouts that checkpoints come in.

A quantised matrix [out, in] is stored as one module's tensors, experts one by one (`...experts.7.gate_proj`):

    modelopt NVFP4           weight U8 [out, in/2], weight_scale F8_E4M3 [out, in/16], weight_scale_2 F32 [],
                             input_scale F32 []
    nvfp4-pack-quantized     weight_packed U8 [out, in/2], weight_scale F8_E4M3 [out, in/16],
                             weight_global_scale F32 [1] (to divide by), input_global_scale F32 [1]
    float-quantized          weight F8_E4M3 [out, in], weight_scale [out, 1]
    pack-quantized           weight_packed I32 [out, in/8], weight_scale BF16 [out, in/32], weight_shape I64 [2]

The last three are compressed-tensors' names. Activations stay in 16 bit here, so the scales of inputs are not read.
Knows shapes and names, no torch and no files: what a checkpoint says of itself is `engine.quantization_config`'s.

Invariant: a matrix is stored in one way throughout. Parts of one matrix that differ are a CheckpointError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from engine.config import ModelConfig
from engine.interface import CheckpointError, EngineError
from engine.tensor_names import Place, tensor_table, vision_table

Format = Literal["fp8", "nvfp4", "int4"]
FORMATS: tuple[Format, ...] = ("fp8", "nvfp4", "int4")
GROUP: Mapping[Format, int] = {"fp8": 1, "nvfp4": 16, "int4": 32}  # columns that share a scale divide the columns
PLAIN = ("BF16", "F32")
How = Literal["copy", "bytes", "fill", "fill reciprocal"]

EXPERTS = frozenset({"expert_gate_up", "expert_down"})
DENSE = frozenset({"qkv", "out", "gate_up", "down"})  # attention and dense MLP of a layer


@dataclass(frozen=True)
class Part:
    """One stored tensor of a quantised matrix. `field` of our weight it fills; None: nobody reads it."""

    suffix: str
    field: str | None
    kinds: tuple[str, ...]  # safetensors' dtype names
    shape: Callable[[int, int], tuple[int, ...]]  # of rows and columns
    how: How = "copy"
    required: bool = True


@dataclass(frozen=True)
class Scheme:
    """One layout of a quantised matrix in a checkpoint."""

    title: str
    format: Format
    parts: tuple[Part, ...]


def _scalar(rows: int, columns: int) -> tuple[int, ...]:
    return ()


MODELOPT_NVFP4 = Scheme(
    "modelopt NVFP4",
    "nvfp4",
    (
        Part("weight", "packed", ("U8",), lambda rows, columns: (rows, columns // 2)),
        Part("weight_scale", "block_scale", ("F8_E4M3",), lambda rows, columns: (rows, columns // 16)),
        Part("weight_scale_2", "row_scale", ("F32",), _scalar, "fill"),
        Part("input_scale", None, ("F32",), _scalar),
    ),
)
PACKED_NVFP4 = Scheme(
    "compressed-tensors nvfp4-pack-quantized",
    "nvfp4",
    (
        Part("weight_packed", "packed", ("U8",), lambda rows, columns: (rows, columns // 2)),
        Part("weight_scale", "block_scale", ("F8_E4M3",), lambda rows, columns: (rows, columns // 16)),
        Part("weight_global_scale", "row_scale", ("F32",), lambda rows, columns: (1,), "fill reciprocal"),
        Part(
            "input_global_scale", None, ("F32",), lambda rows, columns: (1,), required=False
        ),  # only where activations are 4 bit too
    ),
)
FLOAT_FP8 = Scheme(
    "compressed-tensors float-quantized",
    "fp8",
    (
        Part("weight", "values", ("F8_E4M3",), lambda rows, columns: (rows, columns)),
        Part("weight_scale", "row_scale", ("BF16", "F16", "F32"), lambda rows, columns: (rows, 1)),
    ),
)
PACKED_INT4 = Scheme(
    "compressed-tensors pack-quantized",
    "int4",
    (
        # eight values an int32, low bits first: on a little-endian machine its bytes are ours
        Part("weight_packed", "packed", ("I32",), lambda rows, columns: (rows, columns // 8), "bytes"),
        Part("weight_scale", "group_scale", ("BF16",), lambda rows, columns: (rows, columns // 32)),
        Part("weight_shape", None, ("I64", "I32"), lambda rows, columns: (2,)),
    ),
)
SCHEMES = (MODELOPT_NVFP4, PACKED_NVFP4, FLOAT_FP8, PACKED_INT4)


@dataclass(frozen=True)
class Spec:
    """One of our weights: the matrix it stands for and how it is held; None = in the model's own dtype."""

    shape: tuple[int, ...]
    format: Format | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def bytes(self, itemsize: int) -> int:
        """Bytes it takes on the device; `itemsize` of the model's dtype."""
        if self.format is None:
            return self.numel * itemsize
        return sum(prod(shape) * size for shape, size in fields(self).values())


def fields(spec: Spec) -> dict[str, tuple[tuple[int, ...], int]]:
    """Field of the quantised weight -> its shape and the bytes of an item; the fields of `engine.kernels.weights`."""
    lead, columns = spec.shape[:-1], spec.shape[-1]
    match spec.format:
        case "fp8":
            return {"values": (spec.shape, 1), "row_scale": (lead, 4)}
        case "nvfp4":
            return {
                "packed": ((*lead, columns // 2), 1),
                "block_scale": ((*lead, columns // 16), 1),
                "row_scale": (lead, 4),
            }
        case "int4":
            return {"packed": ((*lead, columns // 2), 1), "group_scale": ((*lead, columns // 32), 2)}
        case None:
            raise ValueError("a weight that is not quantised has no fields")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One stored tensor that the checkpoint must hold, and the rows of our weight that it fills."""

    name: str  # our weight
    field: str | None  # of a quantised weight; None: the weight itself, or nobody reads it
    expert: int | None  # None: all of them
    start: int
    rows: int
    shape: tuple[int, ...]  # as stored
    kinds: tuple[str, ...]
    how: How
    read: bool = True
    required: bool = True
    scheme: Scheme | None = None


@dataclass(frozen=True)
class Choice:
    """What to quantise while loading: the experts' matrices, and attention and dense MLP."""

    experts: Format | None = None
    dense: Format | None = None

    def format_of(self, name: str) -> Format | None:
        """The format of our weight `name`; embedding, head, router, norms and self-conditioning have none."""
        kind = name.rpartition(".")[2]
        if kind in EXPERTS:
            return self.experts
        return self.dense if kind in DENSE and name.startswith("layers.") else None

    def __bool__(self) -> bool:
        return bool(self.experts or self.dense)

    @property
    def eight_bit(self) -> bool:
        """Whether fp8 layers may round their inputs to 8 bit: fp8 here is what is published as FP8-dynamic."""
        return "fp8" in (self.experts, self.dense)


def choose(quantize: str | None, quantize_dense: str | None) -> Choice:
    """The two options as a Choice. fp8 takes attention and dense MLP too, as the published checkpoint does; the
    4 bit formats leave them in 16 bit unless `quantize_dense` is "fp8". Raises EngineError."""
    if quantize is None:
        if quantize_dense is not None:
            raise EngineError("quantize_dense needs quantize: choose fp8, nvfp4 or int4 for the experts")
        return Choice()
    known = {name: name for name in FORMATS}
    if quantize not in known:
        raise EngineError(f"unknown format {quantize!r} to quantise to; choose {', '.join(FORMATS)}")
    if quantize_dense not in (None, "fp8"):
        raise EngineError(f"attention and dense MLP can be quantised to fp8 only, not {quantize_dense!r}")
    return Choice(known[quantize], "fp8" if quantize == "fp8" or quantize_dense else None)


@dataclass(frozen=True)
class Layout:
    """The stored tensors of a model, by name, and our weights that they fill, by name."""

    pieces: Mapping[str, Piece]
    weights: Mapping[str, Spec]

    @property
    def format(self) -> Format | None:
        """What the experts are held in, or if they are not quantised, whatever else is; None if nothing is."""
        formats = {name: spec.format for name, spec in self.weights.items() if spec.format is not None}
        experts = [form for name, form in formats.items() if name.rpartition(".")[2] in EXPERTS]
        return next(iter([*experts, *formats.values()]), None)

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of all weights on the device."""
        return sum(spec.bytes(itemsize) for spec in self.weights.values())


@dataclass(frozen=True)
class Module:
    """A linear layer as checkpoints name it: rows `start` to `start + rows` of a matrix, of one expert or of all."""

    name: str
    start: int
    rows: int
    columns: int
    expert: int | None


def modules(stored: str, place: Place) -> Iterator[Module]:
    """The linear layers that a tensor of the unquantised checkpoint holds; none for embeddings, norms and scales."""
    if stored.endswith(("_proj.weight", ".router.proj.weight")):
        rows, columns = place.shape
        yield Module(stored.removesuffix(".weight"), place.start, rows, columns, None)
        return
    prefix, _, kind = stored.rpartition(".")
    if not prefix.endswith(".experts"):
        return
    count, rows, columns = place.shape
    half = rows // 2
    spans = [("gate_proj", 0, half), ("up_proj", half, half)] if kind == "gate_up_proj" else [("down_proj", 0, rows)]
    for expert in range(count):
        for name, start, size in spans:
            yield Module(f"{prefix}.{expert}.{name}", start, size, columns, expert)


def layout(
    config: ModelConfig, scheme_of: Callable[[str], Scheme | None] = lambda module: None, choice: Choice | None = None
) -> Layout:
    """What a checkpoint holds whose linear layers are stored as `scheme_of` says, and what is made of it.

    `choice` names what an unquantised checkpoint is quantised to while loading. Raises CheckpointError for a matrix
    that cannot be stored so, or whose parts differ.
    """
    pieces: dict[str, Piece] = {}
    found: dict[str, tuple[str, Scheme | None]] = {}  # our weight -> a module of it and its scheme
    sizes: dict[str, tuple[int, ...]] = {}
    for stored, place in tensor_table(config).items():
        parts = list(modules(stored, place))
        scheme = _one_scheme(place.name, parts, scheme_of, found)
        if scheme is None:
            pieces[stored] = _plain(place)
        else:
            for module in parts:
                pieces.update(_quantised(place.name, module, scheme))
        rows, rest = place.shape[0], place.shape[1:]
        sizes[place.name] = (sizes.get(place.name, (0,))[0] + rows, *rest)
    if config.vision is not None:  # never quantised
        for stored, place in vision_table(config.vision, config.hidden_size).items():
            pieces[stored] = _plain(place)
            sizes[place.name] = place.shape
    weights: dict[str, Spec] = {}
    for name, shape in sizes.items():
        scheme = found[name][1] if name in found else None
        chosen = scheme.format if scheme else choice.format_of(name) if choice else None
        if chosen and shape[-1] % GROUP[chosen]:
            raise CheckpointError(
                f"{name} has {shape[-1]} columns, no multiple of the {GROUP[chosen]} that share a scale in {chosen}"
            )
        weights[name] = Spec(shape, chosen)
    return Layout(pieces, weights)


def _one_scheme(
    name: str,
    parts: list[Module],
    scheme_of: Callable[[str], Scheme | None],
    found: dict[str, tuple[str, Scheme | None]],
) -> Scheme | None:
    """The scheme of all `parts` of our weight `name`, those seen before included. Raises CheckpointError."""
    for module in parts:
        scheme = scheme_of(module.name)
        other, expected = found.setdefault(name, (module.name, scheme))
        if scheme is not expected:
            raise CheckpointError(
                f"quantization_config stores {other} as {_title(expected)} and {module.name} as {_title(scheme)}, "
                "but they are one matrix here; such a mixture is not supported"
            )
        if scheme and name.endswith(".router"):
            raise CheckpointError(f"quantization_config quantises {module.name}; routers must be left unquantised")
    return found[name][1] if parts else None


def _title(scheme: Scheme | None) -> str:
    return scheme.title if scheme else "unquantised"


def _plain(place: Place) -> Piece:
    return Piece(
        name=place.name,
        field=None,
        expert=None,
        start=place.start,
        rows=place.shape[0],
        shape=place.shape,
        kinds=PLAIN,
        how="copy",
    )


def _quantised(name: str, module: Module, scheme: Scheme) -> Iterator[tuple[str, Piece]]:
    for part in scheme.parts:
        yield (
            f"{module.name}.{part.suffix}",
            Piece(
                name=name,
                field=part.field,
                expert=module.expert,
                start=module.start,
                rows=module.rows,
                shape=part.shape(module.rows, module.columns),
                kinds=part.kinds,
                how=part.how,
                read=part.field is not None,
                required=part.required,
                scheme=scheme,
            ),
        )
