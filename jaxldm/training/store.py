"""Checkpoints of a training run: Orbax on disk, written in the background, whole or absent."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxldm.errors import CheckpointError, StorageError
from jaxldm.exact import LARGEST_INT32
from jaxldm.files import folder_written_whole, remove_folder, storage_error, storage_errors
from jaxldm.reading import MAX_JSON_BYTES, read_bytes
from jaxldm.training.mesh import on_host
from jaxldm.training.processes import by_first, is_first, least, together
from jaxldm.training.sealed import sealed, unsealed

MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest; 1 (no entry) had the parameters as one vector
_MARGIN = 1_000_000  # bytes, for the metadata
# What a failed write raises in Orbax and TensorStore, besides OSError: some pass on only the text of the
# cause.
_FAILURES = (OSError, ValueError, RuntimeError)


class _DamagedError(Exception):
    """What is wrong with the files of a checkpoint."""


class Restored(NamedTuple):
    """A state read back, on the host, and its step."""

    step: int
    state: Any


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _to_host(tree: Any) -> dict[str, np.ndarray]:
    """Path -> a copy in host memory. A copy: on CPU `device_get` gives a view, and the train step overwrites
    its (donated) state while the checkpoint is still being written."""
    return {name: np.array(value, copy=True) for name, value in on_host(_by_name(tree)).items()}


def _by_name(tree: Any) -> dict[str, Any]:
    """Path -> array; keys as their numbers."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in named}


def _new_folder(path: Path) -> None:
    with storage_errors(path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """File -> its size and the CRC-32 of its bytes."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            content = file.read_bytes()
            sums[file.relative_to(folder).as_posix()] = [len(content), zlib.crc32(content)]
    return sums


def _layout(tree: Any) -> dict[str, list]:
    """Path -> type and shape of an array, as it is written."""
    layout = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        leaf = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        layout[_name(path)] = [str(np.dtype(leaf.dtype)), *leaf.shape]
    return layout


class TrainingStore:
    """The checkpoints of one run, `<step>/state` by Orbax and `<step>/manifest.json`; used in a `with` block.

    `save` copies the state to host memory and returns; a background thread writes it under a temporary name
    and renames it when every byte is on disk. The manifest holds the layout of the arrays, and the size and
    CRC-32 of every file, of itself too: so `restore_latest` knows a whole checkpoint from a damaged one,
    whatever happened to its files. The `keep` newest stay. Leaving the block waits for the last save.

    Where several processes train together, all of them call it: each writes and reads the parts of the arrays
    that lie on its own devices, into one checkpoint, on a disk that all of them see. No array is whole in the
    memory of a host. The first process adds the manifest, and clears what is old.

    `in_place()` says whether the folder still is that of this run: where it is not, a save fails.
    """

    def __init__(self, folder: Path | str, keep: int = 2, in_place: Callable[[], bool] = lambda: True):
        self.folder = Path(folder).absolute()
        self._keep, self._in_place = keep, in_place
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def __enter__(self) -> TrainingStore:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(place.name) for place in self.folder.iterdir() if place.is_dir() and place.name.isdigit()
        )

    def save(self, step: int, state: Any) -> None:
        """Copy `state` and write it in the background, after the save before has ended.

        Raises `StorageError` when the disk has no room, or when the save before failed; what was whole stays
        whole.
        """

        def ready() -> None:
            self.wait()
            self.check_space(state)

        together(ready)
        if jax.process_count() == 1:
            self._pending = self._thread.submit(self._write, step, _to_host(state))
            return
        parts = self.folder / f".{step}.parts.tmp"
        by_first(lambda: _new_folder(parts))
        with storage_errors(parts), _quiet_orbax() as ocp:
            checkpointer = ocp.StandardCheckpointer()
            arrays = _by_name(state)
            if jax.default_backend() == "cpu":  # see `_to_host`
                arrays = {name: jax.numpy.array(array, copy=True) for name, array in arrays.items()}
            checkpointer.save(parts / "state", arrays)
        self._pending = self._thread.submit(self._end_together, step, checkpointer, parts, _layout(state))

    def wait(self) -> None:
        """Return when the last save is on disk; raises `StorageError` when it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check_space(self, state: Any) -> None:
        """Raise `StorageError` when the disk has no room for a checkpoint of `state`."""
        arrays = [leaf for leaf in jax.tree.leaves(state) if not _is_key(leaf)]
        needed = _MARGIN + sum(array.size * array.dtype.itemsize for array in arrays)
        place = next(parent for parent in (self.folder, *self.folder.parents) if parent.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(
                f"disk full: a checkpoint needs {needed / 1e6:.1f} MB and {place} has "
                f"{free / 1e6:.1f} MB left: free some space{self._what_is_left()}"
            )

    def _what_is_left(self) -> str:
        steps = self.steps()
        return f"; the checkpoint of step {steps[-1]} is whole" if steps else ""

    def _write(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        def fill(folder: Path) -> None:
            _claim_room(folder / "room", sum(value.nbytes for value in arrays.values()))
            with _quiet_orbax() as ocp, _quiet_threads(), _of_this_process(ocp) as checkpointer:
                checkpointer.save(folder / "state", arrays)

        self._put(step, fill, _layout(arrays))

    def _end_together(self, step: int, checkpointer: Any, parts: Path, layout: dict[str, list]) -> None:
        """Wait until every process has written its parts; the first makes a checkpoint of them."""

        def fill(folder: Path) -> None:
            (parts / "state").rename(folder / "state")

        with storage_errors(parts):
            checkpointer.close()  # the same moment in all processes
        if is_first():
            self._put(step, fill, layout)

    def _put(self, step: int, fill: Callable[[Path], None], layout: dict[str, list]) -> None:
        """Fill a folder, add the manifest, and put it in place when every byte is on disk."""
        try:
            self._check_place()
            with folder_written_whole(self.folder / str(step)) as folder:
                fill(folder)
                manifest = {"format": FORMAT, "step": step, "layout": layout, "files": _checksums(folder)}
                (folder / MANIFEST).write_bytes(sealed(manifest))
                self._check_place()
        except _FAILURES as error:
            translated = storage_error(error, self.folder / str(step))
            if translated is None:
                raise
            raise StorageError(f"{translated}{self._what_is_left()}") from error
        killed = self.folder.glob(".*.tmp")  # what a killed save left behind
        for leftover in killed:
            shutil.rmtree(leftover, ignore_errors=True)
        for old in self.steps()[: -self._keep]:
            remove_folder(self.folder / str(old))

    def _check_place(self) -> None:
        if not self._in_place():
            raise StorageError(f"cannot write {self.folder}: it is no longer the folder of this run")

    def restore_latest(
        self, template: Any, log: Callable[[str], None] = print, shardings: Any = None
    ) -> Restored | None:
        """The newest whole checkpoint, as host arrays in the tree of `template`; None when there is none.

        A damaged one is set aside as `<step>.damaged`, with one line through `log`, and the one before it is
        tried. On which devices the state lay when it was saved does not matter.

        Args:
            template: a state of the same shapes and types.
            log: takes each line of text.
            shardings: of several processes the sharding of each array, and then each reads its own parts, and
                the arrays are on their devices.

        Raises:
            CheckpointError: the arrays have other names, shapes or types than `template` (another model), or
                the checkpoint is of another version's format.
        """
        self.wait()
        together = jax.process_count() > 1 and shardings is not None
        found = self._newest_whole(log) if is_first() or not together else LARGEST_INT32
        if together:  # what the first has found
            found = least(-1 if found is None else found)
            found = None if found < 0 else found
        if found is None:
            return None
        folder, wanted = self.folder / str(found), _layout(template)
        manifest = _manifest(folder, found)
        if not together:
            return Restored(found, _into(template, _read_arrays(folder, manifest, wanted)))
        _check_manifest(folder, manifest, wanted)
        placed = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            for (name, array), sharding in zip(
                _by_name(template).items(), jax.tree.leaves(shardings), strict=True
            )
        }
        with _quiet_orbax() as ocp, ocp.StandardCheckpointer() as checkpointer:
            return Restored(found, _into(template, checkpointer.restore(folder / "state", placed)))

    def _newest_whole(self, log: Callable[[str], None]) -> int | None:
        """The newest step whose checkpoint is whole; those that are not are set aside."""
        steps = self.steps()
        for step in reversed(steps):
            folder = self.folder / str(step)
            try:
                _whole_manifest(folder, step)
            except _DamagedError as damage:
                aside = folder.with_name(f"{step}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                log(f"the checkpoint of step {step} is damaged ({damage}); it is set aside as {aside}")
                continue
            return step
        if steps:
            log("no whole checkpoint is left: this stage begins again")
        return None

    def read(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of one checkpoint by their paths in the state ("ema_params/conv_in/kernel").

        Raises `CheckpointError` for one that is absent, damaged, or of another version's format. Nothing is
        changed, so that a run may go on meanwhile.
        """
        folder = self.folder / str(step)
        try:
            manifest = _whole_manifest(folder, step)
        except _DamagedError as damage:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {damage}") from damage
        return _read_arrays(folder, manifest)

    def has_whole(self) -> bool:
        """Whether a checkpoint is whole, of whatever model."""
        return any(_is_whole(self.folder / str(step), step) for step in self.steps())


def _claim_room(file: Path, size: int) -> None:
    """Raise `OSError` when `size` bytes cannot be had, by a quota too, which the free space does not show.

    Asked before Orbax begins: its own failure is an exception as well, but with a traceback per array on the
    screen.
    """
    if hasattr(os, "posix_fallocate"):
        with file.open("wb") as handle:
            try:
                os.posix_fallocate(handle.fileno(), 0, size + _MARGIN)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # cannot promise room
                    raise
        file.unlink()


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises `_DamagedError`."""
    path = folder / MANIFEST
    try:
        manifest = unsealed(read_bytes(path, MAX_JSON_BYTES), path, ("format", "step", "layout", "files"))
        files = {name: list(wanted) for name, wanted in manifest["files"].items()}
        layout = {name: [dtype, *shape] for name, (dtype, *shape) in manifest["layout"].items()}
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _DamagedError(f"{MANIFEST} is missing or unreadable") from error
    if manifest.get("step", step) != step:
        raise _DamagedError(f"its {MANIFEST} is of step {manifest['step']}")
    return manifest | {"files": files, "layout": layout}


def _whole_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are those that were written. Raises `_DamagedError`."""
    manifest, found = _manifest(folder, step), _checksums(folder)
    for name, wanted in manifest["files"].items():
        if name not in found:
            raise _DamagedError(f"{name} is missing")
        if found[name][:1] != wanted[:1]:
            raise _DamagedError(f"{name} has {found[name][0]} bytes instead of {wanted[0]}")
        if found[name] != wanted:
            raise _DamagedError(f"the bytes of {name} have changed")
    return manifest


def _read_arrays(
    folder: Path, manifest: dict[str, Any], wanted: dict[str, list] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a whole checkpoint. Raises `CheckpointError` for another format, or another layout."""
    _check_manifest(folder, manifest, wanted)
    abstract = {name: np.empty(shape, dtype) for name, (dtype, *shape) in manifest["layout"].items()}
    with _quiet_orbax() as ocp, _of_this_process(ocp) as checkpointer:
        return checkpointer.restore(folder / "state", abstract)


def _check_manifest(folder: Path, manifest: dict[str, Any], wanted: dict[str, list] | None) -> None:
    """Raise `CheckpointError` for another format, or another layout than is wanted."""
    if manifest.get("format", 1) != FORMAT:
        raise CheckpointError(
            f"{folder} is a checkpoint of format {manifest.get('format', 1)}, this version reads "
            f"{FORMAT}: finish the run with the version that began it, or start a new run"
        )
    if wanted is not None:
        _check_layout(folder, manifest["layout"], wanted)


def _is_whole(folder: Path, step: int) -> bool:
    try:
        return bool(_whole_manifest(folder, step))
    except _DamagedError:
        return False


@contextlib.contextmanager
def _quiet_orbax():
    """The Orbax module, its step-by-step reports held back: a failure comes as an exception anyway."""
    import orbax.checkpoint as ocp

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield ocp
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _quiet_threads():
    """Hold back the tracebacks of threads whose event loop has ended, as a failed write of Orbax ends it.

    One for each array that is still being written, and that one write has failed comes as an exception. When
    it has, they are held back from then on, as nobody knows when the last of them ends; other errors are not.
    """
    before = sys.unraisablehook  # TensorStore calls the loop from threads that no code of Python is in

    def hook(unraisable):
        if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    yield
    if sys.unraisablehook is hook:
        sys.unraisablehook = before


def _of_this_process(ocp: Any) -> Any:
    """A checkpointer that waits for no other process: the arrays are whole, in host memory."""
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    number = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"process{number}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _check_layout(place: Path, saved: dict[str, list], wanted: dict[str, list]) -> None:
    if saved == wanted:
        return
    name = next(name for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name))
    describe = lambda entry: "absent" if entry is None else f"{entry[0]} {entry[1:]}"  # noqa: E731
    raise CheckpointError(
        f"{place} is of another model: {name!r} is {describe(saved.get(name))} in it and "
        f"{describe(wanted.get(name))} now; resume with the recipe that began this run"
    )


def _into(template: Any, arrays: Mapping[str, Any]) -> Any:
    def leaf_of(path, leaf):
        value = cast(Any, arrays[_name(path)])
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value

    return jax.tree_util.tree_map_with_path(leaf_of, template)
