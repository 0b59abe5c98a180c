"""What requests add to the logits: biases of single ids, and penalties for ids that have occurred.

Knows one row of the vocabulary for each slot and what its reply said so far; no passes, no schedule. Nothing is
allocated before somebody asks, since hardly anybody does.

Invariant: the ids that end a reply, and the one that fills a canvas behind its end, are never penalised: a reply must
be able to end however often others did.

Shapes: S slots, n canvases of a pass, C canvas, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from engine import sampler
from engine.config import GenerationDefaults
from engine.interface import Sampling

BAN = -100.0  # OpenAI's word for never


class Bias:
    """The biases of all slots."""

    def __init__(self, slots: int, vocab_size: int, schedule: GenerationDefaults, device: torch.device) -> None:
        self._sizes = slots, vocab_size
        self._exempt = torch.tensor(sorted(schedule.eos_ids | {schedule.pad_id}), device=device)
        self._exempt_ids = schedule.eos_ids | {schedule.pad_id}
        self._device = device
        self._added: Tensor | None = None  # float32 [S, V], nats
        self._seen = torch.zeros(0, 0, dtype=torch.bool)  # [S, V]: occurred in the reply before this canvas
        self._presence = self._frequency = torch.zeros(0)  # float32 [S]
        self._filled: set[int] = set()  # slots where some of it is not zero

    def set(self, slot: int, sampling: Sampling, said: Iterable[int]) -> None:
        """For a canvas that opens: the request's own bias, and what it costs to repeat the ids `said`."""
        if self._added is None:
            self._added = torch.zeros(self._sizes, device=self._device)
            self._seen = torch.zeros(self._sizes, dtype=torch.bool, device=self._device)
            self._presence, self._frequency = (torch.zeros(self._sizes[0], device=self._device) for _ in range(2))
        self.clear(slot)
        self._filled.add(slot)
        added: dict[int, float] = {}
        for token_id, value in sampling.logit_bias:
            added[token_id] = -torch.inf if value <= BAN else value
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = {token_id: times for token_id, times in Counter(said).items() if token_id not in self._exempt_ids}
            for token_id, times in counts.items():
                cost = sampling.presence_penalty + sampling.frequency_penalty * times
                added[token_id] = added.get(token_id, 0.0) - cost
            self._seen[slot, torch.tensor(list(counts), dtype=torch.int64, device=self._device)] = True
        ids = torch.tensor(list(added), dtype=torch.int64, device=self._device)
        self._added[slot, ids] = torch.tensor(list(added.values()), dtype=torch.float32, device=self._device)
        self._presence[slot], self._frequency[slot] = sampling.presence_penalty, sampling.frequency_penalty

    def relax(self, slot: int) -> None:
        """From now on nothing that the slot's canvas itself holds costs anything."""
        if self._added is not None:
            self._presence[slot] = self._frequency[slot] = 0

    def clear(self, slot: int) -> None:
        """For a canvas of a request that wants none."""
        if self._added is not None and slot in self._filled:
            self._filled.remove(slot)
            self._added[slot] = 0
            self._seen[slot] = False
            self._presence[slot] = self._frequency[slot] = 0

    def rows(self, active: Tensor) -> Tensor:
        """What is added to the softcapped logits of the canvases in the slots `active` int [n]: float32 [n, V]."""
        assert self._added is not None, "somebody asked"
        return self._added[active]

    def penalise(self, logits: Tensor, active: Tensor, ids: Tensor, accepted: Tensor, softcap: float) -> Tensor:
        """Logits [C, V] of one canvas less what it costs to repeat the accepted positions (bool [1, C]) of `ids`
        [1, C]; `active` has its slot. A copy."""
        penalties = sampler.Penalties(self._presence[active], self._frequency[active], self._seen[active])
        counts = sampler.counted(ids, accepted, self._exempt)
        return sampler.penalise_repeats(logits[None], ids, counts, penalties, softcap)[0]
