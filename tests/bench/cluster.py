"""What two replicas do in the time of one: the same stories asked of a cluster with one, and with two.

    make bench-cluster [ARGS="--rounds 3 --clients 8 --requests 24"]

A request asks for four stories, about 640 tokens, which is a usual reply of a real model; one alone takes the demo
model a quarter of a second. Each replica computes with one thread. Rounds take turns, one replica and then two, so that
a machine that slows down slows both; the ratio is that of the medians. On a machine with two cores, what brings the
requests to the replicas takes its time from the second replica.
The last line of stdout is one JSON document. Tokens are those of the replies, as the server counted them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from statistics import median
from typing import Any

import httpx

from server.bench import story_prompts
from tests.cluster.ray_head import KEY, Cluster, running_cluster


async def ask(client: httpx.AsyncClient, prompt: str, session: int) -> int:
    """Tokens of one reply."""
    body = {"messages": [{"role": "user", "content": prompt}], "seed": 1, "max_tokens": 256, "n": 4}
    answer = await client.post("/v1/chat/completions", json=body, headers={"x-session-id": f"session {session}"})
    tokens: int = answer.raise_for_status().json()["usage"]["completion_tokens"]
    return tokens


async def load(address: str, prompts: list[str], clients: int) -> dict[str, float]:
    """So many clients, each with a session of its own, until all the prompts are answered."""
    waiting = list(enumerate(prompts))
    tokens = 0

    async def client(number: int) -> None:
        nonlocal tokens
        while waiting:
            session, prompt = waiting.pop()
            told = await ask(http, prompt, session)
            tokens += told  # in two steps: others add to it while this one waits

    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=address, headers=headers, timeout=600) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        seconds = time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def measure(cluster: Cluster, rounds: int, clients: int, requests: int) -> list[dict[str, Any]]:
    """All rounds, in order."""
    prompts = list(story_prompts(requests))
    results = []
    for round_ in range(rounds):
        for replicas in (1, 2):
            cluster.deploy(replicas)
            asyncio.run(load(cluster.address, prompts[:clients], clients))  # warm-up, not counted
            result = {"round": round_, "replicas": replicas, **asyncio.run(load(cluster.address, prompts, clients))}
            print(f"{replicas} replicas: {result['tokens_per_second']:8.1f} tokens/s", flush=True)
            results.append(result)
    return results


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--requests", type=int, default=24)
    chosen = options.parse_args()
    with running_cluster() as cluster:
        results = measure(cluster, chosen.rounds, chosen.clients, chosen.requests)
    one, two = (
        median(result["tokens_per_second"] for result in results if result["replicas"] == replicas)
        for replicas in (1, 2)
    )
    print(f"one {one:.1f}, two {two:.1f} tokens/s: {two / one:.2f} times")
    print(json.dumps({"bench": "cluster", "ratio": two / one, "clients": chosen.clients, "rounds": results}))


if __name__ == "__main__":
    main()
