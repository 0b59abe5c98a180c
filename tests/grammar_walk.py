"""Random ways through a constraint: what a model without any sense could be made to say.

Knows the engine's constraint and nothing of grammars. Invariant: every id is one that `allowed` allows, and the walk
checks at every step that `advance` agrees.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from engine import Constraint


def walk(constraint: Constraint, rng: random.Random, *, closers: Collection[int], most: int = 500) -> list[int] | None:
    """Ids of a whole reply, its eos id left out; None if it did not end. `closers` are taken more often than others."""
    ids: list[int] = []
    while len(ids) < most:
        forced = constraint.forced()
        if forced:
            assert constraint.advance(forced) == len(forced)
            ids += forced
            continue
        mask = constraint.allowed()
        allowed = [token_id for token_id in range(len(mask) * 8) if mask[token_id // 8] >> token_id % 8 & 1]
        assert set(constraint.ends()) <= set(allowed)
        if constraint.ends() and (constraint.must_end or rng.random() < 0.5):
            return ids
        choices = [token_id for token_id in allowed if token_id not in constraint.ends()]
        near = [token_id for token_id in choices if token_id in closers]
        if not choices:
            return ids
        chosen = rng.choice(near) if near and rng.random() < 0.6 else rng.choice(choices)
        assert constraint.advance([chosen]) == 1
        ids.append(chosen)
    return None
