"""A Ray of our own with easel on it, from the file in configs/: for the tests and the bench of the cluster.

Replicas of Ray Serve listen on every address there is, whatever Ray is told: so it is started only where there is none
but loopback, in the network of its own that `make test-cluster` gives it. Invariant: what was started is ended.
"""

from __future__ import annotations

import copy
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "ray-serve.yaml"
KEY = "a-key-for-the-tests"
_TOKEN = secrets.token_hex(32)  # Ray's own
_BIN = Path(sys.executable).parent
_START_SECONDS = 240.0  # it has a dozen processes, and other work may stand in the way


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
    return found


class Cluster:
    """easel behind one address, on replicas of the demo model."""

    def __init__(self, folder: Path, environment: Mapping[str, str], dashboard: str) -> None:
        self._folder, self._environment, self._dashboard = folder, environment, dashboard
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"

    def deploy(self, replicas: int, most: int | None = None) -> None:
        """Serve from so many replicas, or up to `most`; returns when as many as must be are ready."""
        config = copy.deepcopy(yaml.safe_load(CONFIG.read_text(encoding="utf-8")))
        config["http_options"]["port"] = self._port
        (application,) = config["applications"]
        for deployment in application["deployments"]:
            if deployment["name"] == "Replica":
                deployment["autoscaling_config"] |= {"min_replicas": replicas, "max_replicas": most or replicas}
        file = self._folder / "ray-serve.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        wait_until(lambda: self._deploy(file), _START_SECONDS)
        wait_until(lambda: len(self.ready_replicas()) == replicas, _START_SECONDS)

    def ready_replicas(self) -> dict[str, int]:
        """The replicas that serve, by id, and their processes."""
        answer = _ask(f"{self._dashboard}/api/serve/applications/")
        application = answer.json()["applications"].get("easel", {}) if answer is not None else {}
        replicas = application.get("deployments", {}).get("Replica", {}).get("replicas", [])
        return {each["replica_id"]: each["pid"] for each in replicas if each["state"] == "RUNNING"}

    def _deploy(self, file: Path) -> bool:
        """Whether Ray takes it; shortly after its start, it does not."""
        command = [str(_BIN / "serve"), "deploy", str(file), "--address", self._dashboard]
        ended = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if ended.returncode:
            print(ended.stderr[-2000:])
        return not ended.returncode


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Ray with two processors, and nothing deployed on it yet."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        raise RuntimeError("Ray would listen on the network here; `make test-cluster` keeps it off")
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short path: there will be Unix sockets below it
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("EASEL_", "RAY_"))} | {
        "EASEL_API_KEY": KEY,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _TOKEN,
        # Replicas have these two processors; Ray's own rounds and figures, of which nobody reads any, get less of them.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
        "RAY_enable_metrics_collection": "0",
        "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
    }
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "ray-client-server-port": free_port()}
    ports["dashboard-agent-listen-port"] = free_port()
    command = [str(_BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
    command += [f"--temp-dir={folder}", *(f"--{name}={port}" for name, port in ports.items())]
    with (folder / "start.log").open("w") as log:
        ray = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        cluster = Cluster(folder, environment, f"http://127.0.0.1:{dashboard}")
        wait_until(lambda: _runs(ray, folder / "start.log"), _START_SECONDS)
        yield cluster
    finally:
        ray.send_signal(signal.SIGTERM)  # it ends what it started
        ray.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _runs(ray: subprocess.Popen[bytes], log: Path) -> bool:
    said = log.read_text()
    assert ray.poll() is None, f"Ray did not start:\n{said}"
    return "Ray runtime started" in said


def _ask(url: str) -> httpx.Response | None:
    """Ray's answer, once there is one."""
    try:
        return httpx.get(url, headers={"Authorization": f"Bearer {_TOKEN}"}, timeout=10).raise_for_status()
    except httpx.HTTPError:
        return None
