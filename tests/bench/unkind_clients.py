"""Clients that do what clients should not, over bare sockets. For `faults.py`.

Each returns a word for what became of it, so that they can be counted. Knows HTTP and one kind of body, no server.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections import Counter
from random import Random
from typing import Any

CHAT = "/v1/chat/completions"
STORY = {"messages": [{"role": "user", "content": "Write a story about Mia and a fox."}]}
SUM = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
PATIENCE = 30.0  # seconds after which a connection that should have ended counts as hanging
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: no goodbye


def request(body: Any, *, path: str = CHAT, headers: str = "") -> bytes:
    """A whole POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def vanishing(port: int, chance: Random) -> str:
    """Leaves at a random point: in head or body, while it waits, while text comes; with a goodbye or without."""
    body = {**(STORY if chance.random() < 0.7 else SUM), "stream": chance.random() < 0.6, "n": chance.choice((1, 1, 2))}
    whole = request(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    left = "in the request"
    try:
        sent = whole if chance.random() < 0.7 else whole[: chance.randint(0, len(whole) - 1)]
        writer.write(sent)
        await writer.drain()
        if sent is whole:
            left = "while it waited"
            try:
                async with asyncio.timeout(chance.choice((0.0, 0.02, 0.2, 1.0, 3.0))):
                    got = await reader.read(chance.randint(1, 200))
                    left = "while text came" if b" 200 " in got[:20] else "refused"
                    await reader.read(chance.randint(1, 5000))
            except TimeoutError:
                pass
        if chance.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    except ConnectionError:
        left = "refused"
    writer.transport.abort() if chance.random() < 0.5 else writer.close()
    return left


async def until_closed(reader: asyncio.StreamReader, *, slowly: float = 0.0) -> bytes:
    """Everything that comes. Raises TimeoutError if there is no end to it; `slowly`: seconds between two reads."""
    got = b""
    async with asyncio.timeout(PATIENCE * (4 if slowly else 1)):
        try:
            while part := await reader.read(4096 if slowly else 65536):
                got += part
                await asyncio.sleep(slowly)
        except ConnectionError:
            pass
    return got


def outcome(answer: bytes) -> str:
    """The status, or that there was none."""
    return answer[9:12].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"


async def half_open(port: int, sent: bytes) -> str:
    """Sends what is no whole request, then nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        return outcome(await until_closed(reader))
    except TimeoutError:
        return "hangs"
    finally:
        writer.transport.abort()


async def slow_writer(port: int, pause: float) -> str:
    """The body a byte at a time, with so many seconds between them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.ensure_future(until_closed(reader))
    head, _, body = request(SUM, headers="Connection: close\r\n").partition(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    for byte in body:
        if answer.done():
            break
        writer.write(bytes([byte]))
        await asyncio.sleep(pause)
    try:
        return outcome(await answer)
    except TimeoutError:
        return "hangs"
    finally:
        writer.transport.abort()


async def slow_reader(port: int, *, pause: float | None) -> str:
    """Asks for a lot and reads a little at a time; with `pause` None nothing at all."""
    choices = 8 if pause is None else 1  # 0.3 MB each: more than the system's buffers take
    asked = {**STORY, "stream": True, "n": choices, "logprobs": True, "top_logprobs": 20, "seed": 1}
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=own, limit=4096)
    writer.write(request(asked, headers="Connection: close\r\n"))
    try:
        if pause is None:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(PATIENCE / 2)
            return "read nothing"
        answer = await until_closed(reader, slowly=pause)
        return "whole" if b"data: [DONE]" in answer[-64:] else "cut"
    except TimeoutError:
        return "hangs"
    finally:
        writer.transport.abort()


async def pipelining(port: int) -> str:
    """Six requests at once, a chat among them; "in order" if the answers are."""
    names = ["a", "b", "c", "d"]
    lines = [f"GET /v1/models/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for name in names]
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(lines[:2]) + request(SUM) + b"".join(lines[2:]) + last)
    try:
        got = await until_closed(reader)
    except TimeoutError:
        return "hangs"
    finally:
        writer.transport.abort()
    signs = [b"'a'", b"'b'", b"chat.completion", b"'c'", b"'d'", b'"status":"ok"']
    places = [got.find(sign) for sign in signs]
    return "in order" if -1 not in places and places == sorted(places) else "out of order"


async def streaming(port: int, *, began: asyncio.Event | None = None, **fields: Any) -> tuple[str, float]:
    """Reads a stream to its end: whole, with an error event, refused, or cut; and when that was."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request({**STORY, "stream": True, **fields}, headers="Connection: close\r\n"))
    got = b""
    try:
        async with asyncio.timeout(PATIENCE * 2):
            while part := await reader.read(65536):
                got += part
                if began is not None and b'"content":"' in got.partition(b'"content":""')[2]:
                    began.set()  # its first canvas is there
    except ConnectionError:
        pass
    except TimeoutError:
        return "hangs", time.monotonic()
    finally:
        writer.transport.abort()
    ended = time.monotonic()
    if not got.startswith(b"HTTP/1.1 200"):
        return outcome(got), ended
    if b"data: [DONE]" not in got[-64:]:
        return "cut", ended
    return ("error event" if b'data: {"error"' in got else "whole"), ended


def mutated(chance: Random) -> bytes:
    """A whole request, some of whose bytes are others."""
    whole = bytearray(request({**SUM, "max_tokens": 1}, headers="Connection: close\r\n"))
    for _ in range(chance.choice((1, 1, 2, 5))):
        place, how = chance.randrange(len(whole)), chance.random()
        if how < 0.4:
            whole[place] = chance.randrange(256)
        elif how < 0.7:
            del whole[place]
        else:
            whole.insert(place, chance.choice(b'\r\n\x00{}[]":,\xff0'))
    return bytes(whole)


async def at_once(jobs: list[Any], most: int) -> Counter[str]:
    """Run them, so many at a time; how often each outcome."""
    places = asyncio.Semaphore(most)

    async def one(job: Any) -> str:
        async with places:
            return str(await job)

    return Counter(await asyncio.gather(*(one(job) for job in jobs)))
