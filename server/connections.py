"""One HTTP connection, as uvicorn and h11 handle it, with three things of our own.

A request that is no HTTP gets the error body every other fault gets; a client that never finishes a request's head is
cut off, for uvicorn's keep-alive limit ends when the first byte arrives; and there are no more connections than file
descriptors: asyncio writes megabytes of log a second where it cannot accept one. Knows no routes. Invariant: a
connection that asks nothing ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError, connections_full, invalid

HEAD_SECONDS = 30.0  # from the first byte, or the connection, until a request's head is whole
HEAD_BYTES = 65536  # of a request's head
BACKLOG = 512  # connections that the system keeps until they are accepted, and that are accepted in one go
MOST = 4096  # connections at a time
_SPARE_FILES = 256  # descriptors for everything else
_FEWEST = 32  # connections, however few files there are


class Connection(H11Protocol):
    """uvicorn's connection with a limit on the time a request's head takes."""

    head_seconds = HEAD_SECONDS
    most = MOST
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(connections_full(self.most), b"Service Unavailable")
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP."""
        error = invalid(f"{msg} Perhaps its head is longer than {HEAD_BYTES} bytes.", code="invalid_http")
        self._refuse(error, b"Bad Request")

    def _refuse(self, error: ApiError, reason: bytes) -> None:
        """An answer without a request, and the end of the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # what went before is being answered
            self.transport.close()
            return
        body = json.dumps(error.body()).encode()
        headers = [
            *error.headers.items(),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
            ("x-request-id", f"req_{uuid.uuid4().hex}"),
        ]
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            if output := self.conn.send(event):
                self.transport.write(output)
        self.transport.close()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


def bounded() -> type[Connection]:
    """Connections of which there are never more than this process may have files. Takes what the system allows."""
    if sys.platform == "win32":  # it has no such limit
        return Connection
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + BACKLOG + _SPARE_FILES
    if 0 <= soft < wanted:  # below 0: no limit
        soft = wanted if hard < 0 else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    most = MOST if soft < 0 else max(_FEWEST, min(MOST, soft - BACKLOG - _SPARE_FILES))
    return type("BoundedConnection", (Connection,), {"most": most})
