"""Batches as a pure function of the step: `batches[step]` depends only on the data, the key and the step.

So a run resumed in the middle of an epoch sees the same batches, and no position of an iterator is saved.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray, Shaped

from jaxldm.arguments import array, checked, count, flag, instance, one_key, optional, refuse, text
from jaxldm.arguments import function as a_function
from jaxldm.errors import DataError, InvalidArgumentError


@runtime_checkable
class Rows(Protocol):
    """Examples with random access, in memory or on disk."""

    def __len__(self) -> int: ...

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        """Returns the named columns of the examples `rows`."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayRows:
    """Examples in memory: named arrays, one row per example. Raises `DataError` if their lengths differ."""

    columns: Mapping[str, Shaped[np.ndarray, "N ..."]]

    def __post_init__(self):
        instance(Mapping, "a dictionary of arrays, one row per example")("columns", self.columns)
        columns = {name: _column(f"columns[{name!r}]", column) for name, column in self.columns.items()}
        lengths = {name: len(column) if column.ndim else 0 for name, column in columns.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise DataError(f"columns must have one row per example, and at least one, got lengths {lengths}")
        object.__setattr__(self, "columns", columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        return {name: column[rows] for name, column in self.columns.items()}


def _column(name: str, column: Any) -> Shaped[np.ndarray, "N ..."]:
    """An array of numbers or texts. Raises `InvalidArgumentError` for other things."""
    try:
        array = np.asarray(column)
    except ValueError:  # rows of different lengths
        raise refuse(name, "an array", column) from None
    if array.dtype == object:
        raise refuse(name, "an array", column)
    return array


def SOME_ROWS(name: str, value: Any) -> Any:
    """Named arrays, or examples on disk."""
    if isinstance(value, Mapping) or (isinstance(value, Rows) and not isinstance(value, np.ndarray)):
        return value
    raise refuse(name, "named arrays, {'image': [N, H, W, C], ...}, or the rows of a split", value)


class Batches:
    """Shuffled batches of equal size: `batches[step]` for any step >= 0.

    Epoch e = step // len(batches) visits every example at most once, in the order
    `jax.random.permutation(fold_in(key, e), N)`. The last examples, which do not fill a batch, are left out;
    they differ from epoch to epoch. `len(batches)` is the number of steps in an epoch.

    Args:
        rows: named arrays with a row per example, `{"image": [N, H, W, C], "label": [N]}`, or any `Rows`,
            such as `dataset.rows("train")`, which reads from disk.
        batch_size: examples in a batch, at least 1 and at most N.
        key: a JAX key.
        shuffle: False keeps the order of the rows in every epoch.
        part: the places in a batch to read, such as slice(0, 32), and no others: the share of a process
            where several train together (`jaxldm.training.local_examples`). None: the whole batch.

    Raises:
        InvalidArgumentError: `batch_size` or a step is out of range.
        DataError: the columns differ in length.

    >>> import jax, numpy as np
    >>> batches = Batches({"image": np.zeros([10, 2, 2, 1]), "label": np.arange(10)}, 4, jax.random.key(0))
    >>> len(batches), batches[7]["image"].shape
    (2, (4, 2, 2, 1))
    """

    @checked(
        rows=SOME_ROWS,
        batch_size=count(-(2**31)),
        key=one_key,
        shuffle=flag,
        part=optional(instance(slice, "a slice of the places in a batch")),
    )
    def __init__(
        self,
        rows: Rows | Mapping[str, Shaped[np.ndarray, "N ..."]],
        batch_size: int,
        key: PRNGKeyArray,
        *,
        shuffle: bool = True,
        part: slice | None = None,
    ):
        self.rows = ArrayRows(rows) if isinstance(rows, Mapping) else rows
        if not 1 <= batch_size <= len(self.rows):
            raise InvalidArgumentError(
                f"batch_size must be between 1 and the number of examples, {len(self.rows)}, got {batch_size}"
            )
        self.batch_size, self.key, self.shuffle = batch_size, key, shuffle
        self.part = slice(None) if part is None else part
        self._order = (-1, np.arange(len(self.rows)))

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def order(self, epoch: int) -> Int[np.ndarray, "N"]:
        """Returns the order in which epoch number `epoch` visits the rows."""
        kept_epoch, order = self._order  # read once: threads of `Reader` share it
        if self.shuffle and kept_epoch != epoch:
            order = np.asarray(jax.random.permutation(jax.random.fold_in(self.key, epoch), len(self.rows)))
            self._order = (epoch, order)  # takes milliseconds to draw, so the last one is cached
        return order

    def row_numbers(self, step: int) -> Int[np.ndarray, "B"]:
        """Returns the rows of batch `step`, or of the part of it."""
        epoch, place = divmod(step, len(self))
        return self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size][self.part]

    @checked(step=count())
    def __getitem__(self, step: int) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        return self.rows.take(self.row_numbers(step))

    def __iter__(self) -> Iterator[dict[str, Shaped[np.ndarray, "B ..."]]]:
        """Yields the batches of the first epoch."""
        return (self[step] for step in range(len(self)))


@dataclasses.dataclass(frozen=True)
class RowsView:
    """The first `length` examples of `rows`, with their columns under other names.

    Attributes:
        names: name here -> name there; other columns are left out.
    """

    rows: Rows
    length: int
    names: Mapping[str, str]

    def __len__(self) -> int:
        return self.length

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        columns = self.rows.take(rows)
        return {name: columns[other] for name, other in self.names.items()}


@dataclasses.dataclass(frozen=True)
class RowsAt:
    """The examples `numbers` of `rows`, in that order."""

    rows: Rows
    numbers: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        return self.rows.take(self.numbers[rows])


@dataclasses.dataclass(frozen=True)
class RowsWith:
    """Examples with further columns, which are in memory."""

    rows: Rows
    columns: Mapping[str, Shaped[np.ndarray, "N ..."]]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        return self.rows.take(rows) | {name: column[rows] for name, column in self.columns.items()}


def _some_rows(name: str, value: Any) -> Any:
    """Rows on disk, or an array of them."""
    on_disk = isinstance(value, Rows) and not hasattr(value, "shape")
    return value if on_disk else array("any", "[N, ...]", axes=(1, 64))(name, value)


@checked(function=a_function("rows -> arrays"), rows=_some_rows, batch_size=count(1), column=optional(text))
def map_batches(
    function: Callable[[Any], Any],
    rows: Shaped[np.ndarray, "N ..."] | Rows,
    batch_size: int = 256,
    column: str | None = "image",
) -> Any:
    """Returns function(rows) [N, ...], computed `batch_size` rows at a time, as numpy arrays.

    `function` maps [B, ...] to a pytree of arrays [B, ...], row by row. The last batch is padded with copies
    of its last row, so that a jitted function compiles once. Of `Rows`, such as pictures on disk, it is given
    the column `column`, of None a dictionary of all.
    """
    if len(rows) == 0:
        raise DataError("there are no rows to map over")
    batch_size = min(batch_size, len(rows))
    results = []
    for start in range(0, len(rows), batch_size):
        if hasattr(rows, "shape"):
            part = cast(Any, rows)[start : start + batch_size]
        else:
            part = cast(Rows, rows).take(np.arange(start, min(start + batch_size, len(rows))))
            part = part if column is None else part[column]
        size = min(batch_size, len(rows) - start)
        filled = jax.tree.map(
            lambda array, more=batch_size - size: np.concatenate(
                [array, np.repeat(array[-1:], more, axis=0)]
            ),
            part,
        )
        results.append(jax.tree.map(lambda array, size=size: np.asarray(array)[:size], function(filled)))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *results)
