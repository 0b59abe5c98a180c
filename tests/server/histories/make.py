"""Write the prompts that the demo model's chat template makes of the histories in this folder.

    python tests/server/histories/make.py      # rewrites the .txt file beside every .json file

Each .json file is the body of a request as a client builds it over several turns; its .txt file is what the model is
given. Run this only when a prompt is meant to change, and read the difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
TEMPLATE = ROOT / "engine" / "demo" / "chat_template.jinja"


def prompt_of(body: dict[str, Any], template: str) -> str:
    """The prompt for a body: of Anthropic's messages, OpenAI's responses, or a chat."""
    from server import tool_schema
    from server.dialects import anthropic, openai_chat, responses
    from server.dialects.response_store import ResponseStore
    from server.prompt import PromptRenderer
    from tests.fakes import Template, byte_tokenizer

    document = json.dumps(body).encode()
    if "input" in body:
        task = responses.read(ResponseStore(), document).task
    elif "system" in body:
        task = anthropic.read(document).task
    else:
        task = openai_chat.read(document).task
    prompts = PromptRenderer(byte_tokenizer(), Template(template))
    return prompts.text(task.messages, tool_schema.for_template(task.tools), task.template_options)


def main() -> None:
    """Rewrite every prompt."""
    sys.path.insert(0, str(ROOT))
    template = TEMPLATE.read_text(encoding="utf-8")
    for source in sorted(HERE.glob("*.json")):
        body = json.loads(source.read_text(encoding="utf-8"))
        source.with_suffix(".txt").write_text(prompt_of(body, template), encoding="utf-8")


if __name__ == "__main__":
    main()
