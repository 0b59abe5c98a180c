"""Who may ask: API keys, and which names a browser may have reached us by.

Knows headers and settings, no routes. Invariants: how long a key takes to be refused tells nothing about any key;
without keys, a web page from elsewhere cannot have a browser on this machine ask for it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.errors import ApiError


class Keys:
    """The API keys; without any, everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests have one length, so that the time taken tells nothing about a key's.
        self._digests = [_digest(key) for key in keys]

    def check(self, headers: Headers) -> None:
        """Raise ApiError (401) unless one of the keys was sent."""
        if not self._digests:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")  # Anthropic's clients
        actual, found = _digest(given.strip()), False
        for expected in self._digests:  # all of them, whichever fits
            found |= hmac.compare_digest(expected, actual)
        if not found:
            message = "Incorrect or missing API key. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


@dataclass(frozen=True)
class Names:
    """The names that keyless clients may call this server by, and the origins of pages that may use it.

    A page whose name was pointed at this machine afterwards (DNS rebinding) sends its own name as Host, and any page
    sends its own origin. Addresses and localhost cannot be pointed elsewhere.
    """

    hosts: frozenset[str]
    origins: frozenset[str] = frozenset()

    def check(self, headers: Headers) -> None:
        """Raise ApiError (403) for a name or an origin that is not known."""
        host = headers.get("host", "")
        if not self._known(_hostname(host)):
            raise _forbidden(
                f"This server does not answer to the name '{host[:100]}'. Use its address, or start it with "
                f"--allowed-host {_hostname(host)[:100] or 'NAME'}, or with an API key."
            )
        origin = headers.get("origin")
        if origin is None or "*" in self.origins or origin.rstrip("/").lower() in self.origins:
            return
        if origin.partition("://")[2].lower() != host.lower():
            raise _forbidden(
                f"Pages from '{origin[:100]}' may not use this server. To let them, start it with "
                f"--cors-origin {origin[:100]}, or with an API key."
            )

    def _known(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost") or name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _hostname(host: str) -> str:
    """The name in a Host header, without its port; "" if there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="forbidden", headers={"x-should-retry": "false"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
