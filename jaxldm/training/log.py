"""The training log: a CSV file with one row per update, consistent with the checkpoints."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxldm.errors import CheckpointError
from jaxldm.files import storage_errors, write_atomically
from jaxldm.reading import reading

COLUMNS = ("epoch", "step", "loss", "grad_norm", "learning_rate", "seconds")


def flatten_metrics(metrics: Mapping[str, np.ndarray]) -> dict[str, np.float32]:
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
    training time so far, over all interruptions. Numbers are written in the shortest form that reads back as
    the same float32. Rows reach the disk with `flush`; `keep_until(step)` cuts off the rows after a
    checkpoint.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._rows: list[dict[str, object]] = []
        self._header: list[str] | None = None

    def keep_until(self, step: int) -> float:
        """Keep the rows up to `step`, not later or half-written ones; return the seconds of the last."""
        if not self.path.exists():
            return 0.0
        header, rows = _read_rows(self.path)
        kept = [row for row in rows if int(row["step"]) <= step]
        self._header = header
        text = "".join(",".join(row[name] for name in header or ()) + "\n" for row in kept)
        write_atomically(self.path, (",".join(header) + "\n" + text).encode() if header else b"")
        return float(kept[-1]["seconds"]) if kept else 0.0

    def append(self, epoch: int, step: int, seconds: float, metrics: Mapping[str, np.ndarray]) -> None:
        """Take one row into memory."""
        row = {"epoch": epoch, "step": step, "seconds": f"{seconds:.3f}", **flatten_metrics(metrics)}
        self._rows.append(row)

    def flush(self, *, durable: bool = False) -> None:
        """Write the rows taken in; `durable`: so that they outlive a power cut. Raises `StorageError`."""
        if not self._rows:
            return
        if self._header is None:
            self._header = [*COLUMNS, *(name for name in self._rows[0] if name not in COLUMNS)]
        lines = [",".join(str(row.get(name, "")) for name in self._header) + "\n" for row in self._rows]
        with storage_errors(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(",".join(self._header) + "\n")
            file.writelines(lines)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        self._rows.clear()


def _read_rows(path: Path) -> tuple[list[str] | None, list[dict[str, str]]]:
    """Header and whole rows; a last line cut short by a kill is left out."""
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    if not lines:
        return None, []
    header = next(csv.reader(lines[:1]))
    if tuple(header[: len(COLUMNS)]) != COLUMNS:
        raise CheckpointError(f"{path} is no training log: its first line should begin {','.join(COLUMNS)}")
    rows: Iterable[list[str]] = csv.reader(lines[1:])
    return header, [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


def read_log(path: Path | str) -> dict[str, np.ndarray]:
    """Read a training log: name of the column -> float64 `[rows]` (`epoch` and `step` int64).

    Raises `CheckpointError` when there is no such file or it is no training log.

    >>> log = read_log("runs/mini-ldm/diffusion/log.csv")       # doctest: +SKIP
    >>> log["step"][-1], log["loss"][-100:].mean()              # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no training log {path}")
    with reading(path):
        header, rows = _read_rows(path)
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in header or COLUMNS}
        return {
            name: column.astype(np.int64) if name in ("epoch", "step") else column
            for name, column in columns.items()
        }
