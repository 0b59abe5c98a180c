"""Dockerfile and docker-compose.yml: held against the schema of compose, and against what easel knows as settings.

`make test-image` builds the image and runs it; nothing here needs a container engine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.config import CONFIG_VARIABLE, SECTIONS, load_settings
from server.launch import checked_keys

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
SETTINGS = {f"EASEL_{name.upper()}" for section in SECTIONS.values() for name in section.model_fields}
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0}


def _interpolated(node: Any, environment: Mapping[str, str]) -> Any:
    """What compose makes of a value: ${NAME:-otherwise} and ${NAME:+instead}, after the YAML was read."""
    if isinstance(node, dict):
        return {name: _interpolated(value, environment) for name, value in node.items()}
    if isinstance(node, list):
        return [_interpolated(value, environment) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        given = environment.get(match["name"], "")
        return (given or match["word"]) if match["kind"] == "-" else (match["word"] if given else "")

    done = re.sub(r"\$\{(?P<name>\w+):(?P<kind>[-+])(?P<word>[^}]*)\}", value, node)
    assert "$" not in done
    return done


def _services(**environment: str) -> dict[str, Any]:
    services: dict[str, Any] = _interpolated(yaml.safe_load(COMPOSE), environment)["services"]
    return services


def _seconds(duration: str) -> float:
    return sum(float(count) * UNITS[unit] for count, unit in re.findall(r"([\d.]+)(ms|s|m)", duration))


def _image_environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", DOCKERFILE, re.M))))


def test_the_compose_file_keeps_to_its_schema() -> None:
    schema = json.loads(files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(yaml.safe_load(COMPOSE))] == []
    misspelt = yaml.safe_load(COMPOSE.replace("stop_grace_period", "stop_grace_time"))
    assert any("stop_grace_time" in error.message for error in validator.iter_errors(misspelt))


def test_every_setting_reaches_the_container_and_no_other() -> None:
    services = _services()
    passed = {name for name in services["easel"]["environment"] if name.startswith("EASEL_")}
    assert passed == SETTINGS | {CONFIG_VARIABLE}
    of_the_model = {f"EASEL_{name.upper()}" for name in SECTIONS["engine"].model_fields} | {CONFIG_VARIABLE}
    demo = {name for name in services["demo"]["environment"] if name.startswith("EASEL_")}
    assert demo == passed - of_the_model


def test_what_is_not_set_outside_is_not_set_inside() -> None:
    fixed = {"EASEL_HOST", "EASEL_PORT", "EASEL_PUBLISHED", "EASEL_DRAIN", "EASEL_CONFIG"}
    for service in _services().values():
        assert {name for name, value in service["environment"].items() if value not in (None, "")} <= fixed


@pytest.mark.parametrize("service", ["easel", "demo"])
def test_a_container_is_published_to_this_machine_unless_told(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(**environment: str) -> Any:
        told = _services(**environment)[service]["environment"]
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        for name in ("EASEL_HOST", "EASEL_PORT", "EASEL_PUBLISHED"):
            monkeypatch.setenv(name, str(told[name]))
        return load_settings({}).server

    assert _services()[service]["ports"] == ["127.0.0.1:8000:8000"]
    assert checked_keys(settings()) == ()
    (port,) = _services(EASEL_HOST="0.0.0.0", EASEL_PORT="8123")[service]["ports"]
    assert port == "0.0.0.0:8123:8000"
    with pytest.raises(Exception, match="an API key is wanted"):
        checked_keys(settings(EASEL_HOST="0.0.0.0", EASEL_PORT="8123"))


def test_image_and_compose_agree_on_host_and_port() -> None:
    image = _image_environment()
    assert {name for name in image if name.startswith("EASEL_")} == {"EASEL_HOST", "EASEL_PORT"} <= SETTINGS
    assert re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M) == [image["EASEL_PORT"]]
    for service in _services().values():
        inside = service["environment"]
        assert (inside["EASEL_HOST"], str(inside["EASEL_PORT"])) == (image["EASEL_HOST"], image["EASEL_PORT"])
        assert service["ports"][0].rsplit(":", 1)[1] == image["EASEL_PORT"]


@pytest.mark.parametrize("drain", ["", "0", "120", "12.5"])
def test_replies_may_end_before_the_container_is_killed(drain: str) -> None:
    for service in _services(EASEL_DRAIN=drain).values():
        given = float(service["environment"]["EASEL_DRAIN"])
        assert given == float(drain or 30)
        # uvicorn waits two seconds longer than replies get, and the engine's thread may be within a step.
        assert _seconds(service["stop_grace_period"]) == given + 15


def test_a_container_may_write_to_its_volume_and_tmp_alone() -> None:
    image = _image_environment()
    kept = [image[name] for name in ("HF_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")]
    assert all(folder.startswith("/cache/") for folder in kept)
    assert re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.M) == ["/cache"]
    for service in _services().values():
        assert service["read_only"] and service["tmpfs"] == ["/tmp"] and service["cap_drop"] == ["ALL"]
        assert service["volumes"][0] == "cache:/cache"
        assert all(volume["read_only"] for volume in service["volumes"][1:])
        assert service["restart"] == "unless-stopped"


def test_only_the_demo_needs_no_gpu() -> None:
    services = _services()
    (device,) = services["easel"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "deploy" not in services["demo"] and services["demo"]["profiles"] == ["demo"]
    assert (services["easel"]["build"]["target"], services["demo"]["build"]["target"]) == ("cuda", "cpu")
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.M)
    assert {"cuda", "cpu"} <= set(stages)
    for target in ("cpu", "cuda"):
        (stage,) = re.findall(rf"^FROM python AS {target}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
        assert stage.rstrip().endswith("USER easel"), "the last word on who runs it"


def test_files_of_settings_and_keys_are_mounted_where_they_are_looked_for() -> None:
    def mounted(**environment: str) -> tuple[dict[str, str], dict[str, Any]]:
        service = _services(**environment)["easel"]
        return {volume["target"]: volume["source"] for volume in service["volumes"][1:]}, service["environment"]

    sources, inside = mounted()
    assert (ROOT / sources[inside["EASEL_CONFIG"]]).is_file()
    assert inside["EASEL_API_KEY_FILE"] == ""
    sources, inside = mounted(EASEL_CONFIG="./mine.toml", EASEL_API_KEY_FILE="./keys")
    assert sources[inside["EASEL_CONFIG"]] == "./mine.toml"
    assert sources[inside["EASEL_API_KEY_FILE"]] == "./keys"


def test_what_is_copied_is_there_and_sent() -> None:
    copied = {name for line in re.findall(r"^COPY ([^-].*)$", DOCKERFILE, re.M) for name in line.split()[:-1]}
    assert {"engine", "server", "pyproject.toml", "constraints.txt", "README.md"} == copied
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in sent if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_build_arguments_are_declared() -> None:
    declared = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
    for service in _services().values():
        assert set(service["build"]["args"]) == declared
    assert f"ARG BASE_IMAGE={_services()['demo']['build']['args']['BASE_IMAGE']}\n" in DOCKERFILE


@contextmanager
def _answering(status: int) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield str(server.server_port), asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1)])
def test_the_healthcheck_asks_whether_it_is_ready(status: int, expected: int) -> None:
    (shown,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", DOCKERFILE, re.M)
    python, *arguments = json.loads(shown)
    assert python == "python"
    with _answering(status) as (port, asked):
        ended = subprocess.run([sys.executable, *arguments], env=os.environ | {"EASEL_PORT": port}, timeout=60)
    assert (ended.returncode, asked) == (expected, ["/ready"])
    unreached = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"EASEL_PORT": port}, timeout=60, capture_output=True
    )
    assert unreached.returncode == 1
