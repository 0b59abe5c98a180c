"""Which replica a request goes to."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from starlette.datastructures import Headers

from server.sessions import Wish, rank, response_tag, wish_of

REPLICAS = ["a1", "b2", "c3"]
SYSTEM = {"role": "system", "content": "Be kind."}


def wish(path: str = "/v1/chat/completions", session: str | None = None, **body: Any) -> Wish:
    return wish_of(path, Headers({"x-session-id": session} if session else {}), json.dumps(body).encode())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def first(asked: Wish, loads: dict[str, int] | None = None, seats: int = 4) -> str:
    return rank(REPLICAS, asked, loads or {}, seats)[0]


def test_a_conversation_keeps_its_key_and_another_has_its_own() -> None:
    turns = [SYSTEM, user("Hi"), {"role": "assistant", "content": "Hello"}, user("And?")]
    assert wish(messages=turns[:2]).key == wish(messages=turns).key is not None
    assert wish(messages=[SYSTEM, user("Ho")]).key != wish(messages=turns).key
    assert wish(messages=[user("Hi")]).key != wish(messages=turns).key


@pytest.mark.parametrize(
    "bodies",
    [
        [{"system": "Be kind.", "messages": [user("Hi")]}, {"system": "Be kind.", "messages": [user("Hi"), user("A")]}],
        [{"input": [user("Hi")], "instructions": "x"}, {"input": [user("Hi"), user("A")], "instructions": "x"}],
        [{"input": "Hi"}, {"input": "Hi", "temperature": 0}],
        [{"prompt": "x" * 256}, {"prompt": "x" * 300}],
        [{"input_prefix": "x" * 256, "input_suffix": "a"}, {"input_prefix": "x" * 256 + "y", "input_suffix": "b"}],
        [{"prompt_cache_key": "k", "messages": [user("Hi")]}, {"prompt_cache_key": "k", "messages": [user("Ho")]}],
    ],
)
def test_what_belongs_together_has_one_key(bodies: list[dict[str, Any]]) -> None:
    first_key, second_key = (wish(**body).key for body in bodies)
    assert first_key == second_key is not None


def test_a_session_header_goes_before_what_the_body_says() -> None:
    assert wish(session="s", prompt_cache_key="k").key == wish(session="s", messages=[user("Hi")]).key
    assert wish(session="s").key != wish(session="t").key
    assert wish(session="k").key != wish(prompt_cache_key="k").key


def test_a_stored_response_is_looked_for_where_it_is() -> None:
    response_id = f"resp_{response_tag('b2')}0123456789ab"
    asked = [
        wish(path=f"/v1/responses/{response_id}"),
        wish(path="/v1/responses", previous_response_id=response_id, input="Hi"),
        wish(path="/v1/responses", session="s", previous_response_id=response_id),
    ]
    assert [rank(REPLICAS, each, {"b2": 99}, 4) for each in asked] == [["b2"]] * 3
    # What a replica kept is gone with it; any other says so.
    assert sorted(rank(["a1", "c3"], asked[0], {}, 4)) == ["a1", "c3"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"x"', b"[" * 100_000, b"\xff", b'{"messages": 3, "input": {}, "prompt": [1, 2]}'],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_says_nothing_is_no_error(body: bytes) -> None:
    assert wish_of("/v1/chat/completions", Headers({}), body) == Wish()


@pytest.mark.parametrize("odd", [{"messages": [None]}, {"messages": ["x", 3]}, {"prompt_cache_key": 3, "input": "a"}])
def test_odd_bodies_have_keys_too(odd: dict[str, Any]) -> None:
    assert wish(**odd).key is not None


def test_a_text_that_is_no_unicode_has_a_key() -> None:
    assert wish_of("/", Headers({}), b'{"input": "\\ud800"}').key is not None


def test_keys_are_spread_and_a_new_replica_takes_only_its_share() -> None:
    keys = [f"key {number}" for number in range(600)]
    before = {key: first(Wish(key=key)) for key in keys}
    assert all(150 < count < 250 for count in Counter(before.values()).values())
    after = {key: rank([*REPLICAS, "d4"], Wish(key=key), {}, 4)[0] for key in keys}
    moved = [key for key in keys if after[key] != before[key]]
    assert {after[key] for key in moved} == {"d4"}
    assert 100 < len(moved) < 200
    gone = {key: rank(["a1", "c3"], Wish(key=key), {}, 4)[0] for key in keys}
    assert all(gone[key] == before[key] for key in keys if before[key] != "b2")


def test_a_full_replica_is_passed_over_while_another_has_a_seat() -> None:
    asked = Wish(key="k")
    home, *others = rank(REPLICAS, asked, {}, 4)
    assert first(asked, {home: 3}) == home
    assert first(asked, {home: 4, others[0]: 1, others[1]: 2}) == others[0]
    assert first(asked, {home: 5, others[0]: 4, others[1]: 4}) == home
    assert first(asked, {home: 8, others[0]: 4, others[1]: 5}) == others[0]
    assert first(Wish(key="k", running={home: 4})) == others[0]


def test_without_a_key_the_idlest_is_taken_and_equals_are_taken_by_turns() -> None:
    assert first(Wish(), {"a1": 2, "b2": 1, "c3": 2}) == "b2"
    assert {first(Wish()) for _ in range(200)} == set(REPLICAS)


def test_who_has_turned_a_request_away_is_avoided_unless_there_is_nobody_else() -> None:
    home = first(Wish(key="k"))
    assert home not in rank(REPLICAS, Wish(key="k", avoid=frozenset([home])), {}, 4)
    assert sorted(rank(REPLICAS, Wish(key="k", avoid=frozenset(REPLICAS)), {}, 4)) == REPLICAS
    assert rank([], Wish(key="k"), {}, 4) == []
