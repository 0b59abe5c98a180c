"""Who may ask, how much, and for how long."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from server.access import Keys, Names
from server.address import AddressError, is_loopback
from server.app import AppSettings
from server.config import ServerSettings, SettingsError, load_settings
from server.errors import ApiError
from server.launch import _names, checked_keys
from tests.fakes import Script, script, wait_until

Serve = Callable[..., Any]
LONG = Script([[173]] * 10_000, steps=1, step_seconds=0.001)
CHAT = "/v1/chat/completions"


def told(**settings: Any) -> ServerSettings:
    return load_settings(settings).server


# Keys


def test_any_of_several_keys_opens(serve: Serve) -> None:
    client = serve(script("Hello"), settings=AppSettings(keys=Keys(["one", "two"])))
    for key, status in (("one", 200), ("two", 200), ("three", 401), ("onetwo", 401), ("", 401)):
        for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
            for path in ("/v1/models", "/stats", "/metrics"):
                assert client.request("GET", path, headers=headers).status_code == status
    for path in ("/health", "/ready", "/openapi.json"):
        assert client.request("GET", path).status_code == 200


def test_every_key_is_compared_whatever_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("server.access.hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    keys = Keys(["one", "two", "three"])
    for given in ("one", "three", "four", "a-much-longer-key-than-any"):
        compared.clear()
        try:
            keys.check(Headers({"authorization": f"Bearer {given}"}))
        except ApiError:
            assert given not in ("one", "three")
        assert len(compared) == 3
        assert {len(digest) for pair in compared for digest in pair} == {32}


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# ours\nalpha\n\n  beta  \n", encoding="utf-8")
    monkeypatch.setenv("EASEL_API_KEY", "gamma, delta")
    settings = load_settings({"api_key_file": file})
    assert settings.server.keys() == ("gamma", "delta", "alpha", "beta")
    assert not any(key in settings.as_line() + repr(settings) for key in ("gamma", "delta"))


def test_a_key_file_that_is_of_no_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the API keys"):
        told(api_key_file=tmp_path / "none").keys()
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="holds no API key"):
        told(api_key_file=empty).keys()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    assert checked_keys(told(host=host)) == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(SettingsError, match=r"EASEL_API_KEY or --api-key-file; or --insecure"):
        checked_keys(told(host=host))
    assert checked_keys(told(host=host, insecure=True)) == ()
    assert checked_keys(ServerSettings(host=host, api_key="k")) == ("k",)


def test_where_a_container_is_published_decides() -> None:
    assert checked_keys(told(host="0.0.0.0", published="http://127.0.0.1:8123")) == ()
    assert checked_keys(told(host="0.0.0.0", published="http://[::1]:8123")) == ()
    with pytest.raises(SettingsError, match=r"^http://0\.0\.0\.0:8123 lets other machines in"):
        checked_keys(told(host="127.0.0.1", published="http://0.0.0.0:8123"))
    with pytest.raises(SettingsError, match=r"^--published: "):
        load_settings({"published": "127.0.0.1:8000"})


def test_a_container_of_this_machine_alone_answers_to_known_names() -> None:
    names = _names(told(host="0.0.0.0", published="http://127.0.0.1:8123", allowed_host="easel"), ())
    assert names is not None
    for host in ("127.0.0.1:8123", "localhost:8123", "easel:8000"):
        names.check(Headers({"host": host}))
    with pytest.raises(ApiError):
        names.check(Headers({"host": "evil.example"}))


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(AddressError, match="no such address"):
        is_loopback("no.such.name.invalid")


# Names and origins

NAMES = Names(frozenset({"box"}), frozenset({"https://app.example"}))


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:8000", "a.localhost", "[::1]:8000", "192.0.2.1", "box:1", "box."]
)
def test_names_that_cannot_be_pointed_elsewhere(host: str) -> None:
    NAMES.check(Headers({"host": host}))
    NAMES.check(Headers({"host": host, "origin": f"http://{host}"}))
    NAMES.check(Headers({"host": host, "origin": "https://APP.example"}))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil", "[::1", "box@evil:1"]
)
def test_other_names_are_refused(host: str) -> None:
    with pytest.raises(ApiError, match="--allowed-host") as caught:
        NAMES.check(Headers({"host": host}))
    assert caught.value.status == 403


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1", "", "https://app.example.evil"],
)
def test_pages_from_elsewhere_are_refused(origin: str) -> None:
    with pytest.raises(ApiError, match="--cors-origin"):
        NAMES.check(Headers({"host": "127.0.0.1:8000", "origin": origin}))


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/models", "/stats", "/nothing"])
def test_a_rebound_name_gets_an_error_in_the_shape_that_was_spoken(serve: Serve, path: str) -> None:
    client = serve(script("Hello"), settings=AppSettings(names=Names(frozenset())))
    answer = client.request("POST", path, json={}, headers={"host": "evil.example"})
    assert answer.status_code == 403
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert "evil.example" in error["message"]
    assert error["type"] == "permission_error"
    assert client.engine.requests == []


# Pages of other origins


def preflight(client: Any, origin: str) -> Any:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    return client.request("OPTIONS", CHAT, headers=asked)


def test_cors_is_off_unless_named(serve: Serve) -> None:
    client = serve(script("Hello"))
    assert preflight(client, "https://app.example").status_code == 405
    answer = client.request("GET", "/v1/models", headers={"Origin": "https://app.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_named_origin_may_read(serve: Serve) -> None:
    client = serve(script("Hello"), settings=AppSettings(cors_origins=("https://app.example",), names=NAMES))
    headers = {"Origin": "https://app.example", "Host": "localhost"}
    allowed = preflight(client, "https://app.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert (
        client.request("GET", "/v1/models", headers=headers).headers["access-control-allow-origin"] == headers["Origin"]
    )
    assert preflight(client, "https://evil.example").status_code == 400


# Limits


def test_too_many_messages(serve: Serve) -> None:
    client = serve(script("Hello"), settings=AppSettings(max_messages=2))
    messages = [{"role": "user", "content": "Hi"}] * 3
    answer = client.request("POST", CHAT, json={"messages": messages})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_messages")
    assert client.request("POST", CHAT, json={"messages": messages[:2]}).status_code == 200


def test_an_answer_that_takes_too_long_is_a_504_and_stops(serve: Serve) -> None:
    client = serve(LONG, settings=AppSettings(request_seconds=0.05))
    answer = client.chat(max_tokens=4000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    assert answer.headers["x-should-retry"] == "false"
    wait_until(lambda: len(client.engine.cancelled) == 1)


def test_a_stream_that_takes_too_long_ends_with_an_error_and_stops(serve: Serve) -> None:
    client = serve(LONG, settings=AppSettings(request_seconds=0.05))
    answer = client.chat(stream=True, max_tokens=4000)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "request_timeout"
    wait_until(lambda: len(client.engine.cancelled) == 1)
    assert '"cancellations":1' in client.request("GET", "/stats").text


def test_a_body_that_does_not_arrive_is_a_408(serve: Serve) -> None:
    client = serve(script("Hello"), settings=AppSettings(body_seconds=0.02))

    async def slowly() -> Any:
        yield b'{"messages":'
        await asyncio.sleep(5)

    answer = client.request("POST", CHAT, content=slowly(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")


# The log


def test_nothing_that_was_said_is_logged_unless_asked(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for log_content in (False, True):
        for stream in (False, True):
            caplog.clear()
            client = serve(script("wonderful"), settings=AppSettings(log_content=log_content))
            client.chat("a-secret", stream=stream)
            client.request("POST", CHAT, json={"messages": "a-secret"})
            assert ("a-secret" in caplog.text) == log_content
            assert ("wonderful" in caplog.text) == log_content


def test_one_log_line_an_answer(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = serve(script("Hello"))
    client.request("POST", CHAT, json={}, headers={"x-request-id": "mine"})
    client.request("GET", "/v1/a%0ab")
    client.request("GET", "/health")
    lines = [record for record in caplog.records if record.name == "easel.access"]
    assert [(line.path, line.status) for line in lines] == [(CHAT, 400), ("/v1/a\nb", 404)]  # type: ignore[attr-defined]
    assert "mine" in lines[0].getMessage()
    assert "\n" not in lines[1].getMessage()
    counted = client.request("GET", "/metrics").text
    assert 'easel_http_requests_total{method="POST",route="/v1/chat/completions",status="400"} 1.0' in counted
    assert 'easel_http_requests_total{method="GET",route="other",status="404"} 1.0' in counted
