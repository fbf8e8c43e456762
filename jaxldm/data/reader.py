"""Batches read ahead while the device computes: by a thread, or by processes for what is dear to decode.

The order comes from the key and the step alone and is drawn in this process; workers are given numbers of
rows. So a batch is the same whatever the number of workers, any step can be the first, and a worker that was
killed costs nothing but the time to read its batch again.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from jaxldm.arguments import checked, count, refuse
from jaxldm.data.batches import Rows
from jaxldm.errors import DataError, InvalidArgumentError

Batch = dict[str, Shaped[np.ndarray, "B ..."]]
MOST_RESTARTS = 3  # of workers in a row, before their death is taken to be the data's fault
_rows: Any = None  # in a worker: what it reads from


@runtime_checkable
class OrderedBatches(Protocol):
    """`Batches` and `BucketedBatches`: rows, and which of them are in a batch."""

    rows: Rows
    batch_size: int

    def __len__(self) -> int: ...

    def row_numbers(self, step: int) -> Int[np.ndarray, "B"]: ...


def SOME_BATCHES(name: str, value: Any) -> Any:
    """What `OrderedBatches` describes."""
    if isinstance(value, type) or not isinstance(value, OrderedBatches):
        raise refuse(name, "data.Batches(rows, batch_size, key) or data.BucketedBatches(...)", value)
    return value


class Reader:
    """The same batches, read ahead: `reader[step]`. `with Reader(...) as reader` ends its workers, too.

    Args:
        batches: `Batches` or `BucketedBatches`.
        num_workers: processes that read; 0: a thread of this one. The rows must then be picklable.
        ahead: batches that are read before they are asked for; 0: none.
        process: of several that train together, whose part of each batch is read: number `process` of
            `num_processes` equal ones, in the order of the batch. No two see the same example.
        num_processes: their number.

    Attributes:
        waited: seconds that `reader[step]` has waited for data so far.

    Raises:
        InvalidArgumentError: the batch cannot be split over so many processes.

    >>> import jax
    >>> from jaxldm.data import Batches
    >>> batches = Batches({"label": np.arange(10)}, 4, jax.random.key(0))
    >>> with Reader(batches, process=1, num_processes=2) as reader:
    ...     bool((reader[5]["label"] == batches[5]["label"][2:]).all())
    True
    """

    @checked(
        batches=SOME_BATCHES,
        num_workers=count(0, 1024),
        ahead=count(0, 2**16),
        process=count(0),
        num_processes=count(1),
    )
    def __init__(
        self,
        batches: Any,
        *,
        num_workers: int = 0,
        ahead: int = 1,
        process: int = 0,
        num_processes: int = 1,
    ):
        if batches.batch_size % num_processes or process >= num_processes:
            raise InvalidArgumentError(
                f"a batch of {batches.batch_size} cannot be split over {num_processes} processes, of which "
                f"this is number {process}: give a batch_size that is a multiple, and a number below theirs"
            )
        self.batches, self.num_workers, self.ahead, self.waited = batches, num_workers, ahead, 0.0
        part = batches.batch_size // num_processes
        self._part = slice(process * part, (process + 1) * part)
        self._pool: Executor | None = None
        self._pending: dict[int, Future[Batch]] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, or this process's part of it. Raises `DataError` where it cannot be read."""
        started = time.perf_counter()
        for attempt in range(MOST_RESTARTS + 1):
            try:
                self._submit(step)
                batch = self._pending[step].result()
                break
            except BrokenExecutor as error:  # a worker was killed, perhaps for its memory
                self.close()
                if attempt == MOST_RESTARTS:
                    raise DataError(
                        f"the processes that read batch {step} ended {attempt + 1} times: there may be too "
                        "little memory for them, use fewer workers"
                    ) from error
        del self._pending[step]
        self.waited += time.perf_counter() - started
        return batch

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of the first epoch."""
        return (self[step] for step in range(len(self)))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._pending = None, {}

    def _submit(self, step: int) -> None:
        """Have this batch and the next ones read."""
        if self._pool is None:
            self._pool = self._new_pool()
        wanted = range(step, step + 1 + self.ahead)
        self._pending = {kept: future for kept, future in self._pending.items() if kept in wanted}
        for number in wanted:
            if number not in self._pending:
                rows = self.batches.row_numbers(number)[self._part]
                task = _take_here if self.num_workers else self.batches.rows.take
                self._pending[number] = self._pool.submit(task, rows)

    def _new_pool(self) -> Executor:
        if not self.num_workers:
            return ThreadPoolExecutor(1)
        # Not forked from here: JAX has threads, and a fork of them may hang.
        context: Any = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
        if os.name != "nt":
            context.set_forkserver_preload([__name__])  # imported once for all workers
        return ProcessPoolExecutor(self.num_workers, context, _begin_worker, (self.batches.rows,))


def _begin_worker(rows: Rows) -> None:
    """In a worker: keep what is read from, leave Ctrl-C to the training, and end when that is killed."""
    global _rows
    _rows = rows
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    training = multiprocessing.parent_process()

    def end() -> None:
        multiprocessing.connection.wait([cast(Any, training).sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _take_here(rows: Int[np.ndarray, "B"]) -> Batch:
    """In a worker: some rows."""
    return _rows.take(rows)
