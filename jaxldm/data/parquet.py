"""Pictures in parquet files, as Hugging Face's datasets writes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, cast

from jaxldm.data.example import CONTROL_KEYS, TEXT_KEYS, Example
from jaxldm.errors import DataError, MissingDependencyError
from jaxldm.reading import check_regular, reading

IMAGE_KEYS = ("image", "img", "jpg", "png")
LABEL_KEYS = ("label", "labels", "cls")
MAX_GROUP_BYTES = 2**31  # of a group of rows, the least that is read at once


def parquet_examples(path: Path, name: str) -> list[Example]:
    """The examples of a file: a column of pictures (bytes, or {"bytes": ...}), captions and labels.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        DataError: no parquet file, or one without pictures.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet", f"reading {path.name}") from error
    check_regular(path, "parquet file", DataError)
    with reading(path, DataError):
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        image = next((key for key in IMAGE_KEYS if key in columns), None)
        if image is None:
            raise DataError(
                f"{path} has no column {' or '.join(IMAGE_KEYS)}, only {', '.join(columns)[:200]}"
            )
        control = next((key for key in CONTROL_KEYS if key in columns), None)
        texts, labels = (_column(file, keys) for keys in (TEXT_KEYS, LABEL_KEYS))
        names = _class_names(file.schema_arrow.metadata)
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        if any(group.total_byte_size > MAX_GROUP_BYTES for group in groups):
            raise DataError(f"{path} has groups of rows of more than 2 GiB: write it with smaller ones")
        places = [(number, row) for number, group in enumerate(groups) for row in range(group.num_rows)]
    examples = []
    for number, (group, row) in enumerate(places):
        label = None if labels is None or labels[number] is None else str(labels[number])
        if label is not None and label.isdigit() and int(label) < len(names):
            label = names[int(label)]
        text = None if texts is None or texts[number] is None else " ".join(str(texts[number]).split())
        read, other = (
            key and functools.partial(_picture, path, key, group, row, f"{name}, row {number}")
            for key in (image, control)
        )
        examples.append(
            Example(f"{name}/{number:08d}", cast(Any, read), None, label, text, control=cast(Any, other))
        )
    return examples


def _column(file: Any, keys: tuple[str, ...]) -> list[Any] | None:
    key = next((key for key in keys if key in file.schema_arrow.names), None)
    return None if key is None else file.read(columns=[key])[key].to_pylist()


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str]:
    """The names that datasets writes into a file's metadata."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return next((features[key].get("names") or [] for key in LABEL_KEYS if key in features), [])


def _picture(path: Path, column: str, group: int, row: int, name: str) -> bytes:
    with reading(path, DataError):
        value = _group(path, path.stat().st_mtime_ns, column, group)[row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError(f"{name} holds no picture: a column of bytes is needed")
    return content


@functools.lru_cache(maxsize=4)  # shuffled rows come from everywhere; memory stays bounded
def _group(path: Path, changed: int, column: str, group: int) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, columns=[column])[column]
