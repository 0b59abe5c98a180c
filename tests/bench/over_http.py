"""What a client of a running server gets: stories asked one after the other over HTTP, timed at the client.

    easel serve &
    python tests/bench/over_http.py --url http://127.0.0.1:8000 --requests 5

Beside `easel bench`, which times the engine alone, this shows what HTTP, templates and text cost. The last line of
stdout is one JSON document. Seconds to first text are those until the first text reached this client.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from statistics import median
from typing import Any

from server.bench import story_prompts
from server.terminal_chat import ChatClient, Closing, Piece


def ask(client: ChatClient, model: str, prompt: str) -> dict[str, Any]:
    """One request; times in seconds, everything else as the server counted it."""
    began = time.perf_counter()
    first: float | None = None
    facts: dict[str, Any] = {}
    for item in client.reply(model, [{"role": "user", "content": prompt}], thinking=False):
        if isinstance(item, Closing):
            facts = item.facts
        elif first is None and isinstance(item, Piece):
            first = time.perf_counter() - began
    return {"prompt": prompt, "seconds": time.perf_counter() - began, "seconds_to_first_text": first, "server": facts}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--requests", type=int, default=5)
    chosen = options.parse_args()
    with closing(ChatClient(chosen.url)) as client:
        model = client.model()
        ask(client, model, "Who are you?")  # warm-up, not counted
        results = [ask(client, model, prompt) for prompt in story_prompts(chosen.requests)]
    for result in results:
        print(f"{result['seconds']:8.2f} s  {result['prompt']}")
    first = [result["seconds_to_first_text"] for result in results if result["seconds_to_first_text"] is not None]
    summary = {
        "requests": len(results),
        "seconds": sum(result["seconds"] for result in results),
        "seconds_to_first_text": median(first) if first else None,
    }
    print(json.dumps({"bench": "http", "model": model, "summary": summary, "requests": results}))


if __name__ == "__main__":
    main()
