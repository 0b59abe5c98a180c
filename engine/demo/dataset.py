"""Endless training batches of the demo corpus.

Several examples share a row, so that little of a batch is padding and every batch has the same shape: a training step
is then compiled once and captured as one graph. Knows token ids and lengths, no model.

Invariant: an example longer than a row is left out, never cut; no position of an example sees another example.
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
CLEAN = 320  # tokens of a row's prompts and replies together
CANVASES = 4  # canvases of a row
WAITING = 256  # examples to choose from when a row is filled
Example = tuple[list[int], list[int]]  # ids of the prompt, ids of the reply


@dataclass(frozen=True)
class Batch:
    """B rows of L clean tokens and N canvases of C tokens. Examples are numbered within their row; -1 is padding.

    All parts are views of one tensor, `flat`: one copy moves a batch between processes or to a device.
    """

    flat: Tensor  # int32 [B, 3 L + N C + 3 N]
    clean: Tensor  # [B, L]: prompts and replies
    owner: Tensor  # [B, L]: the example that a clean token belongs to
    place: Tensor  # [B, L]: its position in that example
    canvas: Tensor  # [B, N, C]: the replies, filled with eos
    canvas_owner: Tensor  # [B, N]
    start: Tensor  # [B, N]: the canvas's first position in its example
    inside: Tensor  # [B, N]: tokens of the canvas that belong to the reply

    @classmethod
    def over(cls, flat: Tensor) -> Batch:
        """The batch that a flat tensor holds."""
        length = (flat.shape[1] - 3 * CLEAN - 3 * CANVASES) // CANVASES
        clean, owner, place, canvas, canvas_owner, start, inside = flat.split(
            [CLEAN, CLEAN, CLEAN, CANVASES * length, CANVASES, CANVASES, CANVASES], dim=1
        )
        canvas = canvas.unflatten(1, (CANVASES, length))
        return cls(flat, clean, owner, place, canvas, canvas_owner, start, inside)

    @classmethod
    def empty(cls, rows: int, canvas: int, device: torch.device | None = None) -> Batch:
        """A batch of padding, to be filled in place; `canvas`: tokens of a canvas."""
        width = 3 * CLEAN + CANVASES * canvas + 3 * CANVASES
        batch = cls.over(torch.zeros(rows, width, dtype=torch.int32, device=device))
        batch.owner.fill_(-1)
        batch.canvas_owner.fill_(-1)
        batch.canvas.fill_(EOS)
        return batch


def row_of(example: corpus.Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Token ids of prompt and reply."""
    return tokenizer.encode(render(example), add_special_tokens=False), tokenizer.encode(
        example.reply, add_special_tokens=False
    )


class Chats(IterableDataset[Tensor]):
    """Endless batches, flat; every worker draws its own examples."""

    def __init__(self, tokenizer: Path, rows: int, canvas: int, seed: int) -> None:
        """`rows` of a batch; `canvas`: tokens of a canvas."""
        self._tokenizer, self._rows, self._canvas, self._seed = tokenizer, rows, canvas, seed

    def __iter__(self) -> Iterator[Tensor]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker = info.id if info else 0
        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer)
        waiting: list[Example] = []
        count = 0
        while True:
            batch = Batch.empty(self._rows, self._canvas)
            for row in range(self._rows):
                while len(waiting) < WAITING:
                    waiting.append(row_of(corpus.example("train", f"{worker}.{count}", self._seed), tokenizer))
                    count += 1
                self._fill(batch, row, waiting)
            yield batch.flat

    def _fill(self, batch: Batch, row: int, waiting: list[Example]) -> None:
        """Move examples into a row: the one that has waited longest, then whatever fits beside it."""
        clean, canvases, number = 0, 0, 0
        left: list[Example] = []
        for index, (prompt, reply) in enumerate(waiting):
            length, needed = len(prompt) + len(reply), -(-len(reply) // self._canvas)
            if length > CLEAN or needed > CANVASES:
                continue  # longer than a row: left out
            if clean + length > CLEAN or canvases + needed > CANVASES:
                left.append((prompt, reply))
                continue
            self._put(batch, row, (number, clean, canvases), (prompt, reply))
            number, clean, canvases = number + 1, clean + length, canvases + needed
            if canvases == CANVASES:
                left += waiting[index + 1 :]
                break
        waiting[:] = left

    def _put(self, batch: Batch, row: int, at: tuple[int, int, int], example: Example) -> None:
        number, clean, canvases = at
        prompt, reply = example
        part = slice(clean, clean + len(prompt) + len(reply))
        batch.clean[row, part] = torch.tensor(prompt + reply, dtype=torch.int32)
        batch.owner[row, part] = number
        batch.place[row, part] = torch.arange(len(prompt) + len(reply), dtype=torch.int32)
        for first in range(0, len(reply), self._canvas):
            ids = reply[first : first + self._canvas]
            batch.canvas[row, canvases, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            batch.canvas_owner[row, canvases] = number
            batch.start[row, canvases] = len(prompt) + first
            batch.inside[row, canvases] = len(ids)
            canvases += 1
