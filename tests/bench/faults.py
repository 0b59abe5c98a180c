"""What a server holds before and after clients, an engine, a disk and a clock misbehaved, and whether it goes on.

    python tests/bench/faults.py [--clients 2000] [--only NAME ...] [--seed 0]

Starts the real server on the demo model (`faulty_server.py`) on a free loopback port, lets one fault after the other
loose on it and prints a line for each: what happened, and slots, pages, tasks, files, threads and memory before and
after. Behind each fault an ordinary question must be answered. What ends the process, as it should, is followed by a
new one on the same port. The last line is one JSON object; the exit status is 1 if anything leaked, hung or was not
answered. Ten minutes at most; speed is not what this measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import unkind_clients as clients

SERVER = Path(__file__).with_name("faulty_server.py")
HELD = ("slots", "pages", "tasks", "files", "threads", "memory")
EXACT = ("slots", "pages", "tasks", "files")  # of these there must be as many as before
STEP = "15"  # seconds a step may take; one that takes longer on a busy machine would end the server
GROWTH = 24e6  # bytes of memory that may be more than before: allocators keep some in pieces
MALFORMED: dict[str, bytes] = {
    "no HTTP": b"nonsense\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a bad header": b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
    "a head of 70 kB": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000,
    "both lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bad chunk": b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a negative length": b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "no JSON": clients.request(b"{]"),
    "no text": clients.request(b"{\xff\xfe}"),
    "deep JSON": clients.request(b"[" * 100_000),
    "a long number": clients.request(b'{"messages": [], "max_tokens": ' + b"9" * 100_000 + b"}"),
    "no object": clients.request(b'"text"'),
    "half a surrogate": clients.request(b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    "a body of 11 MB": clients.request(b" " * 11_000_000),
}


class Server:
    """The process, over several lives on one port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> float:
        """Seconds until it is ready."""
        began = time.monotonic()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EASEL_")}
        command = [sys.executable, str(SERVER), "--port", str(self.port), "--step-timeout", STEP]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        while time.monotonic() - began < 300 and self.process.poll() is None:
            try:
                if (await self.http.get("/ready")).status_code == 200:
                    return time.monotonic() - began
            except httpx.TransportError:
                await asyncio.sleep(0.05)
        raise SystemExit(f"the server did not start; its log:\n{self.log.read_text(errors='replace')[-3000:]}")

    async def status(self, seconds: float = 20.0) -> int | None:
        """The exit status; None if it does not end."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return self.process.poll()

    async def arm(self, stage: str, error: str) -> None:
        (await self.http.post(f"/faults/arm/{stage}/{error}")).raise_for_status()

    async def answers(self) -> bool:
        """Whether an ordinary question is answered; when it is told to come again, it does, a few times."""
        for _ in range(5):
            answer = await self.http.post(clients.CHAT, json=clients.SUM)
            if answer.status_code != 429:
                break
            await asyncio.sleep(float(answer.headers["retry-after"]))
        return answer.status_code == 200 and "42" in answer.json()["choices"][0]["message"]["content"]

    async def held(self, as_before: dict[str, Any] | None = None) -> dict[str, Any]:
        """What it holds once it has come to rest: as much as before, or whatever it is after ten seconds."""
        deadline = time.monotonic() + 10
        while True:
            answer = (await self.http.get("/faults/held")).raise_for_status()
            found: dict[str, Any] = answer.json()
            settled = found["idle"] and found["books"] == "agree"
            settled = settled and not (as_before and any(found[name] > as_before[name] for name in EXACT))
            if settled or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.1)


def words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


# Each of these does one thing to a server and says what came of it, and whether that is as it should be.
Said = tuple[str, bool]


async def vanish(server: Server, count: int, chance: Random) -> Said:
    """Clients that leave at random points, 64 at a time."""
    jobs = [clients.vanishing(server.port, Random(chance.random())) for _ in range(count)]
    return words(await clients.at_once(jobs, 64)), True


async def slow_writers(server: Server, count: int, chance: Random) -> Said:
    found = await clients.at_once([clients.slow_writer(server.port, pause) for pause in [0.005] * 20 + [0.2] * 20], 40)
    return words(found), found["hangs"] == 0 and found["408"] == 20 and found["200"] == 20


async def slow_readers(server: Server, count: int, chance: Random) -> Said:
    """Some read their answer in pieces of 4 kB, some, whose answer has 2 MB, never."""
    dropped = (await server.http.get("/stats")).json()["cancellations"]
    jobs = [clients.slow_reader(server.port, pause=pause) for pause in (0.002, 0.002, None, None, None, None)]
    found = await clients.at_once(jobs, 6)
    dropped = (await server.http.get("/stats")).json()["cancellations"] - dropped
    said = f"{words(found)}; {dropped} of the latter's {4 * 8} choices were cancelled"
    return said, found["hangs"] == 0 and found["cut"] == 0 and dropped > 0


async def half_open(server: Server, count: int, chance: Random) -> Said:
    began = time.monotonic()
    whole = clients.request(clients.SUM)
    parts = [b"", b"GET /hea", whole[:60], whole[:-5]]
    found = await clients.at_once([clients.half_open(server.port, part) for part in parts * 50], 200)
    seconds = time.monotonic() - began
    return f"{words(found)}, all within {seconds:.1f} s", found["hangs"] == 0


async def pipelined(server: Server, count: int, chance: Random) -> Said:
    found = await clients.at_once([clients.pipelining(server.port) for _ in range(30)], 30)
    return words(found), found == {"in order": 30}


async def malformed(server: Server, count: int, chance: Random) -> Said:
    """Every kind once, then whole requests with a few bytes changed."""
    kinds = await clients.at_once([clients.half_open(server.port, sent) for sent in MALFORMED.values()], 4)
    changed = await clients.at_once([clients.half_open(server.port, clients.mutated(chance)) for _ in range(500)], 32)
    fine = not any(what in ("hangs", "closed") or what.startswith(("2", "5")) for what in kinds)
    fine = fine and not any(what == "hangs" or what.startswith("5") for what in changed)
    return f"{len(MALFORMED)} kinds: {words(kinds)}; 500 changed: {words(changed)}", fine


async def crowd(server: Server, count: int, chance: Random) -> Said:
    """200 clients at once; who is told to come again does."""
    refusals = 0

    async def one() -> str:
        nonlocal refusals
        for _ in range(300):
            found, _ = await clients.streaming(server.port, **clients.SUM)
            if found != "429":
                return found
            refusals += 1
            await asyncio.sleep(1)
        return "never served"

    began = time.monotonic()
    found = await clients.at_once([one() for _ in range(200)], 200)
    return f"{words(found)}, {refusals} refusals, {time.monotonic() - began:.0f} s", found == {"whole": 200}


def reaching(stage: str, error: str) -> dict[str, Any]:
    """What a request must ask for to come to a stage that others do not come to."""
    if stage == "prefill":  # a prompt that is not in the cache
        return {"messages": [{"role": "user", "content": f"Write a story about {error} and {time.monotonic()}."}]}
    return {"logprobs": True} if stage == "logprobs" else {}


async def contained(server: Server, count: int, chance: Random) -> Said:
    """One request runs out of memory, or into a bug, at each stage; its neighbour's reply is as without."""
    said, fine = [], True
    for stage in ("prefill", "denoise", "commit", "allocation", "logprobs"):
        for error in ("memory", "bug"):
            await server.held()  # the end of the reply before is committed, and does not run into it
            await server.arm(stage, error)
            found, _ = await clients.streaming(server.port, seed=1, **reaching(stage, error))
            hit = (await server.http.get("/faults/hit")).json()["hit"]
            fine = fine and bool(hit) and found == "error event" and await server.answers()
            said.append(f"{stage} {error}: {found if hit else 'not reached'}")
    kinds = words(Counter(each.partition(": ")[2] for each in said))
    return f"{len(said)} faults: {kinds if fine else ', '.join(said)}", fine


async def neighbours(server: Server, count: int, chance: Random) -> Said:
    """Three replies beside one whose pass fails: a pass of several says not whose fault it is, so each goes again."""
    alone = await server.http.post(clients.CHAT, json={**clients.STORY, "seed": 5})
    asking = [server.http.post(clients.CHAT, json={**clients.STORY, "seed": seed}) for seed in (5, 6, 7, 8)]
    running = [asyncio.ensure_future(each) for each in asking]
    await asyncio.sleep(0.2)
    await server.arm("denoise", "memory")
    found = await asyncio.gather(*running)
    same = found[0].json()["choices"][0]["message"] == alone.json()["choices"][0]["message"]
    ended = words(Counter(str(answer.status_code) for answer in found))
    return f"{ended}; the reply with the same seed is {'the same' if same else 'another'}", same


async def full_disk(server: Server, count: int, chance: Random) -> Said:
    """The log cannot grow: RLIMIT_FSIZE at its present size."""
    size = (await server.http.post("/faults/disk/true")).json()["size"]
    found = await clients.at_once([clients.streaming(server.port, **clients.SUM) for _ in range(50)], 20)
    whole = sum(number for what, number in found.items() if "whole" in what)
    lost = server.log.stat().st_size == size
    await server.http.post("/faults/disk/false")
    return f"{whole} of 50 whole, {'no' if lost else 'some'} line was written", whole == 50 and lost


async def clock(server: Server, count: int, chance: Random) -> Said:
    """The clock goes a day ahead, then ten years back, while replies run."""
    said: Counter[str] = Counter()
    for seconds in (86_400, -315_360_000, 0):
        running = [asyncio.ensure_future(clients.streaming(server.port, seed=seed)) for seed in range(4)]
        await asyncio.sleep(0.2)
        await server.http.post(f"/faults/clock/{seconds}")
        said.update([(await each)[0] for each in running])
    stats = (await server.http.get("/stats")).json()
    waited = max(stats["queue_wait_seconds"], stats["time_to_first_text_seconds"])
    return f"{words(said)}, mean wait and first text at most {waited:.2f} s", said == {"whole": 12} and waited < 600


async def lethal(server: Server, stage: str, error: str) -> Said:
    """A fault that the process does not survive, with five replies running and one waiting."""
    began = asyncio.Event()
    running = [asyncio.ensure_future(clients.streaming(server.port, began=began, seed=seed)) for seed in range(6)]
    await began.wait()
    at = time.monotonic()
    if error == "kill -9":
        assert server.process is not None
        server.process.send_signal(signal.SIGKILL)
    else:
        await server.arm(stage, error)
        if fields := reaching(stage, error):
            running.append(asyncio.ensure_future(clients.streaming(server.port, **fields)))
    found = [await each for each in running]
    status = await server.status(40)
    ended = time.monotonic() - at
    said = Counter(what for what, _ in found)
    again = await server.start()
    fine = said["hangs"] == 0 and status == (-9 if error == "kill -9" else 1)
    fine = fine and (error == "kill -9" or said["cut"] == 0)
    return f"{words(said)}; status {status} after {ended:.1f} s, ready again after {again:.1f} s", fine


Fault = Callable[[Server, int, Random], Awaitable[Said]]
FAULTS: dict[str, Fault] = {
    "vanish": vanish,
    "slow writers": slow_writers,
    "slow readers": slow_readers,
    "half-open": half_open,
    "pipelined": pipelined,
    "malformed": malformed,
    "crowd": crowd,
    "contained": contained,
    "neighbours": neighbours,
    "full disk": full_disk,
    "clock": clock,
}
LETHAL = {
    **{f"device error in {stage}": (stage, "device") for stage in ("prefill", "denoise", "commit", "allocation")},
    "a step that does not end": ("denoise", "hang"),
    "kill -9": ("", "kill -9"),
}


async def look(server: Server, name: str, count: int, chance: Random) -> dict[str, Any]:
    """One fault, with what was held before and after it."""
    before = await server.held()
    try:
        said, fine = await FAULTS[name](server, count, chance)
        answered = await server.answers()
        after = await server.held(before)
    except httpx.TransportError as error:
        said, fine, answered, after = f"the server is gone: {error!r}", False, False, before
    if after["books"] != "agree":
        said, fine = f"{said}; books {after['books']}", False
    kept = all(after[each] <= before[each] for each in EXACT) and after["memory"] - before["memory"] <= GROWTH
    held = {each: [before[each], after[each]] for each in HELD}
    return {"fault": name, "said": said, **held, "answered": answered, "fine": fine and answered and kept}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "slots" not in row:
        return f"| {row['fault']} | {row['said']} | | | | | | | {'yes' if row['answered'] else 'NO'} |"
    counts = " | ".join(f"{row[each][0]} > {row[each][1]}" for each in HELD[:-1])
    before, after = (size / 1e6 for size in row["memory"])
    served = "yes" if row["answered"] else "NO"
    return f"| {row['fault']} | {row['said']} | {counts} | {before:.0f} > {after:.0f} | {served} |"


async def warm_up(server: Server, size: int, chance: Random) -> None:
    """Bring threads, caches, the allocator and the code that matmuls keep for numbers of rows to their usual size."""
    memory = 0
    for _ in range(10):
        await clients.at_once([clients.vanishing(server.port, Random(chance.random())) for _ in range(4 * size)], 64)
        await clients.at_once([clients.streaming(server.port, seed=seed) for seed in range(size)], size)
        before, memory = memory, (await server.held())["memory"]
        if memory - before < GROWTH / 4:
            break


async def run(names: list[str], count: int, seed: int) -> list[dict[str, Any]]:
    """The faults, one after the other, on one server; those it does not survive come last."""
    rows: list[dict[str, Any]] = []
    chance = Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            await server.start()
            await warm_up(server, max(4, count // 50), chance)
            print("| fault | what happened | slots | pages | tasks | files | threads | memory, MB | next one served |")
            print("|---|---|---|---|---|---|---|---|---|")
            for name in names:
                if name in FAULTS:
                    rows.append(await look(server, name, count, chance))
                else:
                    said, fine = await lethal(server, *LETHAL[name])
                    answered = await server.answers()
                    rows.append({"fault": name, "said": said, "answered": answered, "fine": fine and answered})
                print(line(rows[-1]) + ("" if rows[-1]["fine"] else "  <-- NOT AS IT SHOULD BE"), flush=True)
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            status = await server.status()
            rows.append({"fault": "SIGTERM", "said": f"status {status}", "answered": True, "fine": status == 0})
            if any(not row["fine"] for row in rows):
                print(server.log.read_text(errors="replace")[-4000:], file=sys.stderr)
        finally:
            await server.http.aclose()
            if server.process is not None:
                server.process.kill()
                server.process.wait()
    return rows


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2000, help="how many vanish")
    parser.add_argument("--only", nargs="*", metavar="NAME", help=", ".join([*FAULTS, *LETHAL]))
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    names = told.only or [*FAULTS, *LETHAL]
    if unknown := [name for name in names if name not in {**FAULTS, **LETHAL}]:
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join([*FAULTS, *LETHAL])}")
    rows = asyncio.run(run(names, told.clients, told.seed))
    print(json.dumps(rows))
    sys.exit(0 if all(row["fine"] for row in rows) else 1)


if __name__ == "__main__":
    main()
