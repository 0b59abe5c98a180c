"""Load generators, a few requests each: guidellm and aiperf count every request as served, with a first token.

Both ask for replies of a given length by `ignore_eos`, which a canvas has no way to honour: guidellm has to be told not
to, aiperf asks only if told to.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

CHECKPOINT = Path(__file__).resolve().parents[2] / "engine" / "demo" / "checkpoint"  # for its tokenizer
BIN = Path(sys.executable).parent


def run(server: str, folder: Path, name: str, *arguments: str) -> None:
    """Run a program of this environment against the server."""
    if not (BIN / name).exists():
        pytest.skip(f"{name} is not installed here: make test-load")
    urllib.request.urlopen(urllib.request.Request(f"{server}/record/{name}", method="POST")).close()
    ran = subprocess.run([BIN / name, *arguments], cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]


@pytest.mark.timeout(600)
def test_guidellm(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backend = {"kind": "openai_http", "target": server, "api_key": "key", "model": "easel-demo"}
    backend |= {"extras": {"body": {"ignore_eos": False}}}
    run(
        server,
        tmp_path,
        "guidellm",
        *("run", "--backend", json.dumps(backend), "--profile", "kind=synchronous"),
        *("--tokenizer", f"kind=huggingface_auto,model={CHECKPOINT}"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--constraint", "kind=max_requests,count=4"),
    )
    (found,) = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    metrics = found["metrics"]
    assert metrics["request_totals"] == {"successful": 4, "errored": 0, "incomplete": 0, "total": 4}
    assert metrics["output_token_count"]["successful"]["mean"] == 13  # "It is sunny." and its end, as usage has it
    assert metrics["time_to_first_token_ms"]["successful"]["mean"] > 0


@pytest.mark.timeout(600)
def test_aiperf(server: str, tmp_path: Path) -> None:
    run(
        server,
        tmp_path,
        "aiperf",
        *("profile", "--model", "easel-demo", "--url", server, "--endpoint-type", "chat", "--streaming"),
        *("--api-key", "key", "--tokenizer", str(CHECKPOINT), "--ui", "none"),
        *("--request-count", "6", "--concurrency", "2"),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16"),
    )
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["request_count"]["avg"] == 6
    assert found["error_summary"] == []
    assert found["time_to_first_token"]["avg"] > 0
