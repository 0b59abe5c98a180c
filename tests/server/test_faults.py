"""A small form of tests/bench/faults.py: the real engine, and nothing is lost when it or its clients fail."""

from __future__ import annotations

import asyncio

import pytest

from tests.bench import faults


@pytest.mark.slow
def test_faults_leave_nothing_behind_and_the_next_one_is_served() -> None:
    rows = asyncio.run(faults.run(["vanish", "contained", "full disk"], 60, seed=0))
    assert [row["fault"] for row in rows if not row["fine"]] == [], rows
    assert len(rows) == 4
