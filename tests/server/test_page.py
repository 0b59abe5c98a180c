"""The page as files: built from the sources that are there, small, served to browsers and to nobody else."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.access import Keys
from server.app import AppSettings
from server.page import DIST
from tests.fakes import script

WEB = DIST.parent
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def sources() -> str:
    """The same that server/web/vite.config.js writes down."""
    single = [WEB / name for name in ("index.html", "package-lock.json", "package.json", "vite.config.js")]
    digest = hashlib.sha256()
    for path in sorted([*single, *(WEB / "src").iterdir()], key=lambda path: path.relative_to(WEB).as_posix()):
        digest.update(path.relative_to(WEB).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def test_what_is_built_is_what_the_sources_say() -> None:
    assert (DIST / "sources.sha256").read_text().strip() == sources(), "run `make web` and commit server/web/dist"


def test_it_is_small() -> None:
    served = [DIST / "index.html", *(DIST / "assets").iterdir()]
    assert sum(len(gzip.compress(path.read_bytes())) for path in served) < 250_000


def test_it_names_its_own_files_only() -> None:
    page = (DIST / "index.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for name in ("/assets/index.js", "/assets/index.css", "/assets/icon.svg"):
        assert name in page
        assert (DIST / name.removeprefix("/")).is_file()


@pytest.mark.parametrize("path", ["/", "/stats"])
def test_browsers_get_the_page_and_programs_get_json(serve: Callable[..., Any], path: str) -> None:
    client = serve(script("Hi"))
    page = client.request("GET", path, headers=BROWSER)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["vary"] == "Accept"
    assert client.request("GET", path).headers["content-type"] == "application/json"


def test_the_policy_allows_nothing_from_elsewhere(serve: Callable[..., Any]) -> None:
    client = serve(script("Hi"))
    for path in ("/", "/assets/index.js", "/assets/index.css"):
        answer = client.request("GET", path, headers=BROWSER)
        rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
        assert {rules[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
        assert rules["img-src"] == "'self' data:"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"


def test_an_unchanged_file_is_not_sent_twice(serve: Callable[..., Any]) -> None:
    client = serve(script("Hi"))
    first = client.request("GET", "/assets/index.js")
    again = client.request("GET", "/assets/index.js", headers={"if-none-match": first.headers["etag"]})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")


def test_the_page_needs_no_key_and_what_it_asks_for_does(serve: Callable[..., Any]) -> None:
    client = serve(script("Hi"), settings=AppSettings(keys=Keys(["secret"])))
    assert client.request("GET", "/", headers=BROWSER).status_code == 200
    assert client.request("GET", "/stats", headers=BROWSER).status_code == 200
    assert client.request("GET", "/stats").status_code == 401


@pytest.mark.parametrize("path", ["/assets/none.js", "/assets/../../app.py", "/assets/%2e%2e/index.html", "/assets/"])
def test_there_is_no_other_file(serve: Callable[..., Any], path: str) -> None:
    answer = serve(script("Hi")).request("GET", path)
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}


def test_all_of_it_is_packaged() -> None:
    import tomllib

    settings = tomllib.loads((WEB.parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["server"]
    packaged = {path for pattern in patterns for path in (WEB.parent).glob(pattern) if path.is_file()}
    assert packaged == {path for path in DIST.rglob("*") if path.is_file()}
    assert Path(DIST / "licenses.md") in packaged
