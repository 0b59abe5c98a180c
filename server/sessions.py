"""Which of several replicas a request should go to: the one that holds its response, or the beginning of its prompt.

Knows the bodies of the wire formats as far as a conversation can be told from them, and how replicas are ranked; no
network, no Ray. Nothing is remembered, so any number of doors agree. Invariant: the same conversation ranks the same
replicas the same way, whatever else is asked, until one of them is full; a replica that comes or goes moves no
conversation but its own.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers

SESSION_HEADER = "x-session-id"  # as in Ray's own routers
_TAGGED = re.compile(r"resp_([0-9A-Za-z]+)_")
_RESPONSE = re.compile(r"/v1/responses/([^/]+)")
_PROMPT_CHARACTERS = 256  # of a prompt without messages; what grows with every request comes behind them


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Where a request would like to go."""

    replica: str | None = None  # the one whose memory has what the request goes on from
    key: str | None = None  # equal for all turns of a conversation
    avoid: frozenset[str] = frozenset()  # replicas that have already turned the request away
    running: Mapping[str, int] = field(default_factory=dict)  # requests there that the asker knows of


def response_tag(replica: str) -> str:
    """What the ids of a replica's stored responses begin with, behind `resp_`."""
    return f"{replica}_"


def wish_of(path: str, headers: Headers, body: bytes) -> Wish:
    """What a request's path, headers and body say. A body that cannot be read has no wish: the replica refuses it."""
    if stored := _RESPONSE.fullmatch(path):
        return Wish(replica=_tag(stored[1]))
    document = _document(body)
    replica = _tag(document.get("previous_response_id"))
    for kind, said in (("session", headers.get(SESSION_HEADER)), ("cache", document.get("prompt_cache_key"))):
        if isinstance(said, str) and said:
            return Wish(replica=replica, key=f"{kind} {said}")
    opening = _opening(document)
    return Wish(replica=replica, key=None if opening is None else _digest(opening))


def rank(replicas: Sequence[str], wish: Wish, loads: Mapping[str, int], seats: int) -> list[str]:
    """The replicas to try, best first, where each has so many requests, as far as known, and serves `seats` at once.

    A key weighs every replica (rendezvous hashing). One that is full is passed over while another has a free seat, or
    a line shorter by a round of seats: to wait costs more than to read the prompt again.
    """
    if wish.replica is not None and wish.replica in replicas:
        return [wish.replica]
    load = {each: max(loads.get(each, 0), wish.running.get(each, 0)) for each in replicas}
    fit = [each for each in replicas if each not in wish.avoid] or list(replicas)
    if wish.key is None:
        return sorted(fit, key=lambda each: (load[each], random.random()))
    order = sorted(fit, key=lambda each: _digest([wish.key, each]), reverse=True)
    if order:
        first, least = load[order[0]], min(load[each] for each in fit)
        if first >= seats and (least < seats or first - least >= seats):
            order.sort(key=lambda each: load[each])
    return order


def _tag(response_id: object) -> str | None:
    tagged = _TAGGED.match(response_id) if isinstance(response_id, str) else None
    return tagged[1] if tagged else None


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _opening(document: Mapping[str, Any]) -> list[Any] | None:
    """What stays the same from turn to turn: the instructions, and everything to the end of the first question."""
    said = document.get("messages", document.get("input"))
    prompt = document.get("prompt", document.get("input_prefix"))
    if isinstance(said, list) and said:
        question = said[: _first_question(said) + 1]
    elif isinstance(said, str) and said:
        question = [said]
    elif isinstance(prompt, str) and prompt:
        question = [prompt[:_PROMPT_CHARACTERS]]
    else:
        return None
    return [document.get("system"), document.get("instructions"), *question]


def _first_question(messages: Sequence[Any]) -> int:
    for place, message in enumerate(messages):
        if not (isinstance(message, dict) and message.get("role") in ("system", "developer")):
            return place
    return len(messages)


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
