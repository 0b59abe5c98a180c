"""Inputs of the kernel tests: random weights in every format, and the bound that quantised ops are held to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.weights import Fp8Weight, Int4Weight, Nvfp4Weight, Weight

FORMATS = ("plain", "fp8", "nvfp4", "int4")
BOUND = 1e-2
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_HOPPER = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs an H100 or H200")]


def randn(*shape: int, seed: int = 0, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def random_weight(form: str, *shape: int, seed: int, device: torch.device) -> Weight:
    """Every stored byte is as likely as another, e4m3's NaNs left out; values are about one over the root of `in`."""
    generator = torch.Generator().manual_seed(seed)
    *outer, width = shape
    size = width**-0.5
    row_scale = torch.rand(outer, generator=generator) + 0.5

    def e4m3(*dims: int, low: int, high: int) -> Tensor:
        code = torch.randint(low, high + 1, dims, generator=generator, dtype=torch.uint8)
        return code.view(torch.float8_e4m3fn)

    if form == "plain":
        return (torch.randn(shape, generator=generator) * size).to(device, torch.bfloat16)
    packed = torch.randint(0, 256, (*outer, width // 2), generator=generator, dtype=torch.uint8)
    if form == "fp8":
        values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        values = torch.where((values & 0x7F) == 0x7F, 0, values).view(torch.float8_e4m3fn)
        return Fp8Weight(values.to(device), (row_scale * size / 100).to(device))
    if form == "nvfp4":  # scales from the smallest subnormal to the largest
        scale = e4m3(*outer, width // 16, low=1, high=0x7E)
        return Nvfp4Weight(packed.to(device), scale.to(device), (row_scale * size / 300).to(device))
    groups = torch.rand((*outer, width // 32), generator=generator) * size / 4
    return Int4Weight(packed.to(device), groups.to(device, torch.bfloat16))


def assert_near(result: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    """The whole within `bound` of the expected by norm, no entry further off than 4 times that of the largest."""
    assert result.shape == expected.shape and result.dtype == expected.dtype
    result, expected = result.float(), expected.float()
    difference = (result - expected).nan_to_num(posinf=0, neginf=0)
    assert torch.equal(result.isfinite(), expected.isfinite())
    finite = expected.where(expected.isfinite(), 0)
    assert difference.norm() <= bound * finite.norm()
    assert difference.abs().max() <= 4 * bound * finite.abs().max()


def skip_without_eight_bit(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this chip multiplies no 8-bit floats")
