"""tests.bench.kernels, as far as it goes without a GPU: every op it would time runs, and it says what it lacks."""

from __future__ import annotations

import pytest
import torch

from tests.bench import kernels

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


@pytest.mark.parametrize("group", kernels.GROUPS)
def test_every_op_runs(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "ROWS": 2,
        "VOCAB": 256,
        "HIDDEN": 16,
        "PASSES": {"one": ((3, 70, True),), "two": ((3, 5, False), (2, 8, True))},
    }
    for name, size in small.items():
        monkeypatch.setattr(kernels, name, size)
    names = []
    for work in kernels.GROUPS[group](torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        work.run()
        assert work.bytes > 0
        names.append(work.name)
    assert len(set(names)) == len(names) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--only", "output"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
