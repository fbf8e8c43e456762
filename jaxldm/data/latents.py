"""The cache of latents: the second stage reads the encoded images instead of encoding them again.

The file is keyed by a hash of everything it depends on. A cache of other weights or images, or one left
incomplete by a crash or a full disk, is not used: the latents are computed again.
"""

import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from jaxldm.arguments import a_path, checked, function, text
from jaxldm.errors import DataError, InvalidArgumentError, shown
from jaxldm.files import write_atomically
from jaxldm.reading import check_regular, reading

Columns = dict[str, Shaped[np.ndarray, "N ..."]]
_FINGERPRINT = "__fingerprint__"


def fingerprint(*parts: Any) -> str:
    """Returns a SHA-256 of arrays, nested dictionaries of arrays, strings and numbers: names, types, shapes,
    values.

    >>> fingerprint({"w": np.zeros(2)}, "mini") == fingerprint({"w": np.zeros(2)}, "mini")
    True
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        if isinstance(leaf, (str, bytes)):
            described, content = type(leaf).__name__, leaf.encode() if isinstance(leaf, str) else leaf
        else:
            array = np.ascontiguousarray(leaf)
            described, content = f"{array.dtype}{array.shape}", array.tobytes()
        digest.update(f"{jax.tree_util.keystr(path)}:{described}:{len(content)};".encode())
        digest.update(content)
    return digest.hexdigest()


@checked(path=a_path, key=text, compute=function("() -> arrays by name"))
def cached(path: str | os.PathLike, key: str, compute: Callable[[], Columns]) -> Columns:
    """Returns the arrays stored in the .npz file `path` under the fingerprint `key`, or computes and stores
    them.

    Args:
        path: the cache file, for example runs/mini-ldm/latents.npz.
        key: `fingerprint(autoencoder params, config, images)`.
        compute: called when the file is missing, damaged or of another key; returns named arrays.

    Raises:
        StorageError: the file cannot be written (no space, no permission). An earlier complete file stays as
            it was.
    """
    path = pathlib.Path(path)
    columns = _read(path, key)
    if columns is None:
        columns = compute()
        if not isinstance(columns, Mapping):
            raise InvalidArgumentError(f"compute must return named arrays, got {shown(columns)}")
        columns = {name: np.asarray(column) for name, column in columns.items()}
        _write(path, key, columns)
    return columns


def _read(path: pathlib.Path, key: str) -> Columns | None:
    """Returns the arrays, or None if the file is missing, of another key or, by its checksums, damaged."""
    try:
        check_regular(path, "cache", DataError)
        with reading(path, DataError), path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found, *names = archive[_FINGERPRINT].tolist()
            if found != key or {*names, _FINGERPRINT} != {*archive.files}:
                return None
            return {name: archive[name] for name in names}
    except DataError:
        return None


def _write(path: pathlib.Path, key: str, columns: Columns) -> None:
    content = io.BytesIO()
    arrays: dict[str, Any] = {_FINGERPRINT: np.array([key, *columns]), **columns}
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())
