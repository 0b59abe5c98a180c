"""Our own OpenAPI document, made of the very models that check requests.

Answers are described by their kind only: their forms are OpenAI's and Anthropic's, which are described elsewhere.
Knows routes and bodies, nothing of how they are answered. Invariant: a field in the document is a field that is read.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.dialects.anthropic_schema import CountRequest, MessagesRequest
from server.dialects.chat_schema import ChatRequest
from server.dialects.completions import CompletionRequest
from server.dialects.decisions_schema import DecisionsRequest
from server.dialects.editors import FimRequest, LlamaRequest
from server.dialects.responses_schema import ResponsesRequest
from server.dialects.tokens import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest

Json = dict[str, Any]

_BODIES: dict[str, tuple[type[BaseModel], str, bool]] = {  # model, what it does, whether it can stream
    "/v1/chat/completions": (ChatRequest, "Answer a conversation", True),
    "/v1/completions": (CompletionRequest, "Go on with a text, or fill a gap in one", True),
    "/v1/responses": (ResponsesRequest, "Answer a list of items", True),
    "/v1/messages": (MessagesRequest, "Answer a conversation in Anthropic's form", True),
    "/v1/messages/count_tokens": (CountRequest, "Count the tokens of a conversation", False),
    "/v1/decisions": (DecisionsRequest, "Answer questions that have fixed answers", False),
    "/v1/fim/completions": (FimRequest, "Fill a gap, in Continue's form", True),
    "/infill": (LlamaRequest, "Fill a gap, in llama.cpp's form", True),
    "/tokenize": (TokenizeRequest, "Text or messages to token ids", False),
    "/detokenize": (DetokenizeRequest, "Token ids to text", False),
    "/apply-template": (ApplyTemplateRequest, "Messages to the prompt's text", False),
}
_GETS = {
    "/v1/models": "The models",
    "/v1/models/{name}": "One model",
    "/v1/responses/{response_id}": "A response that is still kept",
    "/health": "Whether the server is alive",
    "/ready": "Whether the model is loaded",
    "/stats": "What the server is at, and its counts",
}
_FAULTS = {
    "400": "The request is at fault; `param` names the field",
    "401": "The API key is missing or wrong",
    "403": "A name or an origin that keyless clients may not use",
    "404": "No such model, response or route",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "The waiting queue is full",
    "500": "Generation failed",
    "503": "The engine is not running",
    "504": "The answer took longer than the settings allow",
}


@cache
def document() -> Json:
    """The document, OpenAPI 3.1."""
    models = [(model, "validation") for model, _, _ in _BODIES.values()]
    names, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: Json = {}
    for path, (model, summary, streams) in _BODIES.items():
        body = {"content": {"application/json": {"schema": names[model, "validation"]}}, "required": True}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _answers(streams=streams)}}
    for path, summary in _GETS.items():
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in ("name", "response_id")
            if f"{{{name}}}" in path
        ]
        paths[path] = {"get": {"summary": summary, "parameters": parameters, "responses": _answers(streams=False)}}
    details = {"type": "object", "properties": {"message": {"type": "string"}, "type": {"type": "string"}}}
    error = {"type": "object", "properties": {"error": details}, "required": ["error"]}
    schemas = {**definitions.get("$defs", {}), "Error": error}
    return {
        "openapi": "3.1.0",
        "info": {"title": "easel", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _answers(*, streams: bool) -> Json:
    content: Json = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "object"}}  # of an event: its fields
    fault = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    faults = {status: {"description": text, "content": fault} for status, text in _FAULTS.items()}
    return {"200": {"description": "The answer", "content": content}, **faults}
