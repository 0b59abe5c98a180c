"""What neither ruff nor mypy nor import-linter can say about this house."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE = 420
LONGEST_FUNCTION = 70  # docstring not counted
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".sh", ".jinja", ""}
# The checkpoint is data: its words are not ours.
DATA = ("engine/demo/checkpoint/",)


def _tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file() and not name.startswith(DATA)]


NAMES = _tracked()
CODE = [name for name in NAMES if name.endswith(".py") and name.startswith(("server/", "engine/"))]
PROSE = [name for name in NAMES if Path(name).suffix in TEXT]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", name)}


@cache
def _parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def test_the_house_was_found() -> None:
    assert "server/cli.py" in CODE
    assert "engine/interface.py" in CODE
    assert "Makefile" in PROSE


@pytest.mark.parametrize("name", CODE)
def test_module_opens_with_a_docstring(name: str) -> None:
    assert ast.get_docstring(_parse(name)), "say what the file does, what it does not know, and one invariant"


@pytest.mark.parametrize("name", CODE)
def test_sizes(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    too_long = {
        node.name: _body_lines(node) for node in _functions(_parse(name)) if _body_lines(node) > LONGEST_FUNCTION
    }
    assert not too_long


@pytest.mark.parametrize("name", CODE)
def test_names_are_field_terms(name: str) -> None:
    banned = {"block", "util", "utils", "helper", "helpers", "manager", "common", "misc"}
    defined = [node for node in ast.walk(_parse(name)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for word in [Path(name).stem, *(node.name for node in defined)]:
        assert not _words(word) & banned, word


@pytest.mark.parametrize("name", CODE)
def test_ids_and_text_are_kept_apart(name: str) -> None:
    if name.startswith("engine/") and not name.startswith("engine/demo/"):
        assert not re.search(
            r"Auto(Tokenizer|Processor)|apply_chat_template", (ROOT / name).read_text(encoding="utf-8")
        )


def test_nothing_is_left_for_later() -> None:
    marks = re.compile("|".join(rf"\b{left}{right}\b" for left, right in (("TO", "DO"), ("FIX", "ME"), ("XX", "X"))))
    found = [name for name in PROSE if marks.search((ROOT / name).read_text(encoding="utf-8"))]
    assert not found


def test_no_machine_and_no_registry_is_named() -> None:
    # Spelled in two parts, so that this file does not find itself.
    parts = [("/wo", "rk/"), ("/ro", "ot/"), ("/ho", "me/"), ("/Us", "ers/"), ("pypi", ".org"), ("python", "hosted")]
    parts += [("download.py", "torch.org"), ("npmjs", ".org"), ("--index", "-url"), ("--extra-", "index")]
    pattern = re.compile("|".join(re.escape(left + right) for left, right in parts))
    found = {name: match[0] for name in PROSE if (match := pattern.search((ROOT / name).read_text(encoding="utf-8")))}
    assert not found


def test_tests_are_no_package() -> None:
    assert not [name for name in NAMES if name.startswith("tests/") and name.endswith("__init__.py")]


def test_versions_are_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50
    assert not [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line)]


def test_ci_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
