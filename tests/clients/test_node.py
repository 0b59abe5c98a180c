"""The clients that run in Node: OpenAI's own and Vercel's AI SDK (`node/clients.test.js`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).with_name("node")
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(
    NODE is None or not (HERE / "node_modules").is_dir(), reason="needs node, and the packages of tests/clients/node"
)


def test_clients_of_node(server: str, address: str) -> None:
    assert NODE is not None
    ran = subprocess.run(
        [NODE, "--test", str(HERE / "clients.test.js")],
        env={**os.environ, "SERVER_URL": server},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert "# pass 11" in ran.stdout
