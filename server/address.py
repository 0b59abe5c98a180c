"""Claiming the address before anything slow happens: a port in use is said at once, not after the model is loaded.

Knows sockets and nothing else. Invariant: a socket handed out is bound, and nobody else can take its port; it does
not listen yet, so clients are refused until the model is ready.
"""

from __future__ import annotations

import errno
import ipaddress
import socket


class AddressError(Exception):
    """The address cannot be had. The message is one line and says what to do."""


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes any free one. Raises AddressError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise AddressError(f"no such address: {host}") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_the_dead(bound)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressError(f"port {port} is in use; choose another with --port {_another(port)}") from None
        if error.errno == errno.EACCES:
            raise AddressError(f"port {port} needs special rights; choose one from 1024 on, as --port 8000") from None
        raise AddressError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return bound


def url(bound: socket.socket) -> str:
    """The address a client on this machine uses; a wildcard is spelled as the loopback address."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. Raises AddressError for a name that does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise AddressError(f"no such address: {host}") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _notice_the_dead(listener: socket.socket) -> None:
    """Have the system end connections whose other side is gone or reads nothing; those accepted inherit this."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 60),
        ("TCP_KEEPINTVL", 15),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 120_000),  # milliseconds until what is sent must be taken
    ):
        if hasattr(socket, name):  # not every system has all of them
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _another(port: int) -> int:
    return port + 1 if port < 65535 else port - 1
