"""Endless training batches of the demo corpus.

Three kinds of rows, so that little of a batch is padding: tiny and short (a reply of one canvas) and long (of several).
Knows token ids and lengths, no model.

Invariant: an example longer than every kind of row is left out, never cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.demo import corpus
from engine.demo.tokenizer import render

EOS = 1
Row = tuple[list[int], list[int]]  # ids of the prompt, ids of the reply


@dataclass(frozen=True)
class RowKind:
    """How long a row may be: `clean` tokens of prompt and reply together, the reply in `canvases` canvases."""

    clean: int
    canvases: int


KINDS = {
    "tiny": RowKind(clean=80, canvases=1),
    "short": RowKind(clean=224, canvases=1),
    "long": RowKind(clean=320, canvases=4),
}


@dataclass(frozen=True)
class Batch:
    """Rows of one kind, B of them, N canvases of C tokens each."""

    clean: Tensor  # int64 [B, L]: prompt and reply, then zeros
    canvas: Tensor  # int64 [B, N, C]: the reply, filled with eos
    prompt: Tensor  # int64 [B]: tokens of the prompt
    reply: Tensor  # int64 [B]: tokens of the reply

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; the copy does not wait."""
        parts = (part.to(device, non_blocking=True) for part in (self.clean, self.canvas, self.prompt, self.reply))
        return Batch(*parts)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the data loader."""
        parts = (part.pin_memory() for part in (self.clean, self.canvas, self.prompt, self.reply))
        return Batch(*parts)


def row_of(example: corpus.Example, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Ids of an example's prompt and reply."""
    prompt = tokenizer.encode(render(example), add_special_tokens=False)
    return prompt, tokenizer.encode(example.reply, add_special_tokens=False)


class Chats(IterableDataset[dict[str, Batch]]):
    """Endless batches, one of each kind at a time; every worker draws its own examples."""

    def __init__(self, tokenizer: Path, sizes: dict[str, int], canvas: int, seed: int) -> None:
        """`sizes`: rows of each kind in a batch; `canvas`: tokens of a canvas."""
        self._tokenizer, self._sizes, self._canvas, self._seed = tokenizer, sizes, canvas, seed

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker = info.id if info else 0
        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer)
        waiting: dict[str, list[Row]] = {kind: [] for kind in self._sizes}
        count = 0
        while True:
            while any(len(waiting[kind]) < size for kind, size in self._sizes.items()):
                row = row_of(corpus.example("train", f"{worker}.{count}", self._seed), tokenizer)
                count += 1
                if kind := self._kind_of(row):
                    waiting[kind].append(row)
            batch = {}
            for kind, size in self._sizes.items():
                batch[kind] = self._pack(waiting[kind][:size], KINDS[kind])
                waiting[kind] = waiting[kind][size:][-4 * size :]  # what piles up in the commoner kind is dropped
            yield batch

    def _kind_of(self, row: Row) -> str | None:
        """The shortest kind that holds the row."""
        prompt, reply = row
        for kind, size in KINDS.items():
            if len(prompt) + len(reply) <= size.clean and len(reply) <= size.canvases * self._canvas:
                return kind
        return None

    def _pack(self, rows: list[Row], kind: RowKind) -> Batch:
        clean = torch.zeros(len(rows), kind.clean, dtype=torch.long)
        canvas = torch.full((len(rows), kind.canvases * self._canvas), EOS)
        for index, (prompt, reply) in enumerate(rows):
            clean[index, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
            canvas[index, : len(reply)] = torch.tensor(reply)
        return Batch(
            clean=clean,
            canvas=canvas.view(len(rows), kind.canvases, self._canvas),
            prompt=torch.tensor([len(prompt) for prompt, _ in rows]),
            reply=torch.tensor([len(reply) for _, reply in rows]),
        )
