"""JSON files that vouch for others, so with a checksum of their own: the entry `crc32`, the last one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxldm.errors import CheckpointError
from jaxldm.reading import parse_json

_SEAL = "crc32"


def sealed(entries: dict[str, Any]) -> bytes:
    """The content of a file with these entries; `unsealed` notices when a single bit of it changes."""
    text = json.dumps(entries, indent=1)
    return (json.dumps({**entries, _SEAL: zlib.crc32(text.encode())}, indent=1) + "\n").encode()


def unsealed(content: bytes, where: Path, names: Collection[str]) -> dict[str, Any]:
    """The entries in the content of a sealed file, or in that of a version that did not seal it.

    Args:
        content: of the file.
        where: the file, for messages.
        names: of the entries that a file without a seal may have.

    Raises:
        CheckpointError: the file is damaged.
    """
    entries = parse_json(content, where)
    if entries.pop(_SEAL, None) is None:
        if not entries.keys() <= set(names):
            raise CheckpointError(f"{where} is damaged: it has no {_SEAL}")
    elif sealed(entries) != content:
        raise CheckpointError(f"{where} is damaged: its bytes have changed")
    return entries
