"""Writing files so that a kill or a full disk never leaves half of one under its final name."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxldm.errors import StorageError

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is exceeded: free some space",
    errno.EFBIG: "the file would be larger than this process may write: raise `ulimit -f`",
    errno.EACCES: "no permission to write: choose another folder",
    errno.EPERM: "no permission to write: choose another folder",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.ENOTDIR: "part of that path is a file and not a folder: choose another path",
    errno.EISDIR: "there is a folder of that name: choose another path",
    errno.EEXIST: "there is a file of that name: choose another path",
}


def storage_error(error: BaseException, target: Path | str) -> StorageError | None:
    """The `StorageError` that says why writing `target` failed; None for an error of another kind.

    Looks through causes and contexts, and at the text where a library passes on only that.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StorageError):
            return seen
        if isinstance(seen, OSError) and seen.errno in _REASONS:
            return StorageError(f"cannot write {target}: {_REASONS[seen.errno]}, then try again")
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            if os.strerror(code) in str(seen):
                return StorageError(f"cannot write {target}: {_REASONS[code]}, then try again")
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def storage_errors(target: Path | str) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into a `StorageError` that names `target`."""
    try:
        yield
    except OSError as error:
        translated = storage_error(error, target)
        if translated is None or translated is error:
            raise
        raise translated from error


def write_atomically(path: Path | str, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it: `path` holds all the old bytes or all the new.

    Folders are made where needed. Raises `StorageError`, and then the old file is as it was.
    """
    write_together({Path(path): content})


def write_together(contents: Mapping[Path, bytes | Iterable[bytes | memoryview]]) -> None:
    """Writes files that belong together: none is renamed before the last byte of all of them is on disk.

    Folders are made where needed. A content may be an iterable of pieces; each is requested when the one
    before is written. Raises `StorageError`, and then all the old files are as they were.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    for folder in {path.parent for path in contents}:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    try:
        for path, content in contents.items():
            with storage_errors(path), temporary[path].open("wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            with storage_errors(path):
                temporary[path].replace(path)
                _to_disk(path.parent)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(folder: Path | str) -> Iterator[Path]:
    """Yields a temporary folder to fill, which replaces `folder` when the block ends without an error.

    So `folder` exists only when everything in it was written. Leftovers of a killed attempt are removed.
    Raises `StorageError`, and then an earlier `folder` is as it was.
    """
    folder = Path(folder)
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    with storage_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                _to_disk(file)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)  # a folder that is not empty cannot be renamed over
            temporary.rename(folder)
            _to_disk(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
