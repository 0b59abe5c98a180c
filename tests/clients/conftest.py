"""One scripted server for all clients, in a process of its own: clients and server need not share an environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SERVE = Path(__file__).with_name("serve.py")
KEY = "key"
MODEL = "easel-demo"

# Offline, and no client phones home.
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGSMITH_TRACING": "false",
    "OPENAI_API_KEY": KEY,
}


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of the server, without a path."""
    # The interpreter that has the server's packages, where it is not this one.
    python = os.environ.get("SERVER_PYTHON", sys.executable)
    record = [os.environ["RECORD_REQUESTS"]] if "RECORD_REQUESTS" in os.environ else []
    with subprocess.Popen(
        [python, str(SERVE), *record], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        address = running.stdout.readline().strip()
        assert address.startswith("http://"), "the server did not start"
        yield address
        running.communicate()


@pytest.fixture(scope="module")
def address(server: str, request: pytest.FixtureRequest) -> str:
    """OpenAI's base URL."""
    name = request.module.__name__.rpartition("test_")[2]
    urllib.request.urlopen(urllib.request.Request(f"{server}/record/{name}", method="POST")).close()
    return f"{server}/v1"


@pytest.fixture
def engine(server: str) -> Callable[[], Any]:
    """What became of the requests so far."""

    def state() -> Any:
        with urllib.request.urlopen(f"{server}/engine") as answer:
            return json.load(answer)

    return state


@pytest.fixture
def stops_working(engine: Callable[[], Any]) -> Callable[[], None]:
    """stops_working() fails unless the engine soon has nothing left to do."""

    def wait() -> None:
        deadline = time.monotonic() + 5  # the slow reply would take thirty seconds
        while (state := engine())["begun"] != state["ended"]:
            assert time.monotonic() < deadline, "the engine still works for a client that left"
            time.sleep(0.05)
        assert state["cut"]

    return wait
