"""What a pass must do at the least, against counts made by hand from the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import published_config
from engine.formats import Layout, layout
from engine.measure.cards import CARDS
from engine.measure.report import computed_lines, computed_steps
from engine.measure.roofline import (
    Ceilings,
    Rows,
    Work,
    joined_rows,
    pass_work,
    step_rows,
    total,
    touched,
)
from engine.shapes import SHAPES, format_choice, tiny_config

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = published_config()
EMBEDDING = 262_144 * 2816


def stored(form: str = "bf16") -> Layout:
    return layout(PUBLISHED, choice=format_choice(form))


def step(form: str = "bf16", prefix: int = 0, *, slots: int = 1, conditioned: bool = True) -> Work:
    return total(pass_work(PUBLISHED, stored(form), step_rows(PUBLISHED, prefix, slots=slots), conditioned=conditioned))


def test_a_step_reads_every_weight_and_the_embedding_twice() -> None:
    weights = stored().weight_bytes(2)
    assert weights == pytest.approx(50.5e9, rel=1e-3)
    canvas = 256 * 2816 * 2 + 256 * 225_280  # embedding rows read, keys and values written
    assert step().bytes == pytest.approx(weights + 2 * EMBEDDING + canvas, rel=1e-5)


@pytest.mark.parametrize(("form", "gigabytes"), [("fp8", 27.6), ("nvfp4", 19.3), ("int4", 19.2), ("nvfp4+fp8", 17.6)])
def test_bytes_of_a_step_in_other_formats(form: str, gigabytes: float) -> None:
    assert step(form).bytes / 1e9 == pytest.approx(gigabytes, abs=0.1)


def test_operations_of_a_step() -> None:
    parts = pass_work(PUBLISHED, stored(), step_rows(PUBLISHED, 0))
    assert parts["experts"].flops == 2 * 256 * 8 * 30 * 3 * 704 * 2816
    assert parts["dense MLP"].flops == 2 * 256 * 30 * 3 * 2112 * 2816
    sliding, full = (4096 + 2 * 2048 + 4096) * 2816, (8192 + 1024 + 8192) * 2816
    assert parts["projections"].flops == 2 * 256 * (25 * sliding + 5 * full)
    assert parts["head"].flops == 2 * 256 * EMBEDDING
    assert parts["self-conditioning"].flops == 2 * 256 * (EMBEDDING + 3 * 2112 * 2816)
    assert parts["attention"].flops == 4 * 256 * 256 * 16 * (25 * 256 + 5 * 512)
    assert total(parts).flops - parts["attention"].flops == pytest.approx(2.3e12, rel=0.03)


def test_a_first_pass_has_no_self_conditioning() -> None:
    conditioning = step().bytes - step(conditioned=False).bytes
    assert conditioning == 2 * (EMBEDDING + 3 * 2112 * 2816)


def test_keys_and_values_grow_in_full_layers_only() -> None:
    assert step(prefix=512).bytes - step().bytes == 512 * 225_280
    assert step(prefix=32_768).bytes - step(prefix=2048).bytes == (32_768 - 2048) * 20_480
    assert step(prefix=2048).bytes - step().bytes == 1023 * 204_800 + 2048 * 20_480


def test_slots_share_weights_but_no_keys() -> None:
    one, four = step(prefix=512), step(prefix=512, slots=4)
    assert four.flops == pytest.approx(4 * one.flops)
    assert four.bytes - one.bytes == pytest.approx(3 * (768 * 225_280 + 256 * 2816 * 2), rel=1e-4)


def test_experts_touched() -> None:
    assert touched(PUBLISHED, 1) == pytest.approx(8)
    assert touched(PUBLISHED, 2) == pytest.approx(8 + 8 * 120 / 128)
    assert touched(PUBLISHED, 256) == pytest.approx(128, abs=1e-4)


def test_a_commit_computes_what_a_token_activates() -> None:
    parts = pass_work(PUBLISHED, stored(), [Rows(0, 8192, canvas=False)])
    work = total(parts)
    active = (1.11e9 + 0.535e9 + 22.84e9 / 16) * 29 / 30  # of the last layer only keys and values are needed
    assert (work.flops - parts["attention"].flops) / 8192 == pytest.approx(2 * active, rel=0.01)
    assert work.bytes - 8192 * 225_280 < stored().weight_bytes(2) - 2 * EMBEDDING


def test_a_joined_commit_reads_no_weight_again() -> None:
    joined = total(pass_work(PUBLISHED, stored(), joined_rows(PUBLISHED, 512, 256)))
    alone = step(prefix=768)
    assert 0 < joined.bytes - alone.bytes < 256 * 225_280
    assert joined.flops - alone.flops == pytest.approx(2 * 256 * (1.11e9 + 0.535e9 + 22.84e9 / 16), rel=0.1)


@pytest.mark.parametrize("rows", [Rows(0, 50, canvas=False), Rows(20, 40, canvas=False), Rows(300, 16, canvas=True)])
def test_positions_seen_are_those_of_the_masks(rows: Rows) -> None:
    config = tiny_config()
    pairs = {"sliding": 0, "full": 0}
    for position in range(rows.start, rows.start + rows.count):
        end = rows.start + rows.count if rows.canvas else position + 1
        pairs["full"] += end
        behind = rows.start if rows.canvas else position
        pairs["sliding"] += end - max(0, behind - (config.sliding_window - 1))
    layers = config.layers if rows.canvas else config.layers[:-1]
    expected = sum(4 * pairs[layer.kind] * config.num_heads * layer.head_dim for layer in layers)
    assert pass_work(config, layout(config), [rows])["attention"].flops == expected


def test_the_longer_of_two_times_is_the_limit() -> None:
    ceilings = Ceilings(bandwidth=1e12, matrix_rate=1e14)
    assert ceilings.seconds(Work(2e9, 1e11)) == pytest.approx(2e-3)
    assert ceilings.seconds(Work(1e9, 5e11)) == pytest.approx(5e-3)


def test_limits_of_cards_that_are_not_here() -> None:
    rows = computed_steps(SHAPES["26b-a4b"], ["bf16", "fp8", "nvfp4"], 512)
    found = {(row["card"], row["format"]): row for row in rows}
    assert len(found) == len(rows) == 3 * len(CARDS)
    assert found["DGX Spark", "bf16"]["milliseconds"] == pytest.approx(190, rel=0.02)
    assert found["DGX Spark", "fp8"]["milliseconds"] == pytest.approx(101, rel=0.02)
    assert found["RTX 4090", "nvfp4"]["milliseconds"] == pytest.approx(19, rel=0.02)
    assert found["RTX 4090", "nvfp4"]["bound"] == "memory"
    assert found["RTX 3090", "nvfp4"]["bound"] == "matrix"
    assert found["RTX 4090", "bf16"]["context"] == 0
    lines = computed_lines(rows)
    (spark,) = (line for line in lines if line.startswith("DGX Spark"))
    assert spark.split() == ["DGX", "Spark", "191.0", "101.6", "71.02"]
    (small,) = (line for line in lines if line.startswith("RTX 4090"))
    assert small.split() == ["RTX", "4090", "-", "-", "19.23"]


def test_the_readme_says_what_is_computed() -> None:
    formats = ("bf16", "fp8", "nvfp4", "nvfp4+fp8")
    rows = computed_steps(SHAPES["26b-a4b"], formats, 512)
    found = {(row["card"], row["format"]): row for row in rows}
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| card | " + " | ".join(formats) + " |") + 2
    told = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        card, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        told[card] = cells
    expected = {}
    for card in CARDS:
        of_card = [found[card.name, form] for form in formats]
        if any(row["context"] for row in of_card):
            expected[card.name] = [
                f"{row['milliseconds']:.1f}{'*' if row['bound'] == 'matrix' else ''}" if row["context"] else "-"
                for row in of_card
            ]
    assert told == expected
