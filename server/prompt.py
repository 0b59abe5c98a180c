"""Messages to token ids and back: the only file that knows a tokenizer or a chat template.

Client text is data. Before the template runs, every punctuation character that control tokens are written with
(`<`, `|`, `>`) is swapped for a stand-in character the request does not use; what is left of these characters in
the rendered text was written by the template. Only there are control tokens recognised; then the stand-ins are
swapped back and the text between is tokenised with control tokens switched off. Rejected: cutting markers apart with
a zero-width character (changes the text), and swapping whole markers only (two client strings joined by the
template can form one).
Invariant: the ids decode to exactly what the template renders, and no id of a control token comes from a client.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer

from engine import ImagePatches
from server.call_memory import Written, with_written_calls
from server.detokenizer import Detokenizer, Marker, Spellings
from server.errors import invalid
from server.images import Patches, without_data

OpensIn = Literal["content", "channel", "reasoning"]

IMAGE_OPEN, IMAGE, IMAGE_CLOSE = "<|image>", "<|image|>", "<image|>"
CHANNEL_OPEN = "<|channel>"
CHANNEL_CLOSE = "<channel|>"
TURN_OPEN = "<|turn>"
BOS = "<bos>"

_MARKER_SHAPE = re.compile(r"<\|.+>|<.+\|>")  # Gemma's way of writing a control token
# Stand-ins must survive what templates do to text: printable (Python's repr would escape a private-use character),
# without case, no whitespace, never escaped in JSON. CJK extension B is 42,720 of them and almost never used.
_STAND_INS = range(0x20000, 0x2A6E0)
# Filters fail on odd values in many ways; all of them mean "this template cannot render these messages".
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


_SAID, _RESULT = "said-text", "result-text"
_PROBE: list[Mapping[str, Any]] = [
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "content": _SAID,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}],
    },
    {"role": "tool", "tool_call_id": "c", "name": "f", "content": _RESULT},
]


class ChatTemplate(Protocol):
    """What is needed of a transformers tokenizer: rendering a conversation to text."""

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any: ...


class PromptTooLong(Exception):
    """The prompt has more tokens than may be. How many exactly is not known: at least `tokens`."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"at least {tokens} tokens")
        self.tokens = tokens


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt. `opens_in`: what the first reply token belongs to ("channel": a label comes first)."""

    ids: tuple[int, ...]
    opens_in: OpensIn
    images: tuple[ImagePatches, ...] = ()


class ControlTokens:
    """The control tokens of one tokenizer, and how to find them in rendered text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids: dict[str, int] = {}
        guarded: set[str] = set()
        patterns = []
        for token_id, token in tokenizer.get_added_tokens_decoder().items():
            name = token.content
            if not (token.special or _MARKER_SHAPE.fullmatch(name)):
                continue
            # Quotes and backslashes are left alone: JSON and repr in a template treat them specially.
            punctuation = {char for char in name if not (char.isalnum() or char.isspace() or char in "_\"'\\")}
            if not punctuation:
                raise ValueError(f"control token {name!r} is spelled like a word: it cannot be told from client text")
            guarded |= punctuation
            self.ids[name] = token_id
            # Stripping belongs to the token: the tokenizer would swallow that whitespace too.
            before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
            patterns.append(f"{before}{re.escape(name)}{after}")
        self.names = {token_id: name for name, token_id in self.ids.items()}
        self.punctuation = "".join(sorted(guarded))
        self._pattern = re.compile("|".join(sorted(patterns, key=len, reverse=True)) or r"(?!)")

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Cut text into (piece, is it a control token); no piece is empty."""
        position = 0
        for match in self._pattern.finditer(text):
            if match.start() > position:
                yield text[position : match.start()], False
            yield match[0].strip(), True
            position = match.end()
        if position < len(text):
            yield text[position:], False


class PromptRenderer:
    """Tokenizer and chat template of one checkpoint. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, special_names: Iterable[str] = ()) -> None:
        # A copy of our own: the switch below must not leak into the tokenizer the template object owns.
        self._tokenizer = _without_truncation(tokenizer)
        self._tokenizer.encode_special_tokens = True  # control tokens in text are plain text
        self._template = template
        self.control = ControlTokens(tokenizer)
        self._spellings = Spellings(self._tokenizer, self.control.names)
        vocabulary = tokenizer.get_vocab()
        self._known_ids: int = 1 + max(vocabulary.values())
        self.longest: int = max(map(len, vocabulary))  # characters that one token can stand for
        parameters = inspect.signature(template.apply_chat_template).parameters
        self._reserved = frozenset(parameters) | frozenset(special_names) | {"messages"}
        self._text_apart = self._reads_text_before_calls()

    @classmethod
    def from_folder(cls, path: str | Path) -> PromptRenderer:
        """Load from a checkpoint folder or hub id. Raises ValueError or OSError naming what is missing."""
        from transformers import AutoTokenizer  # deferred: importing it takes seconds

        loaded: Any = AutoTokenizer.from_pretrained(str(path))
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"{path}: a fast tokenizer (tokenizer.json) is needed")
        if not loaded.chat_template:
            raise ValueError(f"{path}: no chat template (chat_template.jinja) beside the tokenizer")
        return cls(backend, loaded, loaded.special_tokens_map)

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Iterable[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        most: int | None = None,
        *,
        calls: Sequence[tuple[int, ...] | None] = (),
        images: Sequence[Patches] = (),
    ) -> Prompt:
        """Messages, tools and template options to ids. Raises ApiError (400) when the template cannot render them.

        `calls`: for each tool call in the messages, the ids that the model wrote between its markers, None = unknown.
        They stand for what the template makes of the call, if it puts every call between markers of its own.

        `most`: tokens that would be taken. PromptTooLong is raised where it is certain before tokenising that there
        are more; a few megabytes take seconds to tokenise.

        `images`: those of the messages, in order; each stands where the template puts the image token.
        """
        ids: list[int] = []
        pieces = list(self._rendered(messages, tools, options or {}))
        self._bound(sum(len(piece) for piece, _ in pieces), most, sum(image.tokens for image in images))
        if images and sum(piece == (IMAGE, True) for piece in pieces) != len(images):
            raise invalid("The model's chat template does not show every image of these messages", param="messages")
        left, placed = iter(images), list[ImagePatches]()
        for piece in with_written_calls(pieces, calls):
            if isinstance(piece, Written):
                ids += piece.ids
            elif piece == (IMAGE, True) and (image := next(left, None)) is not None:
                placed.append(ImagePatches(at=len(ids) + 1, **vars(image)))
                soft = [self.control.ids[IMAGE]] * image.tokens
                ids += [self.control.ids[IMAGE_OPEN], *soft, self.control.ids[IMAGE_CLOSE]]
            else:
                text, is_control = piece
                ids += [self.control.ids[text]] if is_control else self.encode(text)
        return Prompt(tuple(ids), self._opens_in(ids), tuple(placed))

    def text(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Iterable[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """What the template makes of messages, as text. Raises ApiError (400) as `render` does."""
        return "".join(piece for piece, _ in self._rendered(messages, tools, options or {}))

    def _rendered(
        self, messages: Iterable[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> Iterator[tuple[str, bool]]:
        """Pieces of the rendered prompt: text, or a control token the template wrote."""
        for name in options:
            if name in self._reserved:
                raise invalid(f"'{name}' cannot be set by a request", param=f"chat_template_kwargs.{name}")
        if self._text_apart:
            messages = _text_before_calls(messages)
        request = {"messages": without_data(messages), "tools": list(tools), "options": dict(options)}
        try:
            guard, restore = self._stand_ins(request)
            guarded = _map_strings(request, lambda text: text.translate(guard))
            text = self._template.apply_chat_template(
                guarded["messages"],
                tools=guarded["tools"] or None,
                tokenize=False,
                add_generation_prompt=True,
                **guarded["options"],
            )
        except _RENDER_ERRORS as error:
            raise invalid(
                f"The model's chat template cannot render these messages: {error}"[:500], param="messages"
            ) from error
        for piece, is_control in self.control.split(text):
            yield (piece, True) if is_control else (piece.translate(restore), False)

    def _bound(self, characters: int, most: int | None, more: int = 0) -> None:
        at_least = characters // self.longest + more
        if most is not None and at_least > most:
            raise PromptTooLong(at_least)

    def require_known(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError (400) if an id is outside the vocabulary."""
        if not all(0 <= token_id < self._known_ids for token_id in ids):
            raise invalid(f"Token ids must be from 0 to {self._known_ids - 1}", param=param)

    def raw(self, prompt: str | Sequence[int], most: int | None = None) -> Prompt:
        """A prompt that the client wrote whole: control tokens in its text count, and it begins with `<bos>`.

        Ids are taken as they are. Raises ApiError (400) for one outside the vocabulary, or a prompt of nothing, and
        PromptTooLong as `render` does.
        """
        if not isinstance(prompt, str):
            ids = tuple(prompt)
            self.require_known(ids, "prompt")
        else:
            self._bound(len(prompt), most)
            ids = tuple(self.encode_raw(prompt, begin=True))
        if not ids:
            raise invalid("The prompt is empty", param="prompt")
        return Prompt(ids, "content")

    def encode_raw(self, text: str, *, begin: bool) -> list[int]:
        """Tokenise text in which control tokens count. `begin`: put `<bos>` first where the text does not have it."""
        ids: list[int] = []
        for piece, is_control in self.control.split(text):
            ids += [self.control.ids[piece]] if is_control else self.encode(piece)
        first = self.control.ids.get(BOS)
        return [first, *ids] if begin and first is not None and ids[:1] != [first] else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, control tokens by their names. An unfinished character is the replacement character."""
        detokenizer = self.detokenizer()
        pieces = [piece for token_id in ids for piece in detokenizer.push(token_id)] + detokenizer.finish()
        return "".join(piece.name if isinstance(piece, Marker) else piece for piece in pieces)

    def spelling(self, token_id: int) -> tuple[str, bytes | None]:
        """A token as OpenAI's logprobs show it, and the bytes it spells: None for a control token.

        A token that is a part of a character is shown as an escape.
        """
        found = self._spellings[token_id]
        if found is None:
            return "", None
        if isinstance(found, Marker):
            return found.name, None
        if isinstance(found, int):
            return (chr(found) if found < 128 else f"\\x{found:02x}"), bytes([found])
        return found, found.encode()

    def encode(self, text: str) -> list[int]:
        """Tokenise plain text; whatever it contains, no id of a control token comes out."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self.control.names.keys().isdisjoint(ids):
            return ids
        # A tokenizer whose merges lead to a control token's text: keep its first character apart from the rest.
        pieces = []
        for piece, is_control in self.control.split(text):
            pieces += [piece[0], piece[1:]] if is_control else [piece]
        return [token for piece in pieces for token in self._tokenizer.encode(piece, add_special_tokens=False).ids]

    def vocabulary(self) -> dict[str, int]:
        """Ids by how their tokens are spelled."""
        names: dict[str, int] = self._tokenizer.get_vocab()
        return names

    def document(self) -> dict[str, Any]:
        """The tokenizer as JSON."""
        document: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return document

    def detokenizer(self) -> Detokenizer:
        """A fresh detokenizer for one reply."""
        return Detokenizer(self._spellings)

    def _stand_ins(self, request: Any) -> tuple[dict[int, str], dict[int, str]]:
        used: set[str] = set()

        def note(text: str) -> str:
            used.update(text)
            return text

        _map_strings(request, note)
        needed = [char for char in self.control.punctuation if char in used]
        free = (chr(code) for code in _STAND_INS if chr(code) not in used)
        chosen = list(zip(needed, free, strict=False))
        if len(chosen) < len(needed):
            raise invalid("The messages use every character of a whole script.", param="messages")
        return {ord(char): stand_in for char, stand_in in chosen}, {ord(stand_in): char for char, stand_in in chosen}

    def _reads_text_before_calls(self) -> bool:
        """True for a template that wants what was said before a call as a message of its own.

        Google's for Gemma 4 moves such text behind the call's result and closes the turn there, so that the model
        would go on outside of any turn; in its own message it stays in its place. Its first version closes the turn
        either way, and is left alone.
        """
        whole, apart = self._probe(_PROBE), self._probe(list(_text_before_calls(_PROBE)))
        moved = 0 <= whole.find(_RESULT) < whole.find(_SAID)
        return moved and re.search(f"{_SAID}(?!.*<turn\\|>.*{_RESULT}).*{_RESULT}", apart, re.DOTALL) is not None

    def _probe(self, messages: list[Mapping[str, Any]]) -> str:
        try:
            return str(self._template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except _RENDER_ERRORS:
            return ""

    def _opens_in(self, ids: list[int]) -> OpensIn:
        def last(name: str) -> int:
            token_id = self.control.ids.get(name)
            return len(ids) - 1 - ids[::-1].index(token_id) if token_id in ids else -1

        opened = last(CHANNEL_OPEN)
        if opened < 0 or opened < max(last(CHANNEL_CLOSE), last(TURN_OPEN)):
            return "content"
        return "channel" if opened == len(ids) - 1 else "reasoning"


def _text_before_calls(messages: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The messages with the text and thought of a turn in a message before the one with its calls."""
    for message in messages:
        if message.get("tool_calls") and message.get("content"):
            yield {key: value for key, value in message.items() if key != "tool_calls"}
            yield {"role": message["role"], "content": "", "tool_calls": message["tool_calls"]}
        else:
            yield message


def _without_truncation(tokenizer: Tokenizer) -> Tokenizer:
    copy: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string of a JSON value, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(each, change) for each in value]
    return value
