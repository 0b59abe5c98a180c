"""Quantisers: a matrix becomes a stored weight of a given format, with the smallest squared error we know how to find.

    fp8    one scale a row, so that the row's largest value is the largest of e4m3
    nvfp4  one global scale a matrix, a power of two; per 16 columns the e4m3 scale, of eleven around the usual one,
           that leaves the least squared error
    int4   per 32 columns the scale, of fourteen up to the one that just holds every value, with the least error

Scales are rounded to what published checkpoints store (fp8's and int4's to bfloat16, nvfp4's global one to a power of
two, whose reciprocal is exact), so writing a weight out and loading it again gives the same bits. Knows no names.

Invariant: a matrix is worked on in chunks; beside input and result a call needs some hundred MiB at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.formats import Format, Spec, fields
from engine.kernels.weights import (
    E2M1,
    INT4_GROUP,
    NVFP4_GROUP,
    Fp8Weight,
    Int4Weight,
    Nvfp4Weight,
    QuantizedWeight,
    Weight,
)

CHUNK = 2**23  # values worked on at a time
E4M3_MAX = 448.0
E2M1_MAX = 6.0
FIELD_DTYPES = {
    "values": torch.float8_e4m3fn,
    "packed": torch.uint8,
    "block_scale": torch.float8_e4m3fn,
    "row_scale": torch.float32,
    "group_scale": torch.bfloat16,
}
WEIGHTS: dict[str, type[Fp8Weight] | type[Nvfp4Weight] | type[Int4Weight]] = {
    "fp8": Fp8Weight,
    "nvfp4": Nvfp4Weight,
    "int4": Int4Weight,
}


def allocate(spec: Spec, dtype: torch.dtype, device: torch.device) -> Weight:
    """Memory for a weight; `dtype` is that of one that is not quantised."""
    if spec.format is None:
        return torch.empty(spec.shape, dtype=dtype, device=device)
    parts = {
        name: torch.empty(shape, dtype=FIELD_DTYPES[name], device=device) for name, (shape, _) in fields(spec).items()
    }
    return WEIGHTS[spec.format](**parts)


def parts_of(weight: Weight) -> dict[str, Tensor]:
    """Field -> tensor, as in `formats.fields`; a plain tensor is the one field ""."""
    return {"": weight} if isinstance(weight, Tensor) else dict(vars(weight))


def quantize(matrix: Tensor, form: Format) -> QuantizedWeight:
    """The stored weight nearest to `matrix` [out, in] or [n, out, in], any float dtype, on its device.

    Each of the n matrices has a global scale of its own in nvfp4. Raises ValueError for a number of columns that the
    format's group does not divide, or values that are not finite.
    """
    group = {"fp8": 1, "nvfp4": NVFP4_GROUP, "int4": INT4_GROUP}[form]
    if matrix.shape[-1] % group:
        raise ValueError(f"{matrix.shape[-1]} columns are no multiple of {group}")
    weight = allocate(Spec(tuple(matrix.shape), form), torch.float32, matrix.device)
    if isinstance(weight, Nvfp4Weight):
        weight.row_scale.copy_(_global_scale(matrix)[..., None].expand_as(weight.row_scale))
    targets = {name: tensor.flatten(0, -2 if name != "row_scale" else -1) for name, tensor in parts_of(weight).items()}
    rows = matrix.reshape(-1, matrix.shape[-1])
    for start, end in _chunks(rows):
        chunk = rows[start:end].float()
        if not chunk.isfinite().all():
            raise ValueError("a weight is not finite")
        part = {name: tensor[start:end] for name, tensor in targets.items()}
        if form == "fp8":
            _fp8(chunk, **part)
        elif form == "nvfp4":
            _nvfp4(chunk, **part)
        else:
            _int4(chunk, **part)
    return weight  # type: ignore[return-value]  # a Spec with a format allocates no plain tensor


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // rows.shape[-1])
    for start in range(0, rows.shape[0], step):
        yield start, min(start + step, rows.shape[0])


def _fp8(rows: Tensor, *, values: Tensor, row_scale: Tensor) -> None:
    """rows float32 [R, in] -> values float8_e4m3fn [R, in], row_scale float32 [R]."""
    scale = _bfloat16_at_least(rows.abs().amax(dim=-1) / E4M3_MAX)
    scale = torch.where(scale > 0, scale, 1.0)  # of a row of zeros
    values.copy_((rows / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(values.dtype))
    row_scale.copy_(scale)


def _nvfp4(rows: Tensor, *, packed: Tensor, block_scale: Tensor, row_scale: Tensor) -> None:
    """rows float32 [R, in], row_scale float32 [R] (read) -> packed uint8 [R, in / 2], block_scale e4m3 [R, in / 16]."""
    groups = (rows / row_scale[:, None]).unflatten(-1, (-1, NVFP4_GROUP))  # [R, in / 16, 16]
    usual = (groups.abs().amax(dim=-1) / E2M1_MAX).to(torch.float8_e4m3fn).view(torch.uint8).int()
    least = torch.full(usual.shape, torch.inf, device=rows.device)
    best_codes = torch.zeros(groups.shape, dtype=torch.uint8, device=rows.device)
    best_scale = torch.zeros_like(usual, dtype=torch.uint8)
    for offset in range(-3, 8):  # e4m3 codes are ordered like their values, eight to a factor of two; 126 is 448
        code = (usual + offset).clamp(0, 126).to(torch.uint8)
        scale = code.view(torch.float8_e4m3fn).float()[..., None]
        codes, values = _e2m1(groups / torch.where(scale > 0, scale, 1.0))
        error = (groups - values * scale).square().sum(dim=-1)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, code, best_scale)
        best_codes = torch.where(better[..., None], codes, best_codes)
    block_scale.copy_(best_scale.view(torch.float8_e4m3fn))
    packed.copy_(_packed(best_codes.flatten(-2)))


def _int4(rows: Tensor, *, packed: Tensor, group_scale: Tensor) -> None:
    """rows float32 [R, in] -> packed uint8 [R, in / 2], group_scale bfloat16 [R, in / 32]."""
    groups = rows.unflatten(-1, (-1, INT4_GROUP))  # [R, in / 32, 32]
    widest = torch.maximum(groups.amax(dim=-1) / 7, groups.amin(dim=-1) / -8).clamp(min=0)
    least = torch.full(widest.shape, torch.inf, device=rows.device)
    best_codes = torch.full(groups.shape, 8, dtype=torch.uint8, device=rows.device)
    best_scale = torch.zeros_like(widest)
    for step in range(14):
        scale = (widest * (1 - 0.025 * step)).bfloat16().float()
        codes = (groups / torch.where(scale > 0, scale, 1.0)[..., None]).round().clamp(-8, 7)
        error = (groups - codes * scale[..., None]).square().sum(dim=-1)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better[..., None], (codes + 8).to(torch.uint8), best_codes)
    group_scale.copy_(best_scale)
    packed.copy_(_packed(best_codes.flatten(-2)))


def _global_scale(matrix: Tensor) -> Tensor:
    """float32 [n] or []: the least power of two by which the largest value fits e2m1 times e4m3.

    A power of two costs nothing, because the scales it multiplies are floating-point numbers themselves, and makes
    every weight a product that bfloat16 holds exactly.
    """
    largest = matrix.abs().amax(dim=(-2, -1)).float() / (E2M1_MAX * E4M3_MAX)
    exponent = torch.frexp(largest).exponent  # largest = m * 2**exponent, 0.5 <= m < 1
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def _e2m1(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest e2m1 numbers: their codes uint8 and their values, both of x's shape."""
    table = torch.tensor(E2M1, device=x.device)
    bounds = (table[1:8] + table[:7]) / 2
    code = torch.bucketize(x.abs(), bounds) + 8 * (x < 0)
    return code.to(torch.uint8), table[code]


def _packed(codes: Tensor) -> Tensor:
    """uint8 [..., n] below 16 -> uint8 [..., n / 2], the even column in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _bfloat16_at_least(x: Tensor) -> Tensor:
    """float32, each the nearest bfloat16 number not below x >= 0."""
    nearest = x.bfloat16()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.float() < x, above, nearest).float()
