"""The self-conditioning embedding from few ids or from all, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.soft_embedding import (
    DROPPED,
    HIGH_CUT,
    LOW_CUT,
    add_everything,
    add_support,
    find_support,
    soft_embedding,
)
from tests.engine.conftest import GPU

V, M = 777, 300  # which no tile divides
ROUNDING = 2.0**-8
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def rows_of(*sorts: str, vocab: int = V, seed: int = 0) -> Tensor:
    """Probabilities bfloat16, one row a sort."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(sorts), vocab)
    for row, sort in zip(rows, sorts, strict=True):
        ids = torch.randperm(vocab, generator=generator)
        match sort:
            case "one":
                row[ids[0]] = 1.0
            case "edges":  # of a tile and of the vocabulary
                row[[0, 127, 128, vocab - 1]] = 0.25
            case "some":
                row[ids[:20]] = torch.rand(20, generator=generator) + 0.01
            case "tail":  # all of it below the higher cut, and together too much to leave out
                row[ids[0]] = 1 - 10 * HIGH_CUT
                row[ids[1:41]] = HIGH_CUT / 4
                row[ids[41:]] = LOW_CUT / vocab
            case "dust":  # as little as may be left out
                row[ids[0]] = 1 - DROPPED / 2
                row[ids[1:]] = DROPPED / 2 / (vocab - 1)
            case "flat":
                row[:] = 1.0
        row /= row.sum().clamp(min=1e-9)
    return rows.bfloat16()


def table(vocab: int = V, width: int = M) -> Tensor:
    return torch.randn(vocab, width, generator=torch.Generator().manual_seed(9)).bfloat16()


def assert_near(result: Tensor, probabilities: Tensor, embedding: Tensor, scale: float) -> None:
    """Each row within what may be left out and the roundings to bfloat16."""
    exact = probabilities.double() @ embedding.double() * scale
    error = (result.double() - exact).norm(dim=1)
    assert result.dtype == embedding.dtype
    assert (error <= ROUNDING / 2 * exact.norm(dim=1) + DROPPED * embedding.double().norm(dim=1).max() * scale).all()


SURE = ("one", "edges", "some", "tail", "dust", "nothing", "one")


def test_rows_that_are_sure_need_few_ids(device: torch.device) -> None:
    probabilities, embedding = rows_of(*SURE).to(device), table().to(device)
    support = find_support(probabilities)
    assert support.lengths.tolist() == [1, 4, 20, 41, 1, 0, 1]
    assert support.lengths.sum() <= support.budget
    for row, length in enumerate(support.lengths.tolist()):
        ids = support.ids[row, :length].long()
        assert ids.tolist() == sorted(set(ids.tolist()))
        assert torch.equal(support.weights[row, :length], probabilities[row, ids].float())
        assert probabilities[row].float().sum() - support.weights[row, :length].sum() <= DROPPED
    out = torch.full((len(SURE), M), 7.0, device=device, dtype=torch.bfloat16)
    add_everything(probabilities, support, embedding, 3.0, out)
    assert (out == 7).all(), "the dense product has nothing to do"
    assert_near(soft_embedding(probabilities, embedding, 3.0), probabilities, embedding, 3.0)


@pytest.mark.parametrize("sorts", [("one", "flat", "some"), ("flat",) * 3])
def test_one_row_that_is_not_takes_all_ids_for_all(sorts: tuple[str, ...], device: torch.device) -> None:
    probabilities, embedding = rows_of(*sorts).to(device), table().to(device)
    support = find_support(probabilities)
    assert [length > support.budget for length in support.lengths.tolist()] == [sort == "flat" for sort in sorts]
    out = torch.full((len(sorts), M), 7.0, device=device, dtype=torch.bfloat16)
    add_support(support, embedding, 3.0, out)
    assert (out == 7).all(), "the lists are not used"
    assert_near(soft_embedding(probabilities, embedding, 3.0), probabilities, embedding, 3.0)


def test_lists_that_are_too_long_together_are_not_used(device: torch.device) -> None:
    probabilities, embedding = rows_of(*("some",) * 12).to(device), table().to(device)
    support = find_support(probabilities)
    assert support.lengths.max() == 20 and support.lengths.sum() > support.budget
    assert_near(soft_embedding(probabilities, embedding, 1.0), probabilities, embedding, 1.0)


def test_what_is_not_finite_stays_in_its_row(device: torch.device) -> None:
    probabilities, embedding = rows_of("one", "some", "one").to(device), table().to(device)
    probabilities[1, 5] = float("nan")
    result = soft_embedding(probabilities, embedding, 1.0)
    assert result.isfinite().all(dim=1).tolist() == [True, False, True]
    clean = torch.tensor([0, 2], device=device)
    assert_near(result[clean], probabilities[clean], embedding, 1.0)


def test_it_repeats_exactly(device: torch.device) -> None:
    for sorts in (SURE, ("flat", "one")):
        probabilities, embedding = rows_of(*sorts).to(device), table().to(device)
        first, second = (soft_embedding(probabilities, embedding, 2.0) for _ in range(2))
        assert torch.equal(first, second)


def test_dtypes_must_be_the_same(device: torch.device) -> None:
    with pytest.raises(ValueError, match="float32"):
        soft_embedding(torch.ones(1, 8, device=device), table(8, 8).to(device), 1.0)


@pytest.mark.parametrize("device", [GPU], indirect=True)
@pytest.mark.parametrize("flat", [0, 3])
def test_at_the_models_size(flat: int, device: torch.device) -> None:
    vocab, width = 262144, 2816
    sorts = (*SURE, *("some", "tail", "dust") * 83)[: 256 - flat] + ("flat",) * flat
    probabilities, embedding = rows_of(*sorts, vocab=vocab).to(device), table(vocab, width).to(device)
    support = find_support(probabilities)
    assert (support.lengths.sum() > support.budget) == (flat > 0)
    assert_near(soft_embedding(probabilities, embedding, 53.0), probabilities, embedding, 53.0)
