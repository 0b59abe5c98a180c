"""Builds an image of the Dockerfile and holds a container of it to what the README promises: `make test-image`.

Needs no Docker engine: buildah with chroot isolation, on a base image that debootstrap makes of this machine's own
Debian mirror. pip's and apt's configuration of this machine go along, so what is reached here is reached in there. The
container runs as docker-compose.yml has it: its user, a read-only root, /cache and /tmp. Chroot isolation shares the
network of this machine and knows no published ports, capabilities or limits: those are not tried.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "image"
HOST = "/host"  # where files of this machine that pip's configuration names lie during the build
BASE = "localhost/easel-base"
PATIENCE = 180.0  # seconds until a container that does not get ready has failed


def main() -> None:
    """Build, then try; the exit status is 0 if all of it went well."""
    parser = argparse.ArgumentParser(description="Build an image and try it.")
    parser.add_argument("--target", default="cpu", choices=("cpu", "cuda"), help="cuda downloads some gigabytes")
    target = parser.parse_args().target
    if os.getuid() != 0:
        sys.exit("make test-image must be run as root: a chroot is made")
    if missing := [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]:
        sys.exit(f"make test-image needs {' and '.join(missing)} (Debian, Ubuntu: apt install {' '.join(missing)})")
    KEPT.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    make_base()
    say(started, f"base image {BASE}")
    image = build(target)
    say(started, f"{image} built: {size_of(image):.2f} GB in its file system")
    with Container(image) as container:
        for trial in (refuses_without_key, chats, names_and_keys, checks_itself):
            trial(container)
            say(started, (trial.__doc__ or "").splitlines()[0])
    print("test-image: passed", flush=True)


def say(started: float, what: str) -> None:
    """One line of the report."""
    print(f"{time.monotonic() - started:6.0f} s  {what}", flush=True)


# The image


def buildah(*arguments: str | Path) -> list[str]:
    """A buildah command with its storage beside the rest of what this makes."""
    storage = ["--storage-driver", "vfs", "--root", KEPT / "storage", "--runroot", KEPT / "run"]
    return ["buildah", *map(str, (*storage, *arguments))]


def run(command: Sequence[str], log: str | None = None) -> str:
    """What a command prints. With `log` it goes to that file instead, whose end is shown if the command fails."""
    if log is None:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        said = done.stdout
    else:
        with (KEPT / log).open("w", encoding="utf-8") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        said = (KEPT / log).read_text(encoding="utf-8")
    if done.returncode:
        print("\n".join(said.splitlines()[-20:]), file=sys.stderr)
        sys.exit(f"test-image: {command[0]} failed with {done.returncode}" + (f"; see {KEPT / log}" if log else ""))
    return said


def make_base() -> None:
    """A minimal Debian as an image, once: the release and the mirror that apt has here, and how apt is set up."""
    if subprocess.run(buildah("inspect", "--type", "image", BASE), capture_output=True).returncode == 0:
        return
    folder = KEPT / "base"
    shutil.rmtree(folder, ignore_errors=True)
    release = next(line for line in Path("/etc/os-release").read_text().splitlines() if "VERSION_CODENAME=" in line)
    suite = release.partition("=")[2].strip('"')
    filters = ("Created-By: Packages", f"Codename: {suite}", "Origin: Debian", "Component: main")
    mirrors = run(["apt-get", "indextargets", "--format", "$(SITE)", *filters]).split()
    if not mirrors:
        sys.exit("test-image: apt knows no Debian mirror here; run apt-get update")
    run(["debootstrap", "--variant=minbase", suite, str(folder), mirrors[0]], "debootstrap.log")
    told = [line for line in run(["apt-config", "dump"]).splitlines() if line.startswith("Acquire::")]
    (folder / "etc/apt/apt.conf.d/90host").write_text("\n".join(told) + "\n", encoding="utf-8")
    container = run(buildah("from", "scratch")).strip()
    run(buildah("add", container, folder, "/"))
    run(buildah("commit", "--rm", container, BASE), "base.log")
    shutil.rmtree(folder)


def build(target: str) -> str:
    """The image of a target of the Dockerfile."""
    image = f"localhost/easel:{target}"
    options = ["--isolation", "chroot", "--format", "docker", "--pull-never", "--target", target]
    options += ["--build-arg", f"BASE_IMAGE={BASE}", "--tag", image, *pip_options()]
    run(buildah("build", *options, ROOT), "build.log")
    return image


def pip_options() -> list[str]:
    """Options that take pip's configuration along, and the files and folders it names."""
    options: list[str] = []
    told: dict[str, str] = {}
    for line in run([sys.executable, "-m", "pip", "config", "list"]).splitlines():
        name, _, value = line.partition("=")
        words = []
        for word in value.strip("'\"").replace("\\n", " ").split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # A folder of links points at files beside it.
                shown = path.parent if word.startswith("file://") else path
                options += ["--volume", f"{shown}:{HOST}{shown}:ro"]
                word = word.replace(str(path), f"{HOST}{path}")
            words.append(word)
        # The environment's come first, and count before a file's.
        told.setdefault(name.rpartition(".")[2], " ".join(words))
    lines = ["[global]", *(f"{name} = {value}" for name, value in told.items())]
    (KEPT / "pip.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [*options, "--secret", f"id=pip.conf,src={KEPT / 'pip.conf'}"]


def size_of(image: str) -> float:
    """Gigabytes of files in an image."""
    with Container(image) as container:
        return int(run(["du", "--summarize", "--block-size=1", container.root]).split()[0]) / 1e9


# A container


class Container:
    """A container of an image, its root mounted read-only."""

    def __init__(self, image: str) -> None:
        described = json.loads(run(buildah("inspect", "--type", "image", image)))["Docker"]["config"]
        self.entrypoint: list[str] = described["Entrypoint"]
        self.health: list[str] = described["Healthcheck"]["Test"][1:]
        self.command: list[str] = described["Cmd"]
        self.name = run(buildah("from", "--pull-never", image)).strip()
        self.root = run(buildah("mount", self.name)).strip()
        (Path(self.root) / "run/.containerenv").touch()  # buildah wants to make it, which it then cannot
        run(["mount", "--bind", self.root, self.root])
        run(["mount", "--options", "remount,ro,bind", self.root])

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        run(["umount", self.root])
        run(buildah("rm", self.name))

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """A process in the container, with what it says in one pipe."""
        options = ["--isolation", "chroot", "--mount", "type=tmpfs,destination=/tmp"]
        for name, value in environment.items():
            options += ["--env", f"{name}={value}"]
        ran = buildah("run", *options, self.name, "--", *command)
        return subprocess.Popen(
            ran, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ended(self, command: Sequence[str], **environment: str) -> tuple[int, str]:
        """The exit status of a command and what it said."""
        process = self.start(command, **environment)
        said, _ = process.communicate(timeout=PATIENCE)
        # buildah of 2022 reports a status other than 0 and then stumbles over the read-only root as it cleans up: what
        # it said before that is what counts.
        said, stumbled, _ = said.partition("panic: ")
        reported = [line for line in said.splitlines() if "exited with status" in line]
        if reported:
            return int(reported[0].split()[-1]), said
        return 0 if stumbled else process.returncode, said

    @contextmanager
    def serving(self, **environment: str) -> Iterator[str]:
        """The address of a server, ready; on the way out it is told to stop, and has to."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        environment |= {"EASEL_PORT": str(port), "EASEL_PUBLISHED": address}
        process = self.start([*self.entrypoint, *self.command], **environment)
        try:
            until = time.monotonic() + PATIENCE
            while self.ended(self.health, EASEL_PORT=str(port))[0] != 0:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < until, "not ready in time"
                time.sleep(1)
            yield address
        finally:
            stop(process)
        said, _ = process.communicate(timeout=PATIENCE)
        assert "is ready; the model took" in said, said
        assert "Traceback" not in said, said


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the easel below a buildah, as Docker sends it to a container's first process."""
    below, found = [process.pid], []
    while below:
        pid = below.pop()
        # of any of its threads: buildah starts processes from several
        children = [
            child for each in Path(f"/proc/{pid}/task").glob("*/children") for child in each.read_text().split()
        ]
        below += [int(child) for child in children]
        if b"\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes() and not children:
            found.append(pid)
    assert found, "no server runs in the container"
    for pid in found:
        os.kill(pid, signal.SIGTERM)


def ask(address: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# What is tried

QUESTION = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
CHAT = "/v1/chat/completions"


def refuses_without_key(container: Container) -> None:
    """Published to other machines, or not said where, it wants an API key and ends with status 2."""
    for published in ({}, {"EASEL_PUBLISHED": "http://0.0.0.0:8000"}):
        status, said = container.ended([*container.entrypoint, "serve"], **published)
        assert status == 2 and "an API key is wanted: set EASEL_API_KEY" in said, said


def chats(container: Container) -> None:
    """As docker compose starts it, it gets ready, passes its healthcheck, answers a chat and stops when told to."""
    with container.serving() as address:
        status, answer = ask(address, CHAT, QUESTION)
        assert status == 200, answer
        print(f"          {answer['choices'][0]['message']['content']}")
        assert "42" in answer["choices"][0]["message"]["content"], answer
        user = container.ended(
            ["sh", "-c", "id --user; touch /x; touch /opt/easel/x; touch /cache/models/x /tmp/x && echo kept"]
        )
        assert user[1].split()[0] == "10001", user
        assert user[1].count("Read-only file system") == 2 and "kept" in user[1], user


def names_and_keys(container: Container) -> None:
    """Keyless it refuses names that were pointed at it; with a key in the environment it wants that key."""
    with container.serving() as address:
        assert ask(address, CHAT, QUESTION, Host="evil.example")[0] == 403
    with container.serving(EASEL_API_KEY="a-key") as address:
        assert ask(address, CHAT, QUESTION)[0] == 401
        assert ask(address, CHAT, QUESTION, Authorization="Bearer a-key")[0] == 200


def checks_itself(container: Container) -> None:
    """easel check finds no problem in it, and room in its volume."""
    status, said = container.ended([*container.entrypoint, "check", "--port", "0"])
    assert status == 0 and "GB free in /cache/models" in said and "No problems." in said, said


if __name__ == "__main__":
    main()
