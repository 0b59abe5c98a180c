"""The PTX that decodes weights on a GPU, run by a small machine for the seven instructions it uses.

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
}


def run(text: str, outputs: int, *inputs: int) -> list[int]:
    registers = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    for statement in re.split(r"[;{}]", text):
        name, *rest = statement.strip().split(maxsplit=1) or [""]
        if not name or name == ".reg":
            continue
        target, *operands = (operand.strip() for operand in rest[0].split(","))
        values = [registers[operand] if operand in registers else int(operand, 0) for operand in operands]
        registers[target] = MACHINE[name](*values)
    return [registers[f"${place}"] for place in range(outputs)]


def unpacked(*words: int) -> Tensor:
    return torch.cat([bfloat16(word >> at & 0xFFFF) for word in words for at in (0, 16)])


def words() -> list[int]:
    """Every byte, at every place of a word."""
    return [byte | (byte * 7 + 1) % 256 << 8 | (byte * 5 + 3) % 256 << 16 | (255 - byte) << 24 for byte in range(256)]


def four(word: int) -> Tensor:
    return torch.tensor([word >> at & 0xFF for at in (0, 8, 16, 24)], dtype=torch.uint8)


def test_e4m3() -> None:
    for word in words():
        expected = four(word).view(torch.float8_e4m3fn).double()
        found = unpacked(*run(tiles._E4M3_ASM.value, 2, word))
        assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("scale", [2.0**-9, 1.75, 448.0])
def test_nvfp4(scale: float) -> None:
    lifted = torch.tensor([scale * 2.0**118, scale * 2.0**117], dtype=torch.float64)
    first, second = (bits(value) * 0x10001 for value in lifted)
    table = torch.tensor(E2M1, dtype=torch.float64)
    for word in words():
        found = unpacked(*run(tiles._NVFP4_ASM.value, 4, word, first, second))
        factor = torch.tensor([scale, scale, scale / 2, scale / 2]) / 256
        nibbles = torch.cat((four(word) & 15, four(word) >> 4)).long()
        assert torch.equal(found, table[nibbles] * factor.repeat(2))


def test_int4() -> None:
    scales = torch.tensor([0.0123, 1.5], dtype=torch.bfloat16)
    first, second = (bits(value) * 0x10001 for value in scales)
    factor = scales.double().repeat_interleave(2).repeat(2)
    for word in words():
        found = unpacked(*run(tiles._INT4_ASM.value, 4, word, first, second))
        nibbles = torch.cat((four(word) & 15, four(word) >> 4)).double()
        assert torch.equal(found, ((nibbles - 8) * factor).to(torch.bfloat16).double())
