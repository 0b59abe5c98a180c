"""instructor, in the modes that hold the model to a schema, and in the one that needs no guarantee."""

from __future__ import annotations

from typing import Any

import pytest

instructor = pytest.importorskip("instructor")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")


class Weather(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    """What is wanted."""

    city: str
    degrees: int


@pytest.fixture(params=["MD_JSON", "TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA"])
def client(request: pytest.FixtureRequest, address: str) -> Any:
    inner = openai.OpenAI(base_url=address, api_key="key", max_retries=0)
    return instructor.from_openai(inner, mode=instructor.Mode[request.param])


def test_an_object(client: Any) -> None:
    answer = client.chat.completions.create(
        model="easel-demo",
        response_model=Weather,
        max_retries=0,
        messages=[{"role": "user", "content": "Weather in Paris as json"}],
    )
    assert (answer.city, answer.degrees) == ("Paris", 21)


def test_a_partial_object(client: Any) -> None:
    parts = list(
        client.chat.completions.create_partial(
            model="easel-demo",
            response_model=Weather,
            max_retries=0,
            messages=[{"role": "user", "content": "Weather in Paris as json"}],
        )
    )
    assert (parts[-1].city, parts[-1].degrees) == ("Paris", 21)
    if not client.mode.name.startswith("TOOLS"):  # a call arrives whole
        assert parts[0].degrees is None
