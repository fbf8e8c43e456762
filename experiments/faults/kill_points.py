"""Kills a writer at any one of its operations on files.

`kill_points(folder, at=k)` patches what Python changes files with (`os` functions, `open` and the files that
it gives, the exchange of folders in `jaxldm.files`), and kills in place of operation k on something below the
folder: every rename, removal, new file or folder, write and fsync is one. A write is done by half.

By default a kill is the exception `Killed` here, in this process, after which no operation below the folder
is done any more, whatever `except` and `finally` try: on the disk it is as after `kill -9`, in milliseconds.
Given `kill=die`, it is `kill -9` itself.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from jaxldm import files

_FUNCTIONS = (
    "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "write", "fsync",
    "posix_fallocate", "ftruncate", "truncate",
)  # fmt: skip


class Killed(BaseException):
    """Stands for `kill -9`."""


def die() -> None:
    """`kill -9` of this process by itself."""
    os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """What was done below the folder so far.

    Attributes:
        done: the names of the operations.
    """

    def __init__(self, folder: Path, at: int | None, kill: Callable[[], None] | None):
        self.done: list[str] = []
        self._root = os.path.realpath(folder)
        self._at, self._kill, self._dead, self._lock = at, kill, False, threading.Lock()

    def concerns(self, place: Any, dir_fd: int | None = None) -> bool:
        """Whether a path or a descriptor lies below the folder."""
        if isinstance(place, int):
            path = os.readlink(f"/proc/self/fd/{place}")
        else:
            base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            path = os.path.join(base, os.fsdecode(place))
        return path == self._root or path.startswith(self._root + os.sep)

    def count(self, name: str, before: Callable[[], object] = lambda: None) -> None:
        """Counts an operation, or kills in its place, after `before`."""
        with self._lock:
            if self._dead:
                raise Killed
            if len(self.done) == self._at:
                self._dead = True
                before()
                if self._kill is not None:
                    self._kill()
                raise Killed
            self.done.append(name)


class _File(io.FileIO):
    """A file without a buffer, each of whose writes is counted."""

    counter: Counter

    def write(self, data: Any, /) -> int:
        content = memoryview(data).cast("B")
        super_write = super().write
        self.counter.count("write", lambda: super_write(content[: len(content) // 2]))
        return super_write(content)


@contextlib.contextmanager
def kill_points(
    folder: Path | str, at: int | None = None, kill: Callable[[], None] | None = None
) -> Iterator[Counter]:
    """Counts the operations on what lies below `folder` in the block, and kills in place of one.

    Args:
        folder: what is written; elsewhere everything goes on.
        at: number of the operation, from 0; None only counts.
        kill: what a kill is; None: the exception `Killed`.
    """
    counter = Counter(Path(folder), at, kill)
    real_open, real_os_open, exchange = io.open, os.open, files._exchange

    def counted(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(place, *args, **options):
            if counter.concerns(place, options.get("dir_fd", options.get("src_dir_fd"))):
                counter.count(name)
            return function(place, *args, **options)

        return call

    def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *args, **options):
        writes = any(letter in mode for letter in "wax+") and not isinstance(file, int)
        if not writes or not counter.concerns(file):
            return real_open(file, mode, buffering, encoding, errors, newline, *args, **options)
        counter.count("open")
        opened = _File(file, mode.replace("b", "").replace("t", ""))
        opened.counter = counter
        if "b" in mode:
            return opened
        return io.TextIOWrapper(opened, encoding, errors, newline, write_through=True)  # type: ignore[arg-type]

    def open_descriptor(path, flags, *args, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and counter.concerns(path, options.get("dir_fd")):
            counter.count("open")
        return real_os_open(path, flags, *args, **options)

    with contextlib.ExitStack() as stack:
        patch = lambda *change: stack.enter_context(mock.patch.object(*change))  # noqa: E731
        for name in _FUNCTIONS:
            if hasattr(os, name):
                patch(os, name, counted(name, getattr(os, name)))
        patch(os, "open", open_descriptor)
        patch(io, "open", open_file)
        patch(builtins, "open", open_file)
        patch(files, "_exchange", counted("exchange", exchange))
        yield counter


def moments(folder: Path | str, write: Callable[[], object]) -> list[int]:
    """The operations of a call at which a kill leaves another state than at the one before, and their number.

    A kill after an fsync leaves what one before it leaves.
    """
    with kill_points(folder) as counter:
        write()
    number = len(counter.done)
    return [k for k in range(number + 1) if k in (0, number) or counter.done[k - 1] != "fsync"]


def killed(folder: Path | str, at: int, write: Callable[[], object]) -> bool:
    """Calls `write` and kills it in place of operation `at`; whether it came to that."""
    with kill_points(folder, at):
        try:
            write()
        except Killed:
            return True
    return False
