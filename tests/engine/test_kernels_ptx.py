"""The PTX that decodes weights on a GPU, run by a small machine for the few instructions it uses.

Triton's interpreter runs no PTX and takes another way to the same values; without this the GPU's way would be checked
on a GPU only.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from engine.kernels import tiles
from engine.kernels.weights import E2M1


def bfloat16(half: int) -> Tensor:
    return torch.tensor([half << 16], dtype=torch.int64).to(torch.int32).view(torch.float32).double()


def bits(value: Tensor) -> int:
    return int(value.to(torch.bfloat16).view(torch.int16).item()) & 0xFFFF


def prmt(a: int, b: int, selector: int) -> int:
    source = a | b << 32
    return sum((source >> 8 * ((selector >> 4 * at) & 7) & 0xFF) << 8 * at for at in range(4))


def fma(a: int, b: int, c: int) -> int:
    low, high = (
        bits(bfloat16(a >> at & 0xFFFF) * bfloat16(b >> at & 0xFFFF) + bfloat16(c >> at & 0xFFFF)) for at in (0, 16)
    )
    return low | high << 16


MACHINE = {
    "mov.b32": lambda a: a,
    "prmt.b32": prmt,
    "shr.b32": lambda a, by: a >> by,
    "shl.b32": lambda a, by: a << by & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if table == 0xEA else pytest.fail("another table"),
    "fma.rn.bf16x2": fma,
    "low": lambda a: a & 0xFFFF,
    "high": lambda a: a >> 16,
}


def run(text: str, outputs: int, *inputs: int) -> list[int]:
    registers = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    text = re.sub(r"mov\.b32 \{(\S+),(\S+)\}, (\w+);", r"low \1, \3; high \2, \3;", text)
    for statement in re.split(r"[;{}]", text):
        name, *rest = statement.strip().split(maxsplit=1) or [""]
        if not name or name == ".reg":
            continue
        target, *operands = (operand.strip() for operand in rest[0].split(","))
        values = [registers[operand] if operand in registers else int(operand, 0) for operand in operands]
        registers[target] = MACHINE[name](*values)
    return [registers[f"${place}"] for place in range(outputs)]


def halves(*values: int) -> Tensor:
    return torch.cat([bfloat16(value) for value in values])


def words() -> list[int]:
    """Every byte, at every place of a word."""
    return [byte | (byte * 7 + 1) % 256 << 8 | (byte * 5 + 3) % 256 << 16 | (255 - byte) << 24 for byte in range(256)]


def nibbles(word: int) -> Tensor:
    """In the order in which they are decoded."""
    return torch.tensor([word >> 4 * place & 15 for place in (0, 4, 1, 5, 2, 6, 3, 7)])


def test_e4m3() -> None:
    for word in words():
        placed = torch.tensor([word >> 8 * place & 0xFF for place in (0, 2, 1, 3)], dtype=torch.uint8)
        expected = placed.view(torch.float8_e4m3fn).double()
        found = halves(*run(tiles._E4M3_ASM.value, 4, word))
        assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()])


def test_scale() -> None:
    """Every e4m3 scale there is, subnormal ones too, times 2^118 and twice."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    for code, value in zip(codes.tolist(), codes.view(torch.float8_e4m3fn).double(), strict=True):
        (found,) = run(tiles._SCALE_ASM.value, 1, code)
        assert found == bits(value * 2.0**118) * 0x10001


@pytest.mark.parametrize("scale", [2.0**-9, 1.75, 448.0])
def test_nvfp4(scale: float) -> None:
    lifted = bits(torch.tensor([scale * 2.0**118], dtype=torch.float64)) * 0x10001
    table = torch.tensor(E2M1, dtype=torch.float64)
    for word in words():
        found = halves(*run(tiles._NVFP4_ASM.value, 8, word, lifted))
        assert torch.equal(found, table[nibbles(word)] * scale / 256)


@pytest.mark.parametrize("scale", [0.0123, 1.5])
def test_int4(scale: float) -> None:
    rounded = torch.tensor([scale], dtype=torch.bfloat16)
    for word in words():
        found = halves(*run(tiles._INT4_ASM.value, 8, word, bits(rounded) * 0x10001))
        expected = (nibbles(word).double() - 8) * rounded.double()
        assert torch.equal(found, expected.to(torch.bfloat16).double())
