"""engine.rng: published vectors, an independent scalar version, and the shape of the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rng import canvas_noise, philox

CPU = torch.device("cpu")

# Random123's kat_vectors file, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], seed: int) -> list[int]:
    """The definition of the Random123 paper in unbounded Python integers."""
    c = list(counter)
    k = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def run(counters: list[list[int]], seed: int) -> list[list[int]]:
    c0, c1, c2, c3 = (torch.tensor(column) for column in zip(*counters, strict=True))
    return torch.stack(philox((c0, c1, c2, c3), seed), dim=1).tolist()


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_published_vectors(counter: str, key: str, result: str) -> None:
    low, high = words(key)
    assert run([words(counter)], low | high << 32) == [words(result)]


word = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(word, min_size=4, max_size=4), min_size=1, max_size=8), st.integers(0, 2**64 - 1))
def test_equals_scalar_definition(counters: list[list[int]], seed: int) -> None:
    assert run(counters, seed) == [scalar_philox(counter, seed) for counter in counters]


def noise(seed: int = 7, canvas: int = 0, attempt: int = 0, passes: int = 48, length: int = 64, vocab: int = 2048):
    return canvas_noise(
        seed, canvas=canvas, attempt=attempt, passes=passes, canvas_length=length, vocab_size=vocab, device=CPU
    )


@pytest.mark.parametrize("vocab", [3, 2048, 262_144])
def test_words_become_ids_and_uniforms(vocab: int) -> None:
    made = noise(seed=2**64 - 5, canvas=3, attempt=1, vocab=vocab)
    for step, position in [(0, 0), (1, 63), (48, 17)]:
        word0, word1, _, _ = scalar_philox([position, step, 3, 1], 2**64 - 5)
        assert made.ids[step, position].item() == word0 * vocab // 2**32
        assert made.uniforms[step, position].item() == (word1 // 256) / 2**24
    assert made.ids.shape == made.uniforms.shape == (49, 64)
    assert made.ids.dtype == torch.int64
    assert made.uniforms.dtype == torch.float32


def test_every_coordinate_matters() -> None:
    base = noise()
    for other in (noise(seed=8), noise(seed=7 + 2**32), noise(canvas=1), noise(attempt=1)):
        assert (base.ids == other.ids).float().mean() < 0.01
        assert (base.uniforms == other.uniforms).float().mean() < 0.01


def test_a_longer_schedule_or_canvas_keeps_the_shared_part() -> None:
    short, long = noise(passes=4, length=16), noise(passes=48, length=64)
    assert torch.equal(short.ids, long.ids[:5, :16])
    assert torch.equal(short.uniforms, long.uniforms[:5, :16])


def test_numbers_are_uniform() -> None:
    made = noise(passes=400, length=256, vocab=10)
    count = made.ids.numel()
    frequencies = torch.bincount(made.ids.flatten(), minlength=10) / count
    assert frequencies.sub(0.1).abs().max() < 0.005
    assert abs(made.uniforms.mean().item() - 0.5) < 0.005
    assert made.uniforms.min() >= 0
    assert made.uniforms.max() < 1
    joint = torch.stack((made.ids.flatten().double(), made.uniforms.flatten().double()))
    assert abs(torch.corrcoef(joint)[0, 1].item()) < 0.02, "the id and the draw at one place must be independent"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_equals_cpu() -> None:
    cuda = canvas_noise(
        99, canvas=5, attempt=1, passes=48, canvas_length=256, vocab_size=262_144, device=torch.device("cuda")
    )
    cpu = noise(seed=99, canvas=5, attempt=1, length=256, vocab=262_144)
    assert torch.equal(cuda.ids.cpu(), cpu.ids)
    assert torch.equal(cuda.uniforms.cpu(), cpu.uniforms)
