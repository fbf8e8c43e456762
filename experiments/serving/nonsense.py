"""Requests that nobody should send: of wrong types, cut off, slow, huge, and of no HTTP at all."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from typing import Any

from experiments.serving.client import HOST, ask, exchange, parsed

AT_ONCE = 16
PATHS = ("/generate", "/v1/images/generations")
METHODS = ("GET", "PUT", "PATCH", "OPTIONS", "TRACE", "BREW", "")
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**31, 2**64, -(10**30), 1e308, 1e-320, "", "x", "\u0000", "\U0001f600" * 50),
    *("../../etc/passwd", "http://localhost/", "%s%n", "a" * 20_000, [], [[]], [None], [1, "x", {}], {}),
    *({"a": {"b": 1}}, [0] * 1000, {"$ref": "#"}),
)
NOT_JSON = (
    b"",
    b"{",
    b"[1]",
    b'"x"',
    b"\xff\xfe\x00",
    b'{"seed": NaN}',
    b'{"seed": Infinity}',
    b"[" * 50_000,
)
NOT_JSON += (b'{"prompt": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b"}", b"<xml/>", b"\x00" * 100)


async def nonsense(port: int, number: int) -> tuple[dict[int, int], float]:
    """Sends so many: (how many answers of each status, seconds of the slowest)."""
    document = (await ask(port, "GET", "/openapi.json")).facts
    statuses: collections.Counter[int] = collections.Counter()
    numbers, longest = iter(range(number)), 0.0

    async def sender() -> None:
        nonlocal longest
        for n in numbers:
            start = time.perf_counter()
            statuses[await one(port, random.Random(n), document)] += 1
            longest = max(longest, time.perf_counter() - start)

    await asyncio.gather(*(sender() for _ in range(AT_ONCE)))
    return dict(statuses), longest


async def one(port: int, rng: random.Random, document: dict[str, Any]) -> int:
    """Sends one, and returns its status; 0 where there is none."""
    path = rng.choice(PATHS)
    kind = rng.choice(("values", "values", "values", "not json", "cut off", "slow", "head", "raw", "place"))
    if kind == "values":
        return (await ask(port, "POST", path, wrong_values(rng, document, path))).status
    if kind == "not json":
        headers = rng.choice(({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}))
        return (await ask(port, "POST", path, rng.choice(NOT_JSON), headers=headers)).status
    if kind == "cut off":
        return await cut_off(port, path)
    if kind == "slow":
        content = b'{"class_labels": "x"}'
        raw = head("POST", path, len(content)) + content
        return parsed(await exchange(port, raw, pause=rng.uniform(0.01, 0.5)), 0).status
    if kind == "head":
        headers = {"X-" + "a" * rng.randrange(1, 100): "b" * rng.choice((10, 1000, 100_000))}
        headers |= {"Authorization": "\x7f" * 10, "Cookie": "=" * rng.randrange(1000)}
        return (await ask(port, "POST", path, {"class_labels": "x"}, headers=headers)).status
    if kind == "raw":
        return parsed(await exchange(port, rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n"), 0).status
    place = rng.choice(
        ("/", "/..", "/%00", "/requests/" + "x" * 5000, "/requests/%2e%2e", "//", "/models?" + "q" * 999)
    )
    raw = head(rng.choice(METHODS), place, 0)
    return parsed(await exchange(port, raw), 0).status


def wrong_values(rng: random.Random, document: dict[str, Any], path: str) -> dict[str, Any]:
    """A body with a field or two of wrong values; one that happens to be right has a field more."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = [*schema["properties"], "x", "", "__proto__"]
    body = {"class_labels": 1, "num_inference_steps": 1}
    for name in rng.sample(names, rng.randrange(1, 4)):
        body[name] = rng.choice(VALUES)
    return (
        body | {"no such field": 1} if rng.random() < 0.3 else body | {"num_images": rng.choice((0, "1", 11))}
    )


async def cut_off(port: int, path: str) -> int:
    """Promises more than it sends, and is gone."""
    _, writer = await asyncio.open_connection(HOST, port)
    writer.write(head("POST", path, 1000) + b'{"class_labels": [1')
    await writer.drain()
    writer.close()
    return 0


def head(method: str, path: str, length: int) -> bytes:
    """The head of a request."""
    lines = f"Host: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n\r\n".encode()
