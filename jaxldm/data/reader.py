"""Batches read ahead by Grain while the device computes, by threads or, where decoding is slow, by processes.

The order comes from the key and the step alone and is drawn in this process; workers are given numbers of
rows. So a batch is the same whatever the number of workers, any step can be the first, and a worker that was
killed costs nothing but the time to read its batch again.

The processes are those of `jaxldm.data.workers`, not Grain's (`mp_prefetch`, looked at in 0.2.18). Batches of
the latter go through /dev/shm, where one larger than it (64 MB in many containers) kills its worker, or else
through a queue, where the rest of what a killed worker was sending is waited for without end; and they get
their data only when they start, so that the order could not be drawn here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from jaxldm.arguments import checked, count, optional, refuse
from jaxldm.data.batches import Rows
from jaxldm.data.workers import Workers
from jaxldm.errors import InvalidArgumentError

Batch = dict[str, Shaped[np.ndarray, "B ..."]]
END = 2**62  # steps: Grain wants a number


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
        num_workers: processes that read; 0: threads of this one. The rows must then be picklable.
        num_threads: threads that read where there are no such processes. Several share the rows.
        ahead: batches that are read before they are asked for; 0: none; None: one for each that reads.
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
        num_threads=count(1, 1024),
        ahead=optional(count(0, 2**16)),
        process=count(0),
        num_processes=count(1),
    )
    def __init__(
        self,
        batches: Any,
        *,
        num_workers: int = 0,
        num_threads: int = 1,
        ahead: int | None = None,
        process: int = 0,
        num_processes: int = 1,
    ):
        if batches.batch_size % num_processes or process >= num_processes:
            raise InvalidArgumentError(
                f"a batch of {batches.batch_size} cannot be split over {num_processes} processes, of which "
                f"this is number {process}: give a batch_size that is a multiple, and a number below theirs"
            )
        at_once = num_workers or num_threads
        self.batches, self.num_workers, self.waited = batches, num_workers, 0.0
        self.ahead = at_once if ahead is None else ahead
        self._num_threads = max(1, min(at_once, self.ahead))
        part = batches.batch_size // num_processes
        self._part = slice(process * part, (process + 1) * part)
        self._workers: Workers | None = None
        self._stream: tuple[int, Iterator[Batch]] | None = None  # the step that comes next, and what gives it

    def __len__(self) -> int:
        return len(self.batches)

    @checked(step=count())
    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, or this process's part of it. Raises `DataError` where it cannot be read."""
        started = time.perf_counter()
        kept, self._stream = self._stream, None  # an iterator that raised is no longer where it was
        stream = kept[1] if kept is not None and kept[0] == step else self._from(step)
        batch = next(stream)
        self._stream = step + 1, stream
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
        self._stream = None
        if self._workers is not None:
            self._workers.close()
        self._workers = None

    def _from(self, step: int) -> Iterator[Batch]:
        """The batches from a step on, without end."""
        import grain

        if self.num_workers and self._workers is None:
            self._workers = Workers(self.batches.rows, self.num_workers)
        # A function of these alone: what is still being read for another step keeps no reader alive.
        read = functools.partial(_read, self.batches, self._part, self._workers or self.batches.rows)
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=self.ahead)
        return iter(grain.MapDataset.range(step, step + END).map(read).to_iter_dataset(options))


def _read(batches: Any, part: slice, source: Workers | Rows, step: int) -> Batch:
    """In a thread of Grain: a part of a batch."""
    return source.take(batches.row_numbers(step)[part])
