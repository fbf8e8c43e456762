"""The training log: a CSV file with one row per update, consistent with the checkpoints."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxldm.arguments import a_path, checked
from jaxldm.errors import CheckpointError
from jaxldm.files import storage_errors, write_atomically
from jaxldm.training.events import EventLog

COLUMNS = ("epoch", "step", "loss", "grad_norm", "learning_rate", "seconds")
# Of the last second or longer, and unknown for the first update of a process.
SPEEDS = ("waiting_share", "of_peak", "examples_per_second")
# The columns that a second run has differently.
CLOCKS = ("seconds", "waiting", *SPEEDS)


def flatten_metrics(metrics: Mapping[str, Float[ArrayLike, " ..."]]) -> dict[str, np.float32]:
    """Scalars keep their name, element k of a vector becomes `name_k`."""
    flat = {}
    for name, value in metrics.items():
        value = np.asarray(value, np.float32)
        if value.ndim == 0:
            flat[name] = value[()]
        else:
            flat.update({f"{name}_{k}": element for k, element in enumerate(value.reshape(-1))})
    return flat


class CsvLog:
    """Append rows `epoch, step, loss, grad_norm, learning_rate, seconds` and then whatever else is measured.

    `step` counts finished updates (the first row has step 1), `epoch` is counted from 1, `seconds` is the
    training time so far, over all interruptions; `waiting`, among the further ones, is how many seconds of
    the update the devices, with no step under way, waited for its batch, and `examples` are those of the
    batch. Of the last second or longer are `waiting_share`, `examples_per_second` and `of_peak`, the share of
    the devices' matrix peak (`jaxldm.training.peak`), nan where it is not known. All three are nan for the
    first update of a process, in which it is compiled. Numbers are written in the shortest form that reads
    back as the same float32. Rows reach the disk with `flush`; `keep_until(step)` cuts off the rows after a
    checkpoint.

    `events`: the same numbers in a file for TensorBoard, from `keep_until` on.
    """

    def __init__(self, path: Path | str, *, events: bool = False):
        self.path = Path(path)
        self._with_events, self._events = events, cast("EventLog | None", None)
        self._rows: list[dict[str, object]] = []
        self._header: list[str] | None = None
        self._check_header = False

    def keep_until(self, step: int, log: Callable[[str], None] = lambda line: None) -> float:
        """Keep the rows up to `step`, not later or half-written ones; return the seconds of the last.

        Of a damaged file the rows that are whole are kept, and `log` is given a line.
        """
        if self._with_events:
            self._events = EventLog(self.path.parent, step)
        if not self.path.is_file():
            return 0.0
        content = self.path.read_bytes()
        if b"\n" not in content:  # killed in the first line
            write_atomically(self.path, b"")
            return 0.0
        found = _parse(content)
        if found.header is None and not found.rows:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            self.path.replace(aside)
            log(f"{self.path} is damaged, no row of it is whole; it is set aside as {aside}")
            return 0.0
        if found.damaged:
            log(
                f"{self.path} is damaged: {found.damaged} of its lines "
                f"{'is' if found.damaged == 1 else 'are'} left out, and {len(found.rows)} are whole"
            )
        kept = [row for row in found.rows if int(row[1]) <= step]
        self._header = found.header
        if found.header is None and kept:  # what else was measured gets its names with the next row
            self._header = [*COLUMNS, *(f"column_{k + 1}" for k in range(len(COLUMNS), len(kept[0])))]
        self._check_header = True
        lines = [",".join(fields) + "\n" for fields in (self._header or (), *kept) if fields]
        write_atomically(self.path, "".join(lines).encode())
        return float(kept[-1][5]) if kept else 0.0

    def append(
        self, epoch: int, step: int, seconds: float, metrics: Mapping[str, Float[ArrayLike, " ..."]]
    ) -> None:
        """Take one row into memory."""
        row = {"epoch": epoch, "step": step, "seconds": f"{seconds:.3f}", **flatten_metrics(metrics)}
        self._rows.append(row)

    def flush(self, *, durable: bool = False) -> None:
        """Write the rows taken in; `durable`: so that they outlive a power cut. Raises `StorageError`.

        While the folder is missing, the rows stay in memory.
        """
        if not self._rows or (not durable and not self.path.parent.is_dir()):
            return
        header = [*COLUMNS, *(name for name in self._rows[0] if name not in COLUMNS)]
        if self._check_header and self._header and len(self._header) == len(header) != 0:
            if self._header != header:
                _, _, rows = self.path.read_bytes().partition(b"\n")
                write_atomically(self.path, (",".join(header) + "\n").encode() + rows)
            self._header = header
        self._check_header = False
        self._header = self._header or header
        lines = [",".join(str(row.get(name, "")) for name in self._header) + "\n" for row in self._rows]
        with storage_errors(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(",".join(self._header) + "\n")
            file.writelines(lines)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if self._events is not None:
            self._events.write(self._rows)
        self._rows.clear()

    def move_to(self, path: Path) -> None:
        """Write the rows from now on, and those not written yet, to another file, in a folder that exists."""
        self.path = path
        if self._events is not None:
            self._events.move_to(path.parent)


class _Parsed(NamedTuple):
    """The whole rows of a log, in order; its header, where that is one; and how many lines are damaged."""

    header: list[str] | None
    rows: list[list[str]]
    damaged: int


def _parse(content: bytes) -> _Parsed:
    """A last line cut short by a kill is left out, and is no damage."""
    text = content.decode("utf-8", errors="replace")
    lines = [line.removesuffix("\r").split(",") for line in text[: text.rfind("\n") + 1].split("\n")[:-1]]
    if not lines:
        return _Parsed(list(COLUMNS), [], 0)
    widths = [len(fields) for fields in lines if _is_row(fields)] or [len(lines[0])]
    width = max(set(widths), key=widths.count)
    begins_well = tuple(lines[0][: len(COLUMNS)]) == COLUMNS
    header = lines[0] if begins_well and len(lines[0]) == width else None
    rows = [fields for fields in lines if len(fields) == width and _is_row(fields)]
    kept = [rows[place] for place in _longest_rise([int(fields[1]) for fields in rows])]
    return _Parsed(header, kept, len(lines) - len(kept) - (header is not None))


def _is_row(fields: list[str]) -> bool:
    try:
        numbers = [float(field) for field in fields if field]
        counts = int(fields[0]), int(fields[1])
    except (ValueError, IndexError):
        return False
    whole = len(fields) >= len(COLUMNS) and all(fields[: len(COLUMNS)]) and all(map(str.isascii, fields))
    return whole and bool(numbers) and min(counts) >= 1 and max(counts) < 2**53


def _longest_rise(values: list[int]) -> list[int]:
    """The places of the longest strictly rising part: without them the fewest rows have a wrong step."""
    ends: list[int] = []  # the place of the smallest last value of a rise of each length
    before: list[int] = []
    for place, value in enumerate(values):
        length = bisect.bisect_left(ends, value, key=values.__getitem__)
        before.append(ends[length - 1] if length else -1)
        ends[length : length + 1] = [place]
    chosen: list[int] = []
    place = ends[-1] if ends else -1
    while place >= 0:
        chosen.append(place)
        place = before[place]
    return chosen[::-1]


@checked(path=a_path)
def read_log(path: Path | str) -> dict[str, np.ndarray]:
    """Read a training log: name of the column -> float64 `[rows]` (`epoch` and `step` int64).

    Lines that are damaged are left out. Raises `CheckpointError` when there is no such file or it is no
    training log.

    >>> log = read_log("runs/mini-ldm/diffusion/log.csv")       # doctest: +SKIP
    >>> log["step"][-1], log["loss"][-100:].mean()              # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no training log {path}")
    content = path.read_bytes()
    header, rows, _ = _parse(content)
    begun = ",".join(COLUMNS).encode()
    if header is None or not (content.startswith(begun) or begun.startswith(content)):
        raise CheckpointError(f"{path} is no training log: its first line should begin {','.join(COLUMNS)}")
    numbers = np.array([[float(field or "nan") for field in row] for row in rows], np.float64)
    columns = dict(zip(header, numbers.reshape(len(rows), len(header)).T, strict=True))
    return {
        name: column.astype(np.int64) if name in ("epoch", "step") else column
        for name, column in columns.items()
    }
