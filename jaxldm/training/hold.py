"""A folder that one process alone writes to, and what became of it: there, moved, removed or replaced."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from jaxldm.errors import CheckpointError
from jaxldm.files import LOCK_FILE, lock, named_holder, storage_errors


class Lost(NamedTuple):
    """What became of a folder that is no longer where it was, and where its process may go on writing."""

    what: str
    place: Path


class HeldFolder:
    """In a `with` block, a folder that no other process may hold: made where needed, locked by `.lock` in it.

    The lock dies with the process, however it ends. Where the file system has no locks, `log` is given one
    line and nothing is locked.
    """

    def __init__(self, path: Path | str, log: Callable[[str], None]):
        self.path = Path(path).absolute()
        number = jax.process_index()  # the processes of one training on several hosts hold it together
        self._lock_file = self.path / (f"{LOCK_FILE}.{number}" if number else LOCK_FILE)
        self._log = log
        self._file = -1
        self._folder = -1
        self._identities: list[tuple[int, int] | None] = []

    def __enter__(self) -> HeldFolder:
        """Raises `CheckpointError` when another process holds the folder, `StorageError` without access."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            while True:
                self._file = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o644)
                taken = lock(self._file)
                if taken is False:
                    holder = named_holder(os.read(self._file, 1000))
                    os.close(self._file)
                    raise CheckpointError(
                        f"{self.path} is in use by {holder}: wait until that ends, or choose another run "
                        "folder"
                    )
                if _same(os.fstat(self._file), self._lock_file):
                    break
                os.close(self._file)  # its holder ended between our two calls, and removed the file
            if taken is None:
                self._log(
                    f"{self.path} is on a file system without locks: do not train in it twice at a time"
                )
            since = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
            who = {"pid": os.getpid(), "host": platform.node(), "since": since}
            os.truncate(self._file, 0)
            os.write(self._file, json.dumps(who).encode())
        self._identities = [_identity(self.path), _identity(self.path.parent)]
        if sys.platform == "linux":
            self._folder = os.open(self.path, os.O_RDONLY)
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # the folder may be gone, or closed for writing
            if _same(os.fstat(self._file), self._lock_file):
                (self._lock_file).unlink()
        for descriptor in (self._file, self._folder):
            if descriptor >= 0:
                os.close(descriptor)

    def lost(self) -> Lost | None:
        """None while the folder is where it was, and otherwise what became of it.

        A moved one goes on in its new place (on Linux, which knows it), a removed one is made again, and next
        to one that another was put in place of, `NAME.rescued` is made.
        """
        here, above = self._identities
        if _identity(self.path) == here:
            return None
        moved = None if self._folder < 0 else Path(os.readlink(f"/proc/self/fd/{self._folder}"))
        if moved is not None and moved != self.path and _identity(moved) == here:
            return Lost(f"was moved to {moved}", moved)
        parent = self.path.parent
        if not self.path.exists() and _identity(parent) in (None, above):
            return Lost("was removed", self.path)
        if self.path.is_dir() and set(os.listdir(self.path)) <= {"checkpoints"}:
            # A save in the background has made its folder again, or the new one is as good as that.
            return Lost("was removed", self.path)
        place = parent.with_name(f"{parent.name}.rescued") / self.path.name
        return Lost("was replaced by another folder", place)

    def check(self) -> None:
        """Raises `CheckpointError` when the folder is not where it was."""
        lost = self.lost()
        if lost is not None:
            raise CheckpointError(
                f"{self.path} {lost.what} during the training, so what was written last is not in it: type "
                "the same command with --resume and the folder that has the checkpoints"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _same(opened: os.stat_result, path: Path) -> bool:
    return _identity(path) == (opened.st_dev, opened.st_ino)
