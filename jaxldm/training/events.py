"""The training log once more as TensorBoard reads it: an event file next to `log.csv`.

    tensorboard --logdir runs

A file is a row of records, each with checksums of its length and of its bytes (TFRecord); a record is an
`Event` of TensorBoard's event.proto, which is written here by hand: a time, a step and a few numbers by name.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxldm.files import storage_errors

PREFIX = "events.out.tfevents."  # by which TensorBoard finds files; it reads them in order of their names
_VERSION = b"brain.Event:2"
_NOT_SHOWN = ("epoch", "step", "seconds")  # TensorBoard's axes are the step and the time


def _crc_table() -> tuple[int, ...]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return tuple(table)


_TABLE = _crc_table()


def masked_crc(content: bytes) -> int:
    """CRC-32C, rotated and moved as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(content: bytes) -> bytes:
    """One record of a TFRecord file."""
    length = struct.pack("<Q", len(content))
    sums = (struct.pack("<I", masked_crc(part)) for part in (length, content))
    return length + next(sums) + content + next(sums)


def _varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes, or of another message."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def event(when: float, step: int, content: bytes) -> bytes:
    """An `Event`: wall_time (1), step (2), and one of file_version (3), summary (5), session_log (7)."""
    return record(b"\x09" + struct.pack("<d", when) + b"\x10" + _varint(step) + content)


def scalars(values: Mapping[str, float]) -> bytes:
    """The field `summary` of an event: a `Value` of tag (1) and simple_value (2) for each number."""
    each = (_field(1, name.encode()) + b"\x15" + struct.pack("<f", value) for name, value in values.items())
    return _field(5, b"".join(_field(1, value) for value in each))


class EventLog:
    """Append the rows of a log, from the update after `start`; NaN are left out.

    Each start of a run has a file of its own. It begins by saying that whatever earlier files have from that
    update on is void: TensorBoard leaves it out, as a run that was killed has it again.
    """

    def __init__(self, folder: Path, start: int):
        self.path = folder / f"{PREFIX}{time.time():.6f}"
        when = time.time()
        started = event(when, start + 1, _field(7, b"\x08\x01"))  # SessionLog: START
        self._start = record(b"\x09" + struct.pack("<d", when) + _field(3, _VERSION)) + started
        self._head: bytes | None = self._start

    def write(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows of a `CsvLog`. Raises `StorageError`."""
        now, parts = time.time(), [self._head or b""]
        for row in rows:
            values = {name: float(str(row[name])) for name in row if name not in _NOT_SHOWN}
            known = {name: value for name, value in values.items() if not math.isnan(value)}
            parts.append(event(now, int(str(row["step"])), scalars(known)))
        with storage_errors(self.path), self.path.open("ab") as file:
            file.write(b"".join(parts))
        self._head = None

    def move_to(self, folder: Path) -> None:
        """Go on in another folder, with a file that has a head too."""
        if folder != self.path.parent:
            self.path, self._head = folder / self.path.name, self._start
