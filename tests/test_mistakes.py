"""What a user may do wrong on the command line: a message on stderr and exit status 2.

Most of a process's time goes into imports. So one process imports everything once and then makes a child for each case:
nothing is left of one case in the next. Whole processes that fail are in test_cli.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.test_cli import ROOT, clean_environment

CASES = [
    (["srve"], "Did you mean 'serve'?"),
    (["serve", "--prot", "1"], "--port"),
    (["chat", "--modle", "x"], "--model"),
    (["serve", "--port", "many"], "--port"),
    (["serve", "--port", "99999"], "easel: --port: "),
    (["serve", "--device", "gpu"], "easel: --device: "),
    (["serve", "--config", "none.toml"], "easel: cannot read the config file none.toml"),
    (["serve", "--model", "/nowhere/at all", "--port", "0"], "/nowhere/at all"),
    (["bench", "--model", "/nowhere/at all"], "/nowhere/at all"),
    (["chat", "--url", "http://127.0.0.1:1"], "easel: no server answers at http://127.0.0.1:1"),
    (["serve", "--quantize", "int8"], "easel: --quantize: "),
    (["bench", "--quantize-dense", "fp8"], "easel: quantize_dense needs quantize"),
    (["bench", "--steps", "4"], "easel: --steps belongs to --shape, which measures a model of random weights"),
    (["bench", "--shape", "huge"], "easel: unknown shape 'huge'; choose 26b-a4b or tiny"),
    (["bench", "--shape", "tiny", "--format", "fp3"], "easel: unknown format 'fp3'; choose bf16, fp8, nvfp4"),
    (["bench", "--shape", "tiny", "--prompt", "Hello"], "--prompt is a number of tokens, not 'Hello'"),
    (["bench", "--shape", "tiny", "--requests", "2"], "easel: --requests has no meaning with --shape"),
    (["bench", "--shape", "tiny", "--model", "x"], "easel: --model has no meaning with --shape"),
    (["bench", "--parallel", "2"], "easel: --parallel belongs to --turns"),
    (["bench", "--turns", "2", "--requests", "3"], "easel: --requests has no meaning with --turns"),
    (["bench", "--shape", "tiny", "--turns", "2"], "easel: --turns has no meaning with --shape"),
    (["bench", "--shape", "tiny", "--weights", "real"], "easel: --weights must be random, not 'real'"),
    (["quantize", "/nowhere/at all", "out"], "--format"),
    (["quantize", "/nowhere/at all", "out", "--format", "fp4"], "easel: unknown format 'fp4'"),
    (["quantize", "/nowhere/at all", "out", "--format", "fp8"], "easel: there is no folder /nowhere/at all"),
    (["quantize", "in", str(ROOT), "--format", "fp8"], f"easel: {ROOT} exists already"),
    (["chat", "--url", "nonsense"], "easel: no server answers at nonsense"),
]
# Reads lists of arguments, writes the children's exit statuses; what child n says on stderr goes to the file n.
CHILDREN = """
import json, os, sys
import engine.engine, engine.export
from server import cli, launch, shape_bench, terminal_chat, turns_bench
statuses = []
for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if not child:
        os.dup2(os.open(str(number), os.O_WRONLY | os.O_CREAT), 2)
        try:
            cli.main(arguments)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)  # without tearing down what was imported, which takes a second
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """Of each case: exit status, and stderr."""
    folder = tmp_path_factory.mktemp("stderr")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILDREN],
        input=json.dumps([arguments for arguments, _ in CASES]),
        env=clean_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    statuses = json.loads(done.stdout.splitlines()[-1])
    return [(status, (folder / str(number)).read_text()) for number, status in enumerate(statuses)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(arguments) for arguments, _ in CASES])
def test_a_mistake_is_a_message_and_status_2(number: int, endings: list[tuple[int, str]]) -> None:
    message = CASES[number][1]
    status, stderr = endings[number]
    assert status == 2
    assert message in stderr
    assert "Traceback" not in stderr
    if "easel: " in message:
        assert stderr.splitlines()[-1].startswith(message)
