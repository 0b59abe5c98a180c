"""The whole server, from HTTP to the scripted engine and back."""

from __future__ import annotations

from tests.fakes import script


def test_first(serve):
    client = serve(script("<|channel>thought\nhm", "m\n<channel|>Hel", "lo<turn|>"))
    answer = client.chat()
    print(answer.text)
    print(client.chat(stream=True, stream_options={"include_usage": True}).text)
    assert answer.status_code == 200
