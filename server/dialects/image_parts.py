"""How the wire formats send an image: where its data is, checked as far as shapes go.

Knows the three forms, opens no image: `server.images` reads what is found here. Invariant: a part of an image type
without an image in it is refused by name.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

from server.schema import refuse


def url_of(value: Any) -> str:
    """The address in OpenAI's `image_url`, an object or the address itself. Raises inside a validator."""
    if isinstance(value, dict):  # {"url": ..., "detail": ...}; how closely to look is not up to the client here
        value = value.get("url")
    if not isinstance(value, str) or not value:
        raise PydanticCustomError("missing", "an image needs its image_url, a data: URL", {"field": "image_url"})
    return value


def data_of(source: Any) -> str:
    """The data or address in Anthropic's `source`. Raises inside a validator."""
    kind = source.get("type") if isinstance(source, dict) else None
    if kind not in ("base64", "url"):
        raise refuse("source", f"of an image must be of type base64, not {str(kind)[:40] if kind else 'none'}")
    data = source.get("data" if kind == "base64" else "url")
    if not isinstance(data, str) or not data:
        raise PydanticCustomError("missing", "an image's source needs its data", {"field": "source"})
    return data
