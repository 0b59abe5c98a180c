"""What a checkpoint's quantization_config says: which linear layers are quantised, and in which layout.

Two dialects: modelopt (globs of what is left out) and compressed-tensors (groups of targets, exceptions as names or
`re:` expressions). Nothing is guessed from tensors. Knows names only, no shapes.

`described` is the other direction: what a checkpoint that we write says of itself.

Invariant: what is not exactly one of the known schemes is a CheckpointError that names it and lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from engine.config import read_json
from engine.formats import FLOAT_FP8, MODELOPT_NVFP4, PACKED_INT4, PACKED_NVFP4, Choice, Format, Scheme
from engine.interface import CheckpointError

KNOWN = (
    "modelopt NVFP4 (group 16), and of compressed-tensors nvfp4-pack-quantized (group 16), float-quantized (8 bit, "
    "one scale a row) and pack-quantized (4 bit, group 32, symmetric)"
)
# compressed-tensors' format -> scheme and what its `weights` must say; a key left out has the value here
SCHEMES: Mapping[str, tuple[Scheme, Mapping[str, Any]]] = {
    "nvfp4-pack-quantized": (
        PACKED_NVFP4,
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
    ),
    "float-quantized": (
        FLOAT_FP8,
        {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None, "symmetric": True},
    ),
    "pack-quantized": (
        PACKED_INT4,
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
    ),
}

WRITTEN: Mapping[Format, str] = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "int4": "pack-quantized",
}
BY_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}  # inputs, as FP8-dynamic rounds them
LEFT_OUT = ("lm_head", "re:.*router.*", "re:.*self_conditioning.*", "re:.*vision_tower.*", "re:.*embed_vision.*")
DENSE_LAYERS = ("re:.*self_attn.*", "re:.*mlp.*")


@dataclass(frozen=True)
class Quantization:
    """The scheme of each linear layer of one checkpoint."""

    groups: tuple[tuple[Scheme, Callable[[str], bool]], ...]  # in order; the first that takes a layer has it
    ignored: Callable[[str], bool]
    eight_bit: bool = False  # every fp8 layer declares inputs of 8 bit, rounded a token at a time

    def scheme_of(self, module: str) -> Scheme | None:
        """How the linear layer `module` (a stored name without ".weight") is stored; None = unquantised."""
        if self.ignored(module):
            return None
        return next((scheme for scheme, takes in self.groups if takes(module)), None)


def load_quantization(folder: Path) -> Quantization | None:
    """Read config.json's quantization_config; None if there is none. Raises CheckpointError."""
    path = folder / "config.json"
    raw = read_json(path).get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: quantization_config must be an object, not {raw!r}; download it again")
    match raw.get("quant_method"):
        case "modelopt":
            return _modelopt(raw, path)
        case "compressed-tensors":
            return _compressed_tensors(raw, path)
        case other:
            _unknown(path, f"quant_method {other!r}")


def described(choice: Choice) -> dict[str, Any]:
    """quantization_config of a checkpoint whose experts, and dense layers, are quantised as `choice` says.

    Weights only: activations are left in 16 bit, but for fp8's, which are quantised a token at a time.
    """
    wanted: dict[Format, list[str]] = {}
    if choice.experts:
        wanted[choice.experts] = ["re:.*experts.*"]
    if choice.dense:
        wanted.setdefault(choice.dense, []).extend(DENSE_LAYERS)
    groups = {}
    for number, (form, targets) in enumerate(wanted.items()):
        groups[f"group_{number}"] = {
            "targets": targets if len(wanted) > 1 else ["Linear"],
            "weights": {**SCHEMES[WRITTEN[form]][1], "dynamic": False},
            "input_activations": {**BY_TOKEN, "symmetric": True} if form == "fp8" else None,
            "output_activations": None,
            "format": WRITTEN[form],
        }
    return {
        "quant_method": "compressed-tensors",
        "format": WRITTEN[next(iter(wanted))] if len(wanted) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*LEFT_OUT, *(() if choice.dense else DENSE_LAYERS)],
        "kv_cache_scheme": None,
    }


def _modelopt(raw: dict[str, Any], path: Path) -> Quantization:
    if raw.get("quant_algo") != "NVFP4":
        _unknown(path, f"modelopt's quant_algo {raw.get('quant_algo')!r}")
    sizes = {"group_size": raw.get("group_size")}
    for name, group in _groups(raw, path, required=False).items():
        sizes[name] = _weights(group, path, name).get("group_size")
    for name, size in sizes.items():
        if size not in (None, 16):
            _unknown(path, f"modelopt NVFP4 with group_size {size!r} ({name})")
    globs = _names(raw.get("ignore", raw.get("exclude_modules")), path, "ignore")

    def ignored(module: str) -> bool:
        # a name without wildcards stands for all that is below it, too
        return any(fnmatchcase(module, glob) or module.startswith(f"{glob}.") for glob in globs)

    return Quantization(((MODELOPT_NVFP4, lambda module: True),), ignored)


def _compressed_tensors(raw: dict[str, Any], path: Path) -> Quantization:
    if raw.get("quantization_status", "compressed") != "compressed":
        _unknown(path, f"compressed-tensors with quantization_status {raw['quantization_status']!r}")
    for key in ("transform_config", "sparsity_config"):
        if raw.get(key) and raw[key] != {"format": "dense"}:
            _unknown(path, f"compressed-tensors with a {key}")
    groups = []
    rounded = []  # of each fp8 group, whether its inputs are
    for name, group in _groups(raw, path, required=True).items():
        asked = group.get("format") or raw.get("format")
        if not isinstance(asked, str) or asked not in SCHEMES:
            _unknown(path, f"compressed-tensors' format {asked!r} ({name})")
        scheme, required = SCHEMES[asked]
        weights = _weights(group, path, name)
        for key, value in required.items():
            if weights.get(key, value) != value:
                _unknown(path, f"{asked} with {key} {weights[key]!r} ({name})")
        if weights.get("actorder") == "group":
            _unknown(path, f"{asked} with actorder 'group' ({name})")
        inputs = group.get("input_activations")
        if asked == "float-quantized" and inputs and inputs.get("dynamic") is not True:
            _unknown(path, f"{asked} with static activation scales ({name})")
        if asked == "float-quantized":
            rounded.append(all((inputs or {}).get(key) == value for key, value in BY_TOKEN.items()))
        groups.append((scheme, _matcher(_names(group.get("targets"), path, f"{name}.targets"))))
    ignored = _matcher(_names(raw.get("ignore"), path, "ignore"))
    return Quantization(tuple(groups), ignored, eight_bit=bool(rounded) and all(rounded))


def _groups(raw: dict[str, Any], path: Path, *, required: bool) -> dict[str, dict[str, Any]]:
    groups = raw.get("config_groups")
    if groups is None and not required:
        return {}
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{path}: quantization_config.config_groups must hold groups, not {groups!r}")
    return groups


def _weights(group: dict[str, Any], path: Path, name: str) -> dict[str, Any]:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        _unknown(path, f"a group without quantised weights ({name})")
    return weights


def _names(value: object, path: Path, key: str) -> Sequence[str]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{path}: quantization_config.{key} must be a list of names, not {value!r}")
    return value


def _matcher(targets: Sequence[str]) -> Callable[[str], bool]:
    """compressed-tensors' matching: a name, the class Linear (all we ask about), or re: and the start of a name."""
    try:
        patterns = [re.compile(target[3:]) for target in targets if target.startswith("re:")]
    except re.error as error:
        raise CheckpointError(f"quantization_config has an expression that is none: {error}") from None
    names = frozenset(targets)

    def matches(module: str) -> bool:
        return "Linear" in names or module in names or any(pattern.match(module) for pattern in patterns)

    return matches


def _unknown(path: Path, what: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: quantization_config: {what} is not supported; known are {KNOWN}. "
        "Choose such a checkpoint, or the unquantised one with --quantize"
    )
