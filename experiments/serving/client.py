"""A small client: many requests at once, of several addresses, in one thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

HOST = "127.0.0.1"


class Answer(NamedTuple):
    """What came back.

    Attributes:
        status: of HTTP; 0 where the connection ended without an answer.
        headers: names in small letters.
        content: the body.
        seconds: from the first byte sent to the last received.
    """

    status: int
    headers: dict[str, str]
    content: bytes
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        """The body as JSON."""
        return json.loads(self.content)


async def ask(
    port: int,
    method: str,
    path: str,
    body: Mapping[str, Any] | bytes | None = None,
    *,
    address: str = HOST,
    headers: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> Answer:
    """One request on a connection of its own.

    Args:
        port: of the server, on this machine.
        method, path: of the request.
        body: a JSON object, or bytes as they are.
        address: of the client, 127.0.0.1 to 127.255.255.254 (on Linux): each is a client of its own.
        headers: in addition to those that a body needs.
        timeout: seconds.
    """
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": HOST, "Connection": "close", "Content-Length": str(len(content))}
    lines |= {"Content-Type": "application/json"} | dict(headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    start = time.perf_counter()
    raw = f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1", "replace") + content
    received = await exchange(port, raw, address=address, timeout=timeout)
    return parsed(received, time.perf_counter() - start)


async def exchange(
    port: int, raw: bytes, *, address: str = HOST, pause: float = 0.0, timeout: float = 600.0
) -> bytes:
    """Sends bytes as they are and returns what comes back until the end.

    Args:
        pause: seconds between two halves.
    """
    received = b""
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(HOST, port, local_addr=(address, 0))
        try:
            with contextlib.suppress(ConnectionError):
                half = len(raw) // 2 if pause else len(raw)
                writer.write(raw[:half])
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)
                    writer.write(raw[half:])
                    await writer.drain()
            with contextlib.suppress(ConnectionError):
                while chunk := await reader.read(2**16):
                    received += chunk
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
    return received


def parsed(received: bytes, seconds: float) -> Answer:
    """An answer of HTTP/1.1, of a connection that was closed behind it."""
    head, _, content = received.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 1"):  # only on the way to the answer
        return parsed(content, seconds)
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        content = unchunked(content)
    return Answer(status, headers, content, seconds)


def unchunked(content: bytes) -> bytes:
    """The chunks of a body, joined.

    >>> unchunked(b"3\\r\\nabc\\r\\n1\\r\\nd\\r\\n0\\r\\n\\r\\n")
    b'abcd'
    """
    joined = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size or b"0", 16)
        joined, content = joined + content[:length], content[length + 2 :]
    return joined


async def events(port: int, body: Mapping[str, Any]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The events of a request with "stream": true as they come; leaving the loop closes the connection."""
    content = json.dumps(body).encode()
    lines = f"Host: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(f"POST /generate HTTP/1.1\r\n{lines}".encode() + content)
        await reader.readuntil(b"\r\n\r\n")
        while size := int(await reader.readline(), 16):
            chunk = (await reader.readexactly(size + 2)).decode()
            if chunk.startswith("event: "):
                name, _, data = chunk.strip().removeprefix("event: ").partition("\ndata: ")
                yield name, json.loads(data)
    finally:
        writer.close()


async def metrics(port: int) -> dict[str, float]:
    """The figures of GET /metrics by name; those with labels have them in the name."""
    answer = await ask(port, "GET", "/metrics")
    lines = (line.rsplit(" ", 1) for line in answer.content.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed; NaN of none.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([1.0, 2.0], 0.99)
    (2.0, 2.0)
    """
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * share // 1) - 1, 0).__int__()]
