"""`/tokenize`, `/detokenize` and `/apply-template`, in the forms of vLLM and of llama.cpp alike.

vLLM sends `prompt` (or `messages`) and reads `tokens` and `count`; llama.cpp sends `content` and reads `tokens`, with
`with_pieces` as objects. Nothing is generated here. Knows these three documents, no tokenizer.
Invariant: the ids of a text are those a completion would be given for it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server import tool_schema
from server.chat import ChatService
from server.dialects.chat_schema import Message, Tool
from server.dialects.openai_chat import template_messages, template_options
from server.errors import unknown_model
from server.exchange import ChatTask
from server.schema import parse

Json = dict[str, Any]


class _Conversation(BaseModel):
    """What a chat request says about its prompt; every other field of one is accepted and has no effect here."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    model: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    tool_choice: Any = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def task(self, service: ChatService) -> ChatTask:
        """As a chat would put it to the engine. Raises ApiError for an unknown model or a senseless option."""
        if self.model is not None and self.model not in service.model_names:
            raise unknown_model(self.model, service.model_names)
        tools = () if self.tool_choice == "none" else self.tools or ()
        return ChatTask(
            messages=template_messages(self.messages or ()),
            tools=tuple(tool.model_dump(exclude_unset=True) for tool in tools),
            template_options=template_options(self.reasoning_effort, self.chat_template_kwargs),
        )


class TokenizeRequest(_Conversation):
    """The body of `POST /tokenize`: one of `prompt`, `content` or `messages`."""

    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool = True  # vLLM's: begin with <bos>
    add_special: bool = False  # llama.cpp's, of `content`
    parse_special: bool = True  # llama.cpp's: control tokens in the text count
    return_token_strs: bool | None = None
    with_pieces: bool = False

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizeRequest:
        if sum(each is not None for each in (self.prompt, self.content, self.messages)) != 1:
            raise PydanticCustomError("invalid_value", "needs one of 'prompt', 'content' and 'messages'")
        return self


class DetokenizeRequest(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    tokens: list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]]


class ApplyTemplateRequest(_Conversation):
    """The body of `POST /apply-template`."""

    messages: list[Message] = Field(min_length=1)


def tokenize(service: ChatService, document: bytes) -> Json:
    """Ids of a text or of a rendered conversation. Raises ApiError (400)."""
    request = parse(TokenizeRequest, document)
    task = request.task(service)
    prompts = service.prompts
    if request.messages is not None:
        ids = list(service.render(task)[0].ids)
    elif request.content is not None and not request.parse_special:
        ids = prompts.encode(request.content)
    elif request.content is not None:
        ids = prompts.encode_raw(request.content, begin=request.add_special)
    else:
        ids = prompts.encode_raw(request.prompt or "", begin=request.add_special_tokens)
    pieces = (
        [prompts.decode([token_id]) for token_id in ids] if request.with_pieces or request.return_token_strs else []
    )
    with_pieces = [{"id": token_id, "piece": piece} for token_id, piece in zip(ids, pieces, strict=False)]
    return {
        "tokens": with_pieces if request.with_pieces else ids,
        "count": len(ids),
        "max_model_len": service.bridge.info.context_length,
        "token_strs": pieces if request.return_token_strs else None,
    }


def detokenize(service: ChatService, document: bytes) -> Json:
    """The text of ids, control tokens by name. Raises ApiError (400)."""
    ids = parse(DetokenizeRequest, document).tokens
    service.prompts.require_known(ids, "tokens")
    text = service.prompts.decode(ids)
    return {"prompt": text, "content": text}


def apply_template(service: ChatService, document: bytes) -> Json:
    """The prompt a chat would be given, as text. Raises ApiError (400)."""
    task = parse(ApplyTemplateRequest, document).task(service)
    service.read_images(task)
    return {"prompt": service.prompts.text(task.messages, tool_schema.for_template(task.tools), task.template_options)}
