"""What a schema costs a JSON reply of the demo model: denoise steps with and without it, on held-out prompts.

    python -m tests.bench.json_steps [--prompts 200] [--checkpoint DIR] [--device cuda]

The schema is that of the right answer: its keys in its order, with their types. Seeds are the same both ways. The last
line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

from engine import EngineOptions, build_engine
from engine.demo import corpus
from server.bridge import Bridge
from server.chat import ChatService
from server.dialects import openai_chat
from server.infill import open_reply
from server.prompt import PromptRenderer

HERE = Path(__file__).parents[2] / "engine" / "demo" / "checkpoint"
TYPES = {str: "string", int: "integer", list: "array"}


def schema_of(answer: str) -> dict[str, Any]:
    """The schema that the answer's object follows."""
    found = json.loads(answer)
    properties: dict[str, Any] = {key: {"type": TYPES[type(value)]} for key, value in found.items()}
    for key, value in found.items():
        if isinstance(value, list):
            properties[key]["items"] = {"type": TYPES[type(value[0])]}
    return {"type": "object", "properties": properties, "required": list(found), "additionalProperties": False}


async def ask(service: ChatService, example: corpus.Example, seed: int, schema: dict[str, Any] | None) -> Any:
    """The reply's text and its denoise steps."""
    body: dict[str, Any] = {"messages": example.messages, "seed": seed}
    if example.tools:
        body["tools"] = example.tools
    if example.thinking:
        body["reasoning_effort"] = "medium"
    if schema is not None:
        wanted = {"name": "answer", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    folded = await (await open_reply(service, openai_chat.read(json.dumps(body).encode()).task)).fold()
    return folded.choices[0].content, folded.done.steps


async def measure(service: ChatService, count: int) -> dict[str, Any]:
    """Steps both ways, and how many are right."""
    steps: list[tuple[int, int]] = []
    right: Counter[str] = Counter()
    for number in range(count):
        example = corpus.example("test", number, family="json")
        free, held = [await ask(service, example, number, each) for each in (None, schema_of(example.answers[0]))]
        steps.append((free[1], held[1]))
        for way, (text, _) in (("free", free), ("held", held)):
            right[way] += text.strip() == example.answers[0]
    return {
        "bench": "json steps",
        "prompts": count,
        "no_more_steps": sum(held <= free for free, held in steps) / count,
        "steps_free": sum(free for free, _ in steps) / count,
        "steps_held": sum(held for _, held in steps) / count,
        "right_free": right["free"] / count,
        "right_held": right["held"] / count,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, default=HERE)
    p.add_argument("--device", default="auto")
    p.add_argument("--prompts", type=int, default=200)
    a = p.parse_args()
    engine = build_engine(EngineOptions(model=str(a.checkpoint), device=a.device, progress=False))
    with Bridge(engine) as bridge:
        service = ChatService(bridge, PromptRenderer.from_folder(a.checkpoint), ("demo",))
        found = asyncio.run(measure(service, a.prompts))
    print(
        f"{100 * found['no_more_steps']:.0f} % take no more steps with the schema; "
        f"{found['steps_free']:.2f} steps without it, {found['steps_held']:.2f} with it; "
        f"right {100 * found['right_free']:.0f} % and {100 * found['right_held']:.0f} %"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
