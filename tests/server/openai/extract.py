"""Cut what easel serves out of OpenAI's own description of its API.

    python tests/server/openai/extract.py FULL_DESCRIPTION.yaml      # writes description.json beside this file

The full document (github.com/openai/openai-openapi, MIT licence) has three megabytes and a hundred paths. What is
kept means the same but for NULL_TOO; documentation texts and examples are dropped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

PATHS = {
    "/chat/completions": ("post",),
    "/completions": ("post",),
    "/responses": ("post",),
    "/models": ("get",),
    "/models/{model}": ("get",),
}
ALSO = ("CreateChatCompletionStreamResponse", "ResponseStreamEvent", "ErrorResponse")  # described in prose only
# OpenAI's own answers have null here, and Open Responses asks for it; the description forgot to say so.
NULL_TOO = (("Response", "usage"), ("ModelResponseProperties", "user"))
DROPPED = {"description", "summary", "x-oaiMeta", "example", "examples", "tags", "x-stainless-const", "externalDocs"}


def plain(node: Any, *, names: bool = False) -> Any:
    """The node without texts. Below `properties` the keys are names, not keywords."""
    if isinstance(node, list):
        return [plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    kept = node if names else {key: value for key, value in node.items() if key not in DROPPED}
    kept = {key: plain(value, names=key == "properties") for key, value in kept.items()}
    if not names and kept.pop("nullable", False) is True:  # of OpenAPI 3.0; 3.1 is JSON schema and has no such word
        return {"anyOf": [kept, {"type": "null"}]}
    return kept


def operation(node: Any) -> Any:
    """An operation with its 200 answer only: the few errors the document lists are not what its server sends."""
    kept = plain(node)
    kept.pop("security", None)
    return {**kept, "responses": {"200": kept["responses"]["200"]}}


def references(node: Any) -> set[str]:
    """Names of the components a node refers to."""
    if isinstance(node, list):
        return set().union(*(references(each) for each in node))
    if not isinstance(node, dict):
        return set()
    own = {node["$ref"].rpartition("/")[2]} if isinstance(node.get("$ref"), str) else set()
    return own.union(*(references(value) for value in node.values()))


def main(source: str) -> None:
    """Read the full description, write the part."""
    full = yaml.load(Path(source).read_text(), Loader=yaml.CSafeLoader)
    paths = {
        path: {method: operation(full["paths"][path][method]) for method in methods} for path, methods in PATHS.items()
    }
    schemas: dict[str, Any] = {}
    missing = {*ALSO, *references(paths)}
    while missing:
        name = missing.pop()
        schemas[name] = plain(full["components"]["schemas"][name])
        missing |= references(schemas[name]) - schemas.keys()
    for name, key in NULL_TOO:
        for part in (schemas[name], *schemas[name].get("allOf", ())):
            if key in part.get("properties", {}):
                part["properties"][key] = {"anyOf": [part["properties"][key], {"type": "null"}]}
    document = {
        "openapi": full["openapi"],
        "info": {
            "title": full["info"]["title"],
            "version": full["info"]["version"],
            "license": full["info"].get("license"),
        },
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.items()))},
    }
    target = Path(__file__).with_name("description.json")
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
