"""Writing files so that a reader sees the whole old or the whole new, whenever the writer is killed.

One file is written under a temporary name and renamed. Files that belong together are written into a new
folder, which takes the place of the old one in one system call (Linux: renameat2, macOS: renamex_np). Where
that cannot be (other systems and file systems; a folder that holds other people's files, that is a mount
point, of another user or the working folder), the new folder becomes `.jaxldm-commit` inside the old one,
by one rename, and its files are then moved into place: whoever reads or writes the folder next ends what a
kill interrupted (`finish_interrupted`).

Temporary names are `.NAME.XXXXXXXX.tmp`. Their writer holds a lock on them, which dies with it, so that the
next writer of NAME knows and removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from jaxldm.errors import InvalidArgumentError, StorageError

LOCK_FILE = ".lock"  # of a folder that one process alone works in
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


def expanded(path: str | os.PathLike) -> Path:
    """The path with the home folder in place of ~.

    Raises `InvalidArgumentError` where that is not known, as for a user without an account.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InvalidArgumentError(
            f"the home folder of {str(path)!r} is not known: write the whole path, or set HOME"
        ) from None


Content = bytes | Iterable[bytes | memoryview]

_COMMIT, _OBSOLETE, _INSIDE = ".jaxldm-commit", ".obsolete.json", "jaxldm"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_LEFTOVER = r"\.{}(\.[0-9a-f]+)?\.(tmp|old)"  # with the names of version 0.1
_ABANDONED_AFTER = 24 * 3600  # seconds, of temporary files on systems without locks
_PATIENCE = 30  # seconds, with a writer that is moving files into place
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV)


def write_atomically(path: Path | str, content: Content) -> None:
    """Writes a file under a temporary name, then renames it: `path` holds all the old bytes or all the new.

    Folders are made where needed. A content may be an iterable of pieces; each is requested when the one
    before is written. Raises `StorageError`, and then the old file is as it was.
    """
    path = Path(path)
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with storage_errors(path):
        remove_leftovers(path.parent, path.name)
        temporary, file = _temporary_file(path)
        try:
            with file:
                _write(file, content)
                if fcntl is not None:  # the lock ends with the file; Windows renames closed files only
                    temporary.replace(path)
            if fcntl is None:
                temporary.replace(path)
            _to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_together(
    folder: Path | str, contents: Mapping[str, Content], ours: Callable[[str], bool] = lambda name: True
) -> None:
    """Writes the files of a folder that belong together, as `folder_written_whole` does: all or none.

    Args:
        folder: made where needed.
        contents: name -> content, which may be an iterable of pieces.
        ours: see `folder_written_whole`.

    Raises:
        StorageError: and then all the old files are as they were.
    """
    with folder_written_whole(folder, ours) as partial:
        for name, content in contents.items():
            with storage_errors(Path(folder) / name), (partial / name).open("xb") as file:
                _write(file, content)


@contextlib.contextmanager
def folder_written_whole(
    folder: Path | str, ours: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """Yields a temporary folder to fill, whose files replace those of `folder` when the block ends well.

    A reader finds all the old files or all the new, see the module. Leftovers of a killed attempt are
    removed.

    Args:
        folder: what is to be written.
        ours: whether a file or folder of this name in `folder` is of an earlier attempt, and is replaced or
            removed; others are kept. By default everything is.

    Raises:
        StorageError: and then an earlier `folder` is as it was.
    """
    with storage_errors(folder):
        folder = Path(os.path.realpath(folder))
        finish_interrupted(folder)
        if not folder.parent.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)

        def clear(leftover: Path) -> None:
            _clear(leftover, folder, ours)

        remove_leftovers(folder.parent, folder.name, clear)
        exchange = _may_be_exchanged(folder, ours)
        if not exchange:
            remove_leftovers(folder, _INSIDE)
        with _temporary_folder(folder if exchange else folder / _INSIDE, clear) as partial:
            yield partial
            for path in (*partial.rglob("*"), partial):
                _to_disk(path)
            if not (exchange and _put_in_place(partial, folder)):
                _commit_in_place(partial, folder, ours)


def finish_interrupted(folder: Path | str) -> None:
    """Ends a write of `folder_written_whole` that was killed while it moved files into place.

    Whoever is about to read such a folder calls it first; where nothing was interrupted it costs one look.
    A writer that lives is waited for, half a minute at most, as it only renames. Raises `StorageError` where
    the files cannot be moved, the writer does not end, or the folder may not be looked into.
    """
    commit = Path(folder) / _COMMIT
    try:
        if not commit.is_dir() or commit.is_symlink():
            return
    except PermissionError as error:
        raise StorageError(
            f"cannot read {folder}: no permission to look into this folder (its mode lacks x): change that, "
            "or choose another folder"
        ) from error
    with storage_errors(folder):
        descriptor = os.open(commit, os.O_RDONLY)
        try:
            end = time.monotonic() + _PATIENCE
            while lock(descriptor) is False:
                if time.monotonic() > end:
                    raise StorageError(
                        f"another process began to write {folder} and does not end: stop it, then try again"
                    )
                time.sleep(0.02)
            if commit.is_dir():
                _move_into_place(commit, Path(os.path.realpath(folder)))
        finally:
            os.close(descriptor)


def remove_leftovers(
    folder: Path, name: str | None = None, remove: Callable[[Path], None] | None = None
) -> None:
    """Removes what killed writers of the file or folder `name` left in `folder`; None: of any of them.

    What a living process writes is not touched, nor are other names.
    """
    pattern = _TEMPORARY if name is None else re.compile(_LEFTOVER.format(re.escape(name)))
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
    for path in found:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError:  # gone meanwhile, or of another user
            continue
        try:
            if _is_abandoned(descriptor):
                (remove or _remove)(path)
        finally:
            os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether this is the name of a file or folder that is being written, or that a killed writer left."""
    return name in (_COMMIT, _OBSOLETE) or _TEMPORARY.fullmatch(name) is not None


def remove_folder(folder: Path) -> None:
    """Removes a folder that a reader would take for a whole one: by one rename first."""
    hidden = _temporary_name(folder)
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def lock(descriptor: int) -> bool | None:
    """Locks an open file or folder until it is closed or its process ends, whichever way.

    Returns:
        Whether it is ours now; None where the system or the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def holder(folder: Path) -> str | None:
    """Which process has locked `LOCK_FILE` of a folder, in words; None: none has."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR)
    except OSError:
        return None
    try:
        return named_holder(os.read(descriptor, 1000)) if lock(descriptor) is False else None
    finally:
        os.close(descriptor)


def named_holder(content: bytes) -> str:
    """Who holds a folder, as the content of its lock says."""
    try:
        who = json.loads(content)
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _is_abandoned(descriptor: int) -> bool:
    taken = lock(descriptor)
    if taken is None:
        return time.time() - os.fstat(descriptor).st_mtime > _ABANDONED_AFTER
    return taken


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _temporary_file(path: Path) -> tuple[Path, BinaryIO]:
    """A new locked file next to `path`, and its name."""
    while True:
        temporary = _temporary_name(path)
        file = temporary.open("xb")
        if lock(file.fileno()) is not False and temporary.exists():
            return temporary, file
        file.close()  # another process took it for a leftover, between our two calls


@contextlib.contextmanager
def _temporary_folder(path: Path, clear: Callable[[Path], None]) -> Iterator[Path]:
    """A new folder next to `path`, locked while the block lasts; then `clear` is given what is left of it."""
    while True:
        temporary = _temporary_name(path)
        temporary.mkdir()
        # Windows opens no folders
        descriptor = None if fcntl is None else os.open(temporary, os.O_RDONLY)
        if descriptor is None or (lock(descriptor) is not False and temporary.exists()):
            break
        os.close(descriptor)  # another process took it for a leftover, between our two calls
    try:
        yield temporary
    finally:
        try:
            if temporary.exists():  # not finished; or exchanged, and now the old files
                clear(temporary)
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _write(file: BinaryIO, content: Content) -> None:
    file.writelines([content] if isinstance(content, bytes) else content)
    file.flush()
    os.fsync(file.fileno())


def _may_be_exchanged(folder: Path, ours: Callable[[str], bool]) -> bool:
    """Whether a new folder may take the place of this one, so that nobody misses the old one."""
    if not os.path.lexists(folder):
        return True
    foreign = [name for name in os.listdir(folder) if not ours(name) and not is_temporary(name)]
    writable = all(os.access(place, os.W_OK | os.X_OK) for place in (folder, folder.parent))
    if foreign or not writable or os.path.ismount(folder):
        return False
    if hasattr(os, "geteuid") and folder.stat().st_uid != os.geteuid():
        return False
    try:
        return folder not in (Path.cwd(), *Path.cwd().parents)
    except FileNotFoundError:  # the working folder was removed, so it is not this one
        return True


def _put_in_place(new: Path, folder: Path) -> bool:
    """Renames a folder, or exchanges it with the old one; False where that cannot be."""
    if not folder.exists():
        new.rename(folder)
        _to_disk(folder.parent)
        return True
    shutil.copystat(folder, new)
    if not _exchange(new, folder):
        return False
    _to_disk(folder.parent)
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Gives two folders each other's name, in one system call; False where there is no such call."""
    paths = [os.fsencode(path) for path in (first, second)]
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_working_folder, exchange = -100, 2
        failed = libc.renameat2(at_working_folder, paths[0], at_working_folder, paths[1], exchange)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(paths[0], paths[1], 2)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(second))
    return not failed


def _clear(leftover: Path, folder: Path, ours: Callable[[str], bool]) -> None:
    """Removes a folder that was exchanged or never finished. What others put into it moves to `folder`."""
    if not leftover.is_dir():
        return _remove(leftover)
    for path in list(leftover.iterdir()):
        if ours(path.name) or is_temporary(path.name):
            _remove(path)
        elif folder.is_dir() and not os.path.lexists(folder / path.name):
            path.rename(folder / path.name)
    with contextlib.suppress(OSError):  # not empty: what it holds is not ours to remove
        leftover.rmdir()
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _commit_in_place(new: Path, folder: Path, ours: Callable[[str], bool]) -> None:
    """Replaces files inside a folder that stays: one rename says that all the new ones count from now on."""
    fresh = set(_files_in(new, "*"))
    replaced = [name for name in os.listdir(folder) if ours(name) and not is_temporary(name)]
    old = {file for name in replaced for file in _files_in(folder, glob.escape(name))}
    for name in fresh | old:
        _inside(folder, name)
    with (new / _OBSOLETE).open("xb") as file:
        _write(file, json.dumps(sorted(old - fresh)).encode())
    commit = folder / _COMMIT
    new.rename(commit)
    _to_disk(folder)
    _move_into_place(commit, folder)


def _files_in(folder: Path, pattern: str) -> list[str]:
    """The files below the entries of a folder that match, relative to it."""
    found = [path for entry in folder.glob(pattern) for path in (entry, *entry.rglob("*"))]
    return [path.relative_to(folder).as_posix() for path in found if path.is_symlink() or path.is_file()]


def _move_into_place(commit: Path, folder: Path) -> None:
    """Ends a commit; the same whether nothing, a part or all of it was done before."""
    listed = commit / _OBSOLETE
    try:
        obsolete = json.loads(listed.read_bytes()) if listed.is_file() else []
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{listed} is damaged, so it is unknown what to keep: remove {commit}") from error
    fresh = [name for name in _files_in(commit, "*") if name != _OBSOLETE]
    for name in fresh:
        target = _inside(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        (commit / name).replace(target)
    for name in obsolete:
        target = _inside(folder, name)
        target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            while target.parent != folder:
                target = target.parent
                target.rmdir()
    _to_disk(folder)
    shutil.rmtree(commit, ignore_errors=True)


def _inside(folder: Path, name: object) -> Path:
    """A path in the folder. Raises `StorageError` for one that leads out of it, by a link or a forgery."""
    target = folder / str(name)
    normal = os.path.normpath(target) == str(target) and os.path.realpath(target.parent) == str(target.parent)
    if not normal or target == folder or not target.is_relative_to(folder):
        raise StorageError(
            f"{target} leads out of {folder}, where it should be written: remove that link, or {_COMMIT}"
        )
    return target


def _to_disk(path: Path) -> None:
    if fcntl is None and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
