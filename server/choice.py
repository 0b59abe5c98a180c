"""Text side of one choice of a reply: ids to deltas, and why it ended.

Joins detokenizer, parser, stop strings, likelihoods and call memory for one choice. Knows the engine's events and the
internal stream, no asyncio and no wire format. Invariant: what is shown is never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine import CanvasDone, Finished
from server import errors, tool_schema
from server.call_memory import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, CallMemory, CallSpans
from server.detokenizer import Marker
from server.exchange import ChatTask, Delta, FinishReason, ToolCall
from server.grammar import held, needs_grammar
from server.likelihoods import Likelihoods
from server.output_parser import OutputParser, Parsed, StopStrings
from server.prompt import Prompt, PromptRenderer
from server.tool_calls import new_call_id


class Choice:
    """One choice, from its first canvas to its end."""

    def __init__(self, index: int, task: ChatTask, prompt: Prompt, prompts: PromptRenderer, memory: CallMemory) -> None:
        self.index = index
        self._detokenizer = prompts.detokenizer()
        self.parser = OutputParser(
            prompt.opens_in, tools=_read_by(task), raw=bool(task.prompts), exact=needs_grammar(task)
        )
        self.echo = _written(task, index, prompts) if task.echo else ""
        self._stop = StopStrings(task.stop)
        self._most_calls = None if task.parallel_tool_calls else 1
        self._calls = 0
        self._likelihoods = None if task.logprobs is None else Likelihoods(prompts)
        self._memory = memory
        self._spans = CallSpans(*(prompts.control.ids.get(marker) for marker in (TOOL_CALL_OPEN, TOOL_CALL_CLOSE)))

    @property
    def satisfied(self) -> bool:
        """True when nothing the engine may still produce would be shown."""
        return self._stop.hit or self.parser.ended or self._calls == self._most_calls

    def canvas(self, done: CanvasDone) -> Delta | None:
        """What a canvas adds; None when all of it is held back."""
        if self.satisfied:
            return None
        if self._likelihoods is None:
            self._push_all(done.token_ids)
            return self._delta(self.parser.take())
        whole = Parsed()
        for token_id, found in zip(done.token_ids, done.logprobs, strict=True):
            pieces = self._detokenizer.push(token_id)
            self._likelihoods.push(token_id, found, pieces)
            self._push(token_id, pieces)
            part = self.parser.take()
            self._likelihoods.parsed(len(part.content))
            whole = whole + part
        return self._delta(whole)

    def _push_all(self, token_ids: Sequence[int]) -> None:
        """As `_push` one by one. Nearly all tokens are text, and a stretch of text goes through in one piece."""
        place = 0
        while place < len(token_ids):
            if texts := self._detokenizer.texts(token_ids, place):
                self.parser.push_texts(texts)
                self._spans.push_texts(token_ids[place : place + len(texts)])
                place += len(texts)
            else:
                self._push(token_ids[place], self._detokenizer.push(token_ids[place]))
                place += 1

    def _push(self, token_id: int, pieces: Sequence[str | Marker]) -> None:
        self.parser.push(pieces)
        self._spans.push(token_id, self.parser.calls)

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, if one was."""
        return self._stop.matched

    def end(self, *, complete: bool) -> Delta | None:
        """What was held back until now. `complete`: the model ended the reply, it was not cut."""
        if self._stop.hit:
            return None
        if self._calls == self._most_calls:
            return self._delta(Parsed(), last=True)
        pieces = self._detokenizer.finish()
        self.parser.push(pieces)
        parsed = self.parser.finish(complete=complete)
        if self._likelihoods is not None:
            self._likelihoods.finish(pieces)
            self._likelihoods.parsed(len(parsed.content))
        return self._delta(parsed, last=True)

    def finish_reason(self, finished: Finished) -> FinishReason:
        """The one place where the reason is decided. Raises ApiError when the engine gave up."""
        if finished.reason == "error":
            raise errors.generation_failed(f"Generation failed: {finished.error or 'unknown cause'}")
        if finished.reason == "cancelled" and not self.satisfied:
            raise errors.unavailable("The server is shutting down")
        # A cut call must stay visible as "length", also when an earlier call is complete.
        if finished.reason == "length" and not self.satisfied:
            return "length"
        return "tool_calls" if self._calls else "stop"

    def _delta(self, parsed: Parsed, *, last: bool = False) -> Delta | None:
        content = self._stop.push(parsed.content)
        if last:
            content += self._stop.finish()
        calls = parsed.calls if self._most_calls is None else parsed.calls[: self._most_calls - self._calls]
        numbered = tuple(
            ToolCall(id=new_call_id(), index=self._calls + offset, name=call.name, arguments=call.arguments)
            for offset, call in enumerate(calls)
        )
        for call in numbered:
            if (written := self._spans.found.get(call.index)) is not None:
                self._memory.remember(call.id, call.name, call.arguments, written)
        self._calls += len(numbered)
        if not (parsed.reasoning or content or numbered):
            return None
        return Delta(
            choice=self.index,
            reasoning=parsed.reasoning,
            content=content,
            tool_calls=numbered,
            logprobs=() if self._likelihoods is None else self._likelihoods.take(len(content)),
        )


def _read_by(task: ChatTask) -> dict[str, tool_schema.Json] | None:
    """The schemas to read calls by. What is held to its schema says exactly what it means: nothing is to be guessed."""
    if not task.tools:
        return None
    declared = tool_schema.parameters(task.tools)
    if not needs_grammar(task):
        return declared
    functions = [tool["function"] for tool in task.tools]
    return {each["name"]: {} if held(task, each) else declared[each["name"]] for each in functions}


def _written(task: ChatTask, index: int, prompts: PromptRenderer) -> str:
    """The prompt of a choice as its client wrote it."""
    prompt = task.prompts[index // task.choices]
    return prompt if isinstance(prompt, str) else prompts.decode(prompt)
