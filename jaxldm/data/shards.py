"""Examples in shards on disk: computed part by part, memory-mapped and read by rows, never all in memory.

    FOLDER/KEY/00000.npy, 00001.npy, ...      KEY: the first half of a hash of everything the rows depend on

A shard is a .npy file of records, one for each row, with a field for each column; its last bytes are a
checksum. Each is written under another name and renamed, so that it is whole or absent: a computation that
was killed goes on with the first shard that is missing, and a damaged one is computed again. Shards under
another key are removed when those of the new key are complete.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from jaxldm.arguments import a_path, checked, count, function, text
from jaxldm.errors import DataError, InvalidArgumentError, shown
from jaxldm.files import remove_folder, write_atomically
from jaxldm.reading import check_regular, reading

Columns = Mapping[str, Shaped[np.ndarray, "N ..."]]
SHARD_BYTES = 64 * 2**20  # of a shard, about
_KEY = re.compile(r"[0-9a-f]{32}")
_SUM = len("crc32:00000000\n")


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """Rows in shards, as `sharded` returns them: a batch reads only its own rows.

    Attributes:
        paths: the shards, all of `rows_per_shard` rows but for the last.
        length: the number of rows.
        rows_per_shard: rows in each.
        columns: the names of the columns that `take` returns.
    """

    paths: tuple[str, ...]
    length: int
    rows_per_shard: int
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return self.length

    def only(self, *columns: str) -> ShardRows:
        """The same rows with fewer columns; the others are not read."""
        return dataclasses.replace(self, columns=columns)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        """The columns of `rows`. Raises `DataError` where a shard is gone."""
        shards, places = np.divmod(np.asarray(rows), self.rows_per_shard)
        dtype = _opened(self.paths[0]).dtype
        taken = {name: np.empty((len(shards), *dtype[name].shape), dtype[name].base) for name in self.columns}
        for shard in np.unique(shards):
            own, records = shards == shard, _opened(self.paths[shard])
            for name, column in taken.items():
                column[own] = records[name][places[own]]
        return taken


def rows_per_shard(**columns: Any) -> int:
    """How many rows of these columns make a shard of about 64 MiB.

    Args:
        columns: the shape and dtype of a row of each: arrays or `jax.ShapeDtypeStruct`.
    """
    row = sum(int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize for column in columns.values())
    return max(1, SHARD_BYTES // max(row, 1))


@checked(
    folder=a_path,
    key=text,
    num_rows=count(1),
    compute=function("(start, stop) -> columns of these rows"),
    rows_per_shard=count(1),
)
def sharded(
    folder: str | os.PathLike,
    key: str,
    num_rows: int,
    compute: Callable[[int, int], Columns],
    rows_per_shard: int = 4096,
) -> ShardRows:
    """Rows in shards in `folder` under the fingerprint `key`; those that are not there are computed.

    Args:
        folder: for example runs/mini-ldm/latents.
        key: `fingerprint(...)` of everything that the rows depend on.
        num_rows: rows in all.
        compute: (start, stop) -> named arrays of the rows start, ..., stop - 1; called for each shard that is
            missing or damaged.
        rows_per_shard: so many are in memory at once.

    Raises:
        StorageError: a shard cannot be written (no space, no permission); those before it stay.
        InvalidArgumentError: `compute` returns other things than named arrays of these rows.
    """
    folder = Path(folder)
    name = fingerprint_name(key, rows_per_shard)
    paths, dtype = [], None
    for number, start in enumerate(range(0, num_rows, rows_per_shard)):
        stop = min(start + rows_per_shard, num_rows)
        path = folder / name / f"{number:05d}.npy"
        found = _whole(path, stop - start)
        if found is None or (dtype is not None and found != dtype):
            records = _records(compute(start, stop), stop - start)
            write_atomically(path, _content(records))
            found = records.dtype
        dtype = dtype or found
        paths.append(str(path))
    _remove_others(folder, name)
    return ShardRows(tuple(paths), num_rows, rows_per_shard, tuple((dtype and dtype.names) or ()))


def fingerprint_name(key: str, rows_per_shard: int) -> str:
    """The folder of a key: shards of another size are others."""
    from jaxldm.data.latents import fingerprint

    return fingerprint(key, rows_per_shard)[:32]


def _records(columns: Any, rows: int) -> np.ndarray:
    """Named arrays as one array of records. Raises `InvalidArgumentError`."""
    if not isinstance(columns, Mapping) or not columns:
        raise InvalidArgumentError(f"compute must return named arrays, got {shown(columns)}")
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != rows or array.dtype.hasobject:
            raise InvalidArgumentError(f"compute must return {rows} rows of {name!r}, got {shown(array)}")
    dtype = np.dtype([(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    records = np.empty(rows, dtype)
    for name, array in arrays.items():
        records[name] = array
    return records


def _content(records: np.ndarray) -> list[bytes | memoryview]:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(records))
    parts = [header.getvalue(), records.view(np.uint8).data]
    total = 0
    for part in parts:
        total = zlib.crc32(part, total)
    return [*parts, f"crc32:{total:08x}\n".encode()]


def _whole(path: Path, rows: int) -> np.dtype | None:
    """The dtype of a shard of so many rows; None where it is missing or, by its checksum, damaged."""
    try:
        check_regular(path, "shard", DataError)
        with reading(path, DataError), path.open("rb") as file:
            left, total = os.fstat(file.fileno()).st_size - _SUM, 0
            while left > 0:
                part = file.read(min(left, 2**24))
                total, left = zlib.crc32(part, total), left - len(part)
                if not part:
                    return None
            if file.read() != f"crc32:{total:08x}\n".encode():
                return None
        records = _opened(str(path))
    except DataError:
        return None
    return records.dtype if records.shape == (rows,) and records.dtype.names else None


def _opened(path: str) -> np.ndarray:
    """A shard, memory-mapped. Raises `DataError` where it is gone or is none."""
    with reading(path, DataError):
        return _mapped(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=4096)  # a process maps each once, workers of a loader for themselves
def _mapped(path: str, changed: int) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _remove_others(folder: Path, name: str) -> None:
    """Removes the shards of other keys."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != name and _KEY.fullmatch(path.name):
            remove_folder(path)
