"""The server that the clients are tried against: all of it but the model, whose replies are scripted.

    python tests/clients/serve.py [RECORD_FOLDER]      # prints its address, then serves until its stdin closes

What it says depends on the last thing the user said: a tool is called if there is one and it was not called yet;
"think", "slow", "fail", "json" and "stop" do what they say; everything else is answered "It is sunny.". Where the reply
is held to a form, it is Paris and 21 degrees in that form, as JSON or as a call; a gap is filled with "sunny".
`GET /engine` tells what became of the requests. `POST /record/NAME` gives a name to the request bodies that follow;
with a folder the first body per name and path, with tools and without, held to a form or not, is kept in it.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import uvicorn  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # noqa: E402

from engine import CanvasRead, CanvasRequest, GenerationRequest  # noqa: E402
from server.access import Keys  # noqa: E402
from server.app import AppSettings, create_app  # noqa: E402
from server.bridge import Bridge  # noqa: E402
from server.chat import ChatService  # noqa: E402
from server.prompt import PromptRenderer  # noqa: E402
from tests.fakes import FakeEngine, Script, Template, byte_tokenizer, script  # noqa: E402

TOKENIZER = byte_tokenizer()
TEMPLATE = ROOT / "engine" / "demo" / "chat_template.jinja"
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
CONTEXT = 20_000


def say(request: GenerationRequest) -> Script:
    """What the model answers to a prompt."""
    prompt = TOKENIZER.decode(list(request.prompt_ids), skip_special_tokens=False)
    asked = prompt.rpartition("<|turn>user")[2]
    if request.constraint is not None and "<|tool_response>" not in asked:
        tools = re.findall(r"declaration:([\w-]+)", prompt)
        if "form" in asked.lower() or not tools:
            return script('{"city": "Paris", ', '"degrees": 21}')
        known = 'city:<|"|>Paris<|"|>' + (",degrees:21" if "degrees" in prompt else "")
        return script(f"<|tool_call>call:{tools[-1]}{{{known}}}<tool_call|>", stop_id=50)
    if "fail" in asked:
        return script("a", reason="error", error="it failed")
    if "slow" in asked:
        return script(*["more "] * 500, step_seconds=0.02)
    if "think" in asked:
        return script("<|channel>thought\nhm", "m\n<channel|>", "It is ", "sunny.")
    if "json" in asked.lower():
        return script('```json\n{"city": "Paris", ', '"degrees": 21}\n```')
    if "declaration:get_weather" in prompt and "<|tool_response>" not in asked:
        return script("Let me see.", CALL[:30], CALL[30:], stop_id=50)
    return script("It is ", "sunny.")


def fill(request: CanvasRequest) -> CanvasRead:
    """What the model finds on a canvas with free positions: the first letters, or "sunny" in a gap of its length."""
    text = TOKENIZER.encode("sunny", add_special_tokens=False).ids
    if request.allowed and all(len(ids) == 1 for ids in request.allowed):  # how likely is what was found in a gap?
        before = list(itertools.takewhile(lambda token: token is not None, request.canvas))
        known = (before or [token for (token,) in request.allowed]) == text
        likely = ((0.0 if known else -3.0,),) * request.free
        return CanvasRead(request_id=request.id, token_ids=(), logprobs=(), allowed=likely, steps=1)
    gap = [ids[0] for ids in request.allowed] if request.allowed else (text * request.free)[: request.free]
    sure = 0.0 if request.allowed or request.free == len(text) else -3.0
    found = iter(gap)
    return CanvasRead(
        request_id=request.id,
        token_ids=tuple(next(found) if held is None else held for held in request.canvas),
        logprobs=(sure,) * len(request.canvas),
        allowed=tuple(tuple(-1.0 - place for place in range(len(ids))) for ids in request.allowed or ()),
        steps=1,
    )


class Recorder:
    """Keeps the first request body of each name and path."""

    def __init__(self, app: ASGIApp, folder: Path | None) -> None:
        self._app, self._folder, self._name = app, folder, "unnamed"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.startswith("/record/"):
            self._name = path.removeprefix("/record/")
            await Response()(scope, receive, send)
            return
        body = bytearray()

        async def listen() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        await self._app(scope, listen, send)
        if self._folder is not None and body:
            request = {"path": path, "body": json.loads(body)}
            kind = "-tools" if request["body"].get("tools") else ""
            form = request["body"].get("response_format") or request["body"].get("text")
            kind += "-form" if form or request["body"].get("tool_choice") not in (None, "auto") else ""
            target = self._folder / f"{self._name}{path.replace('/', '-')}{kind}.json"
            if not target.exists():
                target.write_text(json.dumps(request, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Serve until whoever started this closes its end."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    engine = FakeEngine(say, context_length=CONTEXT, reader=fill)
    prompts = PromptRenderer(TOKENIZER, Template(TEMPLATE.read_text(encoding="utf-8")))
    with Bridge(engine) as bridge:
        app = create_app(ChatService(bridge, prompts, ["easel-demo"]), AppSettings(keys=Keys(["key"])))

        @app.get("/engine")
        async def state(request: Request) -> Response:
            return JSONResponse({"begun": len(engine.requests), "ended": len(engine.ended), "cut": engine.cancelled})

        config = uvicorn.Config(Recorder(app, folder), port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.01)
        print(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)
        sys.stdin.read()
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
