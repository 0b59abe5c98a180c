"""A chat in the terminal: an ordinary client of the server, of the same wire format everybody else uses.

Knows the chat completions format and the screen; nothing of engines, tokens or prompts, so it talks to a server
anywhere. Ctrl-C stops a reply, never the program; ctrl-D or /quit leaves. Invariant: what is in the history is
what was on the screen, so a stopped reply stays as far as it got and a failed question is forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import httpx
from rich.console import Console
from rich.live import Live
from rich.text import Text

COMMANDS = {
    "/help": "show these commands",
    "/system TEXT": "set the system message (without TEXT: remove it)",
    "/think": "switch thinking before the answer on or off",
    "/reset": "forget the conversation",
    "/quit": "leave (as ctrl-D does)",
}
PROMPT = "> "
MOST_LINES = 20  # of a canvas that is watched
THOUGHT_STYLE = "dim italic"
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # a reply must not steer the terminal


class ChatError(Exception):
    """The server cannot be reached or refused the request. The message is one line for the user."""


@dataclass(frozen=True)
class Piece:
    """What one canvas added to the reply."""

    kind: Literal["thought", "answer"]
    text: str


@dataclass(frozen=True)
class Draft:
    """A canvas after a denoise step. `tokens`: None for a control token; `accepted`: positions."""

    tokens: list[str | None]
    entropy: list[float]
    accepted: list[int]


@dataclass(frozen=True)
class Closing:
    """How a reply ended. `facts` is the server's own account of the work, empty if it gives none."""

    finish_reason: str
    facts: dict[str, Any]


class ChatClient:
    """The wire: one server, one model. Close it when done."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A reply may take as long as it takes. The environment's proxies are not for a server named by its address.
        timeout = httpx.Timeout(10.0, read=None)
        self._http = httpx.Client(base_url=base + "/v1", headers=headers, timeout=timeout, trust_env=False)
        self.url = base

    def model(self) -> str:
        """The first model the server offers. Raises ChatError."""
        try:
            response = self._http.get("/models", timeout=10.0)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(f"no server answers at {self.url} ({error}); start one with `easel serve`") from None
        if response.status_code != 200:
            raise ChatError(_refusal(response.status_code, response.content))
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ChatError(f"{self.url} answers, but not as an OpenAI-compatible server") from None

    def reply(
        self, model: str, messages: list[dict[str, str]], *, thinking: bool, watch: bool = False
    ) -> Generator[Piece | Draft | Closing, None, None]:
        """Stream one reply; `watch`: with its canvases after every step. Closing the iterator early ends the
        connection, which stops the work. Raises ChatError."""
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        if watch:
            body["easel"] = {"drafts": True}
        reason = ""
        facts: dict[str, Any] = {}
        try:
            with self._http.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatError(_refusal(response.status_code, response.read()))
                for chunk in _events(response.iter_lines()):
                    facts = chunk.get("easel") or facts
                    if chunk.get("object") == "easel.draft":
                        draft = chunk["draft"]
                        yield Draft(draft["tokens"], draft["entropy"], draft["accepted"])
                    for choice in chunk.get("choices", []):
                        delta = choice.get("delta", {})
                        if delta.get("reasoning_content"):
                            yield Piece("thought", delta["reasoning_content"])
                        if delta.get("content"):
                            yield Piece("answer", delta["content"])
                        reason = choice.get("finish_reason") or reason
        except httpx.HTTPError as error:
            raise ChatError(f"the connection to {self.url} broke: {error}") from None
        yield Closing(reason, facts)

    def close(self) -> None:
        self._http.close()


class ReplyView:
    """Shows a reply as it forms. On a terminal, finished lines scroll up and the unfinished one waits with a mark
    for the canvas being denoised; elsewhere text is written as it comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._kind: str = "answer"
        self._line = ""
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> ReplyView:
        if self._live:
            self._live.start()
            self._refresh()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        if self._line:
            self._console.print(self._styled(self._line), soft_wrap=True)

    def add(self, piece: Piece) -> None:
        if piece.kind != self._kind:
            if self._line:
                self._console.print(self._styled(self._line), soft_wrap=True)
            self._line, self._kind = "", piece.kind
        *done, self._line = (self._line + piece.text).split("\n")
        for line in done:
            self._console.print(self._styled(line), soft_wrap=True)
        self._refresh()

    def watch(self, draft: Draft) -> None:
        """Show the canvas in place of the mark, until it is final."""
        if self._live:
            self._live.update(self._styled(self._line) + _drawn(draft, self._console.width), refresh=True)

    def _styled(self, text: str) -> Text:
        return Text(text.translate(_CONTROL), style=THOUGHT_STYLE if self._kind == "thought" else "")

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self._styled(self._line) + Text(" ▒▒▒", style="dim"), refresh=True)


class TerminalChat:
    """The conversation: reads a line, answers it, until the end of the input."""

    def __init__(
        self, client: ChatClient, console: Console, *, model: str, thinking: bool = False, watch: bool = False
    ) -> None:
        self._client = client
        self._console = console
        self._model = model
        self._thinking = thinking
        self._watch = watch
        self._system = ""
        self._history: list[dict[str, str]] = []

    def run(self, read: Callable[[str], str]) -> None:
        """Talk until `read`, which is given the prompt to show, raises EOFError, or the user says /quit."""
        self._note(f"Talking to {self._model}. /help lists commands, ctrl-C stops a reply, ctrl-D leaves.")
        prompt = PROMPT if self._console.is_terminal else ""
        while True:
            try:
                line = read(prompt).strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except KeyboardInterrupt:
                self._note("\n(ctrl-D leaves)")
            except EOFError:
                self._console.print()
                return

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        match name:
            case "/help":
                for command, meaning in COMMANDS.items():
                    self._note(f"{command:<14} {meaning}")
            case "/system":
                self._system = rest.strip()
                self._note("System message set." if self._system else "System message removed.")
            case "/think":
                self._thinking = not self._thinking
                self._note(f"Thinking is {'on' if self._thinking else 'off'}.")
            case "/reset":
                self._history.clear()
                self._note("Conversation forgotten.")
            case _:
                close = get_close_matches(name, [command.split()[0] for command in COMMANDS], n=1)
                self._note(f"No command {name}. " + (f"Did you mean {close[0]}?" if close else "/help lists them."))

    def _answer(self, question: str) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        asked = {"role": "user", "content": question}
        answer = ""
        closing: Closing | None = None
        messages = [*system, *self._history, asked]
        stream = self._client.reply(self._model, messages, thinking=self._thinking, watch=self._watch)
        try:
            with ReplyView(self._console) as view:
                for item in stream:
                    if isinstance(item, Closing):
                        closing = item
                    elif isinstance(item, Draft):
                        view.watch(item)
                    else:
                        answer += item.text if item.kind == "answer" else ""  # first: ctrl-C may come while it is shown
                        view.add(item)
        except KeyboardInterrupt:
            self._note("(stopped)")
        except ChatError as error:
            self._console.print(Text(f"{error}", style="red"))
            return
        finally:
            stream.close()
        if closing:
            self._note(_account(closing))
        if answer:
            self._history += [asked, {"role": "assistant", "content": answer}]

    def _note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))


def _drawn(draft: Draft, width: int) -> Text:
    """A canvas: what is accepted as text, the rest as noise, the denser the less sure. Nothing behind the end."""
    last = max((place for place, token in enumerate(draft.tokens) if token is not None), default=-1)
    accepted, drawn = set(draft.accepted), Text("\n")
    for place, (token, entropy) in enumerate(zip(draft.tokens[: last + 1], draft.entropy, strict=False)):
        if place in accepted:
            drawn.append((token or "").translate(_CONTROL), style="green" if entropy < 0.1 else "yellow")
        else:
            shade = "░▒▓"[min(int(entropy), 2)] if token is not None else "·"
            drawn.append(shade * max(1, len((token or "").strip())), style="dim")
    lines = drawn.wrap(Console(width=width), max(width - 1, 1))
    return Text("\n").join(lines[:MOST_LINES])


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of an event stream, up to [DONE]. Raises ChatError for an error event."""
    for line in lines:
        if not line.startswith("data:"):
            continue  # heartbeats and blank lines
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            raise ChatError(str(chunk["error"].get("message", chunk["error"])))
        yield chunk


def _refusal(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the server answered with status {status}"


def _account(closing: Closing) -> str:
    parts = ["(cut off: out of room)"] if closing.finish_reason == "length" else []
    facts = closing.facts
    for key, form in (
        ("canvases", "{} canvases"),
        ("steps", "{} steps"),
        ("tokens_per_forward", "{:.1f} tokens per forward"),
        ("tokens_per_second", "{:.0f} tokens/s"),
    ):
        if facts.get(key) is not None:
            parts.append(form.format(facts[key]))
    return " · ".join(parts)
