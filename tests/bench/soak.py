"""Hours of unruly clients against a live server: random lengths, turns, tools, cancelled streams, sudden ends.

    easel serve &
    python tests/bench/soak.py --url http://127.0.0.1:8000 --pid PID --minutes 30 --clients 8

Every client talks in a loop until time is up. A request must end in one of the ways that the API promises: a whole
reply with its usage, a refusal with OpenAI's error body (a full queue is waited out), or the client's own leaving.
Anything else is counted as an error. `--pid` is the server's, whose memory is watched. At the end the server must be
idle: nothing runs, nobody waits. The last line of stdout is one JSON document; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Max", "Eva", "Sam")
ANIMALS = ("a fox", "an owl", "a bear", "a cat", "a horse", "a frog", "a rabbit", "a duck")


@dataclass
class Score:
    """What happened so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds_to_first_text: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, resident bytes

    def fail(self, what: str) -> None:
        self.outcomes["error"] += 1
        if len(self.errors) < 20:
            self.errors.append(what)

    def usage(self, usage: dict[str, Any]) -> None:
        self.tokens += usage["completion_tokens"]
        self.prompt_tokens += usage["prompt_tokens"]
        self.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]


class Client:
    """One user: conversations of random length, some of them left in the middle."""

    def __init__(self, http: httpx.AsyncClient, model: str, score: Score, seed: int) -> None:
        self._http = http
        self._model = model
        self._score = score
        self._random = Random(seed)

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            history: list[dict[str, str]] = []
            for _ in range(self._random.randint(1, 6)):
                if time.monotonic() >= until or not await self._turn(history):
                    break

    async def _turn(self, history: list[dict[str, str]]) -> bool:
        """One request; True if the conversation can go on from it."""
        history.append({"role": "user", "content": self._question()})
        body = {
            "model": self._model,
            "messages": history,
            "max_tokens": self._random.choice((1, 20, 64, 150, 400)),
            "seed": self._random.randrange(1000),
            "temperature": self._random.choice((0, 0.7, 1)),
            "n": self._random.choice((1, 1, 1, 2)),
        }
        leaves_after = self._random.choice((None, None, None, 0.0, 0.3, 2.0))
        ask = self._streamed if self._random.random() < 0.7 else self._whole
        work = asyncio.ensure_future(ask(body))
        done, _ = await asyncio.wait({work}, timeout=leaves_after)
        if not done:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self._score.outcomes["left"] += 1
            return self._random.random() < 0.5 and bool(history.pop())
        try:
            said = work.result()
        except (httpx.HTTPError, KeyError, ValueError, AssertionError) as error:
            self._score.fail(f"{type(error).__name__}: {error}")
            return False
        if said is None:
            return False
        history.append({"role": "assistant", "content": said})
        return True

    def _question(self) -> str:
        story = f"Write a story about {self._random.choice(NAMES)} and {self._random.choice(ANIMALS)}."
        total = f"What is {self._random.randint(1, 99)} + {self._random.randint(1, 99)}?"
        long = " ".join([story] * self._random.randint(5, 60))
        return self._random.choices((story, total, long), (5, 4, 2))[0]

    async def _whole(self, body: dict[str, Any]) -> str | None:
        answer = await self._http.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return await self._refused(answer.status_code, answer.headers, answer.json())
        found = answer.json()
        assert len(found["choices"]) == body["n"], "a choice is missing"
        self._ended([choice["finish_reason"] for choice in found["choices"]], found["usage"])
        return str(found["choices"][0]["message"]["content"])

    async def _streamed(self, body: dict[str, Any]) -> str | None:
        began = time.monotonic()
        options = body | {"stream": True, "stream_options": {"include_usage": True}}
        text, reasons, usage, ended = "", [], None, False
        async with self._http.stream("POST", "/v1/chat/completions", json=options) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return await self._refused(answer.status_code, answer.headers, answer.json())
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, f"an error inside a stream: {chunk}"
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    more = choice["delta"].get("content") or ""
                    if more and not text:
                        self._score.seconds_to_first_text.append(time.monotonic() - began)
                    text += more if choice["index"] == 0 else ""
                    reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        assert ended, "a stream without its end"
        assert usage is not None, "a stream without usage"
        assert len(reasons) == body["n"], "a choice without its end"
        self._ended(reasons, usage)
        return text

    def _ended(self, reasons: list[str], usage: dict[str, Any]) -> None:
        assert set(reasons) <= {"stop", "length"}, f"finish_reason {reasons}"
        self._score.outcomes["whole"] += 1
        self._score.usage(usage)

    async def _refused(self, status: int, headers: httpx.Headers, body: dict[str, Any]) -> None:
        """A refusal is fine if it is one the API promises."""
        error = body["error"]
        if status == 429:
            self._score.outcomes["queue full"] += 1
            await asyncio.sleep(float(headers["retry-after"]))
        elif status == 400 and error["code"] == "context_length_exceeded":
            self._score.outcomes["too long"] += 1
        else:
            self._score.fail(f"status {status}: {error}")


def resident(pid: int) -> int:
    """Bytes of memory a process holds."""
    fields = (line.split() for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    return next(int(parts[1]) * 1024 for parts in fields if parts[0] == "VmRSS:")


async def watch(pid: int, score: Score, until: float) -> None:
    """Note the server's memory now and then."""
    began = time.monotonic()
    while (now := time.monotonic()) < until:
        score.memory.append((round(now - began, 1), resident(pid)))
        await asyncio.sleep(min(10.0, max(0.0, until - now)))


async def settled(http: httpx.AsyncClient, model: str) -> bool:
    """Whether the server, left alone, answers one more question at once and whole."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
    answer = await http.post("/v1/chat/completions", json=body, timeout=120)
    return answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "stop"


async def soak(url: str, pid: int | None, minutes: float, clients: int, seed: int) -> dict[str, Any]:
    score = Score()
    began = time.monotonic()
    until = began + 60 * minutes
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        work = [Client(http, model, score, seed + number).run(until) for number in range(clients)]
        await asyncio.gather(*work, *([watch(pid, score, until)] if pid is not None else []))
        alive = await settled(http, model)
    third = len(score.memory) // 3
    return {
        "bench": "soak",
        "minutes": round((time.monotonic() - began) / 60, 2),
        "clients": clients,
        "outcomes": dict(score.outcomes),
        "errors": score.errors,
        "answers_afterwards": alive,
        "completion_tokens": score.tokens,
        "prompt_tokens": score.prompt_tokens,
        "cached_tokens": score.cached_tokens,
        "seconds_to_first_text": median(score.seconds_to_first_text) if score.seconds_to_first_text else None,
        "resident_mb": {
            "after_a_third": max((size for _, size in score.memory[: third + 1]), default=0) // 10**6,
            "at_the_end": max((size for _, size in score.memory[-third - 1 :]), default=0) // 10**6,
            "every_ten_seconds": [size // 10**6 for _, size in score.memory],
        },
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--pid", type=int, help="of the server, to watch its memory")
    options.add_argument("--minutes", type=float, default=30)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    try:
        found = asyncio.run(soak(chosen.url, chosen.pid, chosen.minutes, chosen.clients, chosen.seed))
    except httpx.ConnectError:
        options.error(f"no server answers at {chosen.url}; start one with `easel serve`")
    print(json.dumps(found))
    sys.exit(bool(found["errors"]) or not found["answers_afterwards"])


if __name__ == "__main__":
    main()
