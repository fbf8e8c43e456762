"""Requests that nobody should send: of wrong types, cut off, slow, huge, and of no HTTP at all."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import importlib.util
import random
import time
from typing import Any

from experiments.serving.client import HOST, Answer, ask, exchange, parsed

AT_ONCE = 16
PATHS = ("/generate", "/v1/images/generations")
METHODS = ("GET", "PUT", "PATCH", "OPTIONS", "TRACE", "BREW", "")
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**31, 2**64, -(10**30), 1e308, 1e-320, "", "x", "\u0000", "\U0001f600" * 50),
    *("../../etc/passwd", "http://localhost/", "%s%n", "a" * 20_000, [], [[]], [None], [1, "x", {}], {}),
    *({"a": {"b": 1}}, [0] * 1000, {"$ref": "#"}, float("nan"), float("-inf"), 1e-9, "1", False),
)
TYPES = ("application/json", "application/json", "text/plain", "multipart/form-data", "")
NOT_JSON = (
    *(b"", b"{", b"[1]", b'"x"', b"\xff\xfe\x00", b'{"seed": NaN}', b'{"seed": Infinity}', b"[" * 50_000),
    *(b'{"prompt": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b"}", b"<xml/>", b"\x00" * 100),
    b'{"class_labels": [' + b"1," * 600_000 + b"1]}",  # more than 1 MiB
)
KINDS = ("schema", "schema", "values", "values", "not json", "cut off", "slow", "head", "raw", "place")
KINDS += ("chunks",)
TOO_LONG = 15.0  # seconds; a head and a body have 10 each


async def nonsense(port: int, number: int) -> dict[str, Any]:
    """Sends so many: what came back."""
    document = (await ask(port, "GET", "/openapi.json")).facts
    described = await asyncio.to_thread(by_schema, document, number // 4)
    statuses: collections.Counter[int] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    numbers, longest, unsaid = iter(range(number)), 0.0, 0

    async def sender() -> None:
        nonlocal longest, unsaid
        for n in numbers:
            rng, start = random.Random(n), time.perf_counter()
            kind = rng.choice(KINDS) if described else rng.choice(KINDS[2:])
            answer = await one(port, kind, rng, document, described)
            statuses[answer.status] += 1
            kinds[kind] += 1
            unsaid += answer.status >= 400 and not says_what_to_send(answer)
            longest = max(longest, time.perf_counter() - start)

    await asyncio.gather(*(sender() for _ in range(AT_ONCE)))
    return {
        "requests": number,
        "by kind": dict(sorted(kinds.items())),
        "by status": {str(status): count for status, count in sorted(statuses.items())},
        "5xx": sum(count for status, count in statuses.items() if status >= 500),
        "refusals that are not the JSON of the API": unsaid,
        "longest seconds": longest,
    }


def says_what_to_send(answer: Answer) -> bool:
    """Whether a refusal is JSON with type, message, param and allowed."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return answer.facts["error"].keys() == {"type", "message", "param", "allowed"}
    return False


async def one(
    port: int, kind: str, rng: random.Random, document: dict[str, Any], described: list[bytes]
) -> Answer:
    """Sends one of a kind."""
    path = rng.choice(PATHS)
    if kind == "schema":
        return parsed(await exchange(port, rng.choice(described)), 0)
    if kind == "values":
        return await ask(port, "POST", path, wrong_values(rng, document, path))
    if kind == "not json":
        headers = {"Content-Type": rng.choice(TYPES)}
        return await ask(port, "POST", path, rng.choice(NOT_JSON), headers=headers)
    if kind == "cut off":
        return await cut_off(port, path)
    if kind == "slow":
        content = b'{"class_labels": "x"}'
        raw = head("POST", path, len(content)) + content
        return parsed(await exchange(port, raw, pause=rng.uniform(0.01, 0.5)), 0)
    if kind == "head":
        headers = {"X-" + "a" * rng.randrange(1, 100): "b" * rng.choice((10, 1000, 100_000))}
        headers |= {"Authorization": "\x7f" * 10, "Cookie": "=" * rng.randrange(1000)}
        return await ask(port, "POST", path, {"class_labels": "x"}, headers=headers)
    if kind == "raw":
        return parsed(await exchange(port, rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n"), 0)
    if kind == "chunks":
        length = rng.choice((b"5", b"-5", b"ffffffffffffffffffff", b"x", b""))
        more = "Transfer-Encoding: chunked", "Expect: 100-continue"
        raw = head("POST", rng.choice((path, "/nothing")), None, *more)
        return parsed(await exchange(port, raw + length + b"\r\n{}\r\n0\r\n\r\n", timeout=60), 0)
    places = ("/", "/..", "/%00", "/requests/" + "x" * 5000, "/requests/%2e%2e", "//", "/models?" + "q" * 999)
    return parsed(await exchange(port, head(rng.choice(METHODS), rng.choice(places), 0)), 0)


def wrong_values(rng: random.Random, document: dict[str, Any], path: str) -> dict[str, Any]:
    """A body with a field or two of wrong values; right by chance, it is one image of a step."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = [*schema["properties"], *(("x", "", "__proto__") if rng.random() < 0.3 else ())]
    wrong = {name: rng.choice(VALUES) for name in rng.sample(names, rng.randrange(1, 4))}
    # What would be right, and take long.
    body = {name: value for name, value in wrong.items() if (name, type(value)) != ("timeout", float)}
    return {"class_labels": 1, "num_inference_steps": 1} | body


def by_schema(document: dict[str, Any], number: int) -> list[bytes]:
    """Requests that schemathesis makes of the description, half against it; [] where it is missing."""
    if importlib.util.find_spec("schemathesis") is None:
        return []
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from schemathesis import GenerationMode

    made: list[bytes] = []
    few = settings(
        max_examples=number // 2,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for mode in (GenerationMode.NEGATIVE, GenerationMode.POSITIVE):
        strategy = schemathesis.openapi.from_dict(document).as_strategy(generation_mode=mode)

        @seed(0)
        @few
        @given(strategy)
        def make(case: Any) -> None:
            if case.meta.generation.mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body = {name: value for name, value in case.body.items() if name != "timeout"} | (
                    {"num_inference_steps": 1}
                )
            with contextlib.suppress(ValueError):  # what cannot be sent by HTTP at all
                made.append(raw_of(requests.Request(**case.as_transport_kwargs(f"http://{HOST}")).prepare()))

        make()
    return made


def raw_of(prepared: Any) -> bytes:
    """A request of the library requests, as bytes."""
    content = prepared.body or b""
    content = content.encode() if isinstance(content, str) else content
    lines = [f"{name}: {value}" for name, value in prepared.headers.items() if name.lower() != "connection"]
    lines = [f"{prepared.method} {prepared.path_url} HTTP/1.1", f"Host: {HOST}", *lines, "Connection: close"]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + content


async def cut_off(port: int, path: str) -> Answer:
    """Promises more than it sends, and is gone."""
    _, writer = await asyncio.open_connection(HOST, port)
    writer.write(head("POST", path, 1000) + b'{"class_labels": [1')
    await writer.drain()
    writer.close()
    return Answer(0, {}, b"", 0.0)


async def slow_senders(port: int, number: int) -> dict[str, Any]:
    """Connections on which a byte a second is sent, of a head or a body, or nothing: what becomes of them."""
    body = head("POST", "/generate", 1000)
    starts = {"head": b"POST /gen", "body": body, "nothing": b""}
    starts["other type"] = body.replace(b"/json", b"/xml")  # answered before it has come

    async def one(kind: str) -> tuple[str, float]:
        reader, writer = await asyncio.open_connection(HOST, port)
        start, received = time.monotonic(), b""
        writer.write(starts[kind])
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + TOO_LONG:
                with contextlib.suppress(TimeoutError):
                    chunk = await asyncio.wait_for(reader.read(2**16), 1.0)
                    received += chunk
                    if not chunk:
                        break
                if kind != "nothing":
                    writer.write(b"a")
                    await writer.drain()
        writer.close()
        return f"{kind}: {parsed(received, 0).status or 'no answer'}", time.monotonic() - start

    done = await asyncio.gather(*(one([*starts][n % len(starts)]) for n in range(number)))
    return {
        "number": number,
        "by answer": dict(sorted(collections.Counter(what for what, _ in done).items())),
        "longest seconds": max((seconds for _, seconds in done), default=0.0),
        "not sent away": sum(seconds >= TOO_LONG for _, seconds in done),
    }


def head(method: str, path: str, length: int | None, *more: str) -> bytes:
    """The head of a request."""
    lines = [f"Host: {HOST}", "Connection: close", "Content-Type: application/json", *more]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines]).encode() + b"\r\n\r\n"
