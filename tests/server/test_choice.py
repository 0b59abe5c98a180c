"""What a choice shows does not depend on how its ids were cut into canvases: a stretch of text is its tokens."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine import CanvasDone
from server.call_memory import CallMemory
from server.choice import Choice
from server.exchange import ChatTask, Delta
from server.prompt import Prompt, PromptRenderer
from tests.fakes import CONTROL, Template, byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPTS = PromptRenderer(TOKENIZER, Template())
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
MARKS = [CONTROL[name] for name in ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|turn>", '<|"|>')]
PIECES = ["thought\n", "call:f{}", "call:f{x:1}", "hello", "\n", " ", "漢字"]
IDS = st.lists(
    st.one_of(
        st.sampled_from(PIECES).map(lambda text: tuple(PROMPTS.encode(text))),
        st.sampled_from(MARKS).map(lambda token_id: (token_id,)),
        st.integers(0, TOKENIZER.get_vocab_size() + 3).map(lambda token_id: (token_id,)),
    ),
    max_size=14,
).map(lambda runs: [token_id for run in runs for token_id in run])


def shown(ids: list[int], cuts: list[int], opens_in: Any, tools: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a choice made of the ids, in canvases of these lengths."""
    task = ChatTask(tools=tools)
    choice = Choice(0, task, Prompt((1,), opens_in), PROMPTS, CallMemory())
    deltas: list[Delta | None] = []
    for index, length in enumerate([*cuts, len(ids)]):
        canvas, ids = ids[:length], ids[length:]
        deltas.append(choice.canvas(CanvasDone(request_id="r", index=index, token_ids=tuple(canvas), steps=1)))
    deltas.append(choice.end(complete=True))
    found = [delta for delta in deltas if delta is not None]
    return (
        "".join(delta.reasoning for delta in found),
        "".join(delta.content for delta in found),
        [(call.name, call.arguments) for delta in found for call in delta.tool_calls],
        choice.parser.reasoning_tokens,
    )


@settings(deadline=None, max_examples=400)
@given(
    IDS, st.lists(st.integers(1, 5), max_size=6), st.sampled_from(["content", "channel", "reasoning"]), st.booleans()
)
def test_one_by_one_is_the_same_as_a_canvas_at_once(ids: list[int], cuts: list[int], opens_in: str, tool: bool) -> None:
    tools = (TOOL,) if tool else ()
    assert shown(ids, cuts, opens_in, tools) == shown(ids, [1] * len(ids), opens_in, tools)
