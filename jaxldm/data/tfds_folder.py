"""A data set that TFDS has prepared, given by its folder: of a version, of a config, or of the data set."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jaxldm.errors import DataError
from jaxldm.reading import check_regular, reading, reason, some_of

DESCRIPTION = "dataset_info.json"  # TFDS writes one into the folder of each version
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)


def prepared_folder(root: Path) -> Path | None:
    """The folder of one version: `root` itself, the newest in it, or that of the only config in it.

    None for every other folder, such as one of pictures.

    Raises:
        DataError: the folder holds several configs or data sets, of which one has to be chosen; it cannot be
            read.
    """
    with reading(root, DataError):
        if (root / DESCRIPTION).is_file():
            return root
        own = _newest(root)
        if own is not None or not root.is_dir():
            return own
        below = sorted(child for child in root.iterdir() if child.is_dir())
        found = [version for child in below if (version := _newest(child)) is not None]
    if len(found) > 1:
        listed = some_of([str(each) for each in found])
        raise DataError(f"{root} holds {len(found)} data sets of TFDS, {listed}: give the folder of one")
    return found[0] if found else None


def _newest(folder: Path) -> Path | None:
    """The folder of the newest version in a folder; None where there is none."""
    versions = [
        path.parent
        for path in folder.glob(f"[0-9]*/{DESCRIPTION}")
        if _VERSION.fullmatch(path.parent.name) and path.is_file()
    ]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def check_shards(split: Any, fix: str) -> None:
    """Open each file of a split, and count its records: TFDS looks at a file when a record is wanted.

    Args:
        split: TFDS's `SplitInfo`, of the format array_record.
        fix: what to do where one is damaged.

    Raises:
        DataError: a file is absent, cut short, or has another number of records than is written of it.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    for name, expected in zip(split.filepaths, split.shard_lengths, strict=True):
        path = os.fspath(name)
        try:
            check_regular(path, "shard", DataError)
            reader = ArrayRecordReader(path, options="readahead_buffer_size:0")
            found = reader.num_records()
            reader.close()
        except DataError as error:
            raise DataError(f"{error}: {fix}") from error
        except (ValueError, OSError, RuntimeError, IndexError) as error:
            raise DataError(f"cannot read {path} ({reason(error)}): {fix}") from error
        if found != expected:
            raise DataError(f"{path} has {found} of the {expected} records of {split.name!r}: {fix}")
