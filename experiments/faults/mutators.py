"""Mutations of files: of their bytes, of JSON as a tree, of a safetensors header, and of the file as such."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]
DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
# In place of a value of JSON; a function makes one of the value that was there.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 1000, 2**31, 2**63, 10**9, 10**10, -(10**10), 10**18, 10**30),
    *(0.5, -0.0, 1e-300, 1e39, 1e308, "", "a", "0", "none", "x" * 5000, "\0", "../a", [], [[]], {}, DEEP),
    *([0], [1, 2, 3], [None], ["a"], {"a": 1}, {"content": 3}, [1] * 70),
]
TEXTS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "-" + "9" * 400,
    "[" * 3000,
    '{"a":' * 3000,
    '"\\ud800"',
]


def flip(rng: random.Random, content: bytes) -> bytes:
    """One to eight bits, anywhere."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def run_of_bytes(rng: random.Random, content: bytes) -> bytes:
    """Some bytes are overwritten by 0, 255 or random ones."""
    at, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 4, 8, 64, 1000])
    filler = rng.choice([b"\0", b"\xff", None])
    run = rng.randbytes(length) if filler is None else filler * length
    return content[:at] + run + content[at + length :]


def truncate(rng: random.Random, content: bytes) -> bytes:
    """Only the beginning, or only the end."""
    at = rng.randrange(len(content) + 1)
    return content[:at] if rng.random() < 0.8 else content[at:]


def duplicate(rng: random.Random, content: bytes) -> bytes:
    """A part twice, or many times."""
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    times = rng.choice([1, 1, 3, 100])
    return content[:last] + content[first:last][:2000] * times + content[last:]


def splice(rng: random.Random, content: bytes) -> bytes:
    """A part moved elsewhere, or left out."""
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    rest, at = content[:first] + content[last:], rng.randrange(len(content) + 1)
    return rest if rng.random() < 0.5 else rest[:at] + content[first:last] + rest[at:]


BYTES: tuple[Mutation, ...] = (flip, flip, run_of_bytes, truncate, duplicate, splice)


def of_json(rng: random.Random, content: bytes) -> bytes:
    """One to three changes of the tree: values, keys, nesting; or of a value's text."""
    entries = json.loads(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        _change(rng, entries)
    if rng.random() < 0.1:
        marker = "a value that is replaced"
        parent, key = rng.choice(_places(entries) or [({}, "a")])
        parent[key] = marker
        return json.dumps(entries).replace(json.dumps(marker), rng.choice(TEXTS)).encode()
    return json.dumps(entries).encode()


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(parent, key) of every value in a tree of JSON, the root's own left out; at most some thousands."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < 3000:
        node = waiting.pop(0)
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def _change(rng: random.Random, entries: Any) -> None:
    places = _places(entries)
    if not places:
        return
    parent, key = rng.choice(places)
    value = parent[key]
    kind = rng.choice(["value", "value", "value", "number", "delete", "rename", "add", "wrap", "swap"])
    if kind == "number" and isinstance(value, int | float) and not isinstance(value, bool):
        parent[key] = rng.choice(
            [value + 1, value - 1, value * 10, -value, value * 10**9, str(value), float(value)]
        )
    elif kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        name = str(key)
        at = rng.randrange(len(name) + 1)
        parent[name[:at] + rng.choice(["", "x", "_", "s"]) + name[at + 1 :]] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent[rng.choice(["a_new_key", "_private", "", "num_layers", "é", "x" * 300])] = rng.choice(VALUES)
    elif kind == "wrap":
        parent[key] = rng.choice([[value], {"a": value}, [value] * 3])
    elif kind == "swap":
        other, place = rng.choice(places)
        parent[key] = copy.deepcopy(other[place]) if len(places) < 200 else None
    else:
        parent[key] = rng.choice(VALUES)


def of_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Changes of the header, whose length is then right again, most of the time."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.choice(["json", "json", "name", "shape", "dtype", "offsets", "data"])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names) if names else None
    if name is None or kind == "json":
        _change(rng, header)
    elif kind == "name":
        numbered = [part for part in name.split(".") if part.isdecimal()]
        new = rng.choice(["1000000000", "9" * 5000, "-1", "7", "٣"])
        parts = [new if numbered and part == numbered[0] else part for part in name.split(".")]
        header[".".join(parts) if numbered else name + new] = header.pop(name)
    elif kind == "shape":
        shapes: list[Any] = [
            [],
            [0],
            [1] * 65,
            [10**18, 0],
            [2**63],
            [10**99] * 30,
            [-1],
            header[name]["shape"][::-1],
        ]
        header[name]["shape"] = rng.choice([*shapes, [1, *header[name]["shape"]]])
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I64", "BOOL", "U8", "C64", "F8_E8M0", "F4", ""]
        )
    elif kind == "offsets":
        first, last = header[name]["data_offsets"]
        header[name]["data_offsets"] = rng.choice(
            [[last, first], [0, 0], [first, last + 8], [first - 4, last], [0, 2**62], [-1, last]]
        )
    text = json.dumps(header).encode()
    if kind == "data":
        data = rng.choice(
            [bytes(len(data)), b"\xff" * len(data), rng.randbytes(len(data)), data + b"\0", data[:-1]]
        )
    size = len(text) if rng.random() < 0.95 else rng.choice([0, 1, len(text) + 8, 2**40, 2**63])
    return size.to_bytes(8, "little") + text + data


def in_place_of(rng: random.Random, path: Path) -> str:
    """Something else than a regular file under the name of one; returns what it is."""
    path.unlink()
    kind = rng.choice(["pipe", "folder", "loop", "device", "dangling", "endless", "empty"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        targets = {"loop": path, "device": "/dev/zero", "dangling": "nowhere", "endless": "/dev/tty"}
        path.symlink_to(targets[kind])
    return kind


def mutate(rng: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    """(what was done, the changed content) of a file; its name says which kinds of mutation fit."""
    structured = {".json": of_json, ".safetensors": of_safetensors}.get(Path(name).suffix)
    mutation = structured if structured is not None and rng.random() < 0.7 else rng.choice(BYTES)
    try:
        return mutation.__name__, mutation(rng, content)
    except (ValueError, OverflowError, RecursionError):  # a value of JSON that this change cannot be made of
        return "flip", flip(rng, content)
