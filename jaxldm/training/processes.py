"""Several processes that train one run together, each on its own devices, with a disk that all of them see.

The first one speaks and writes for all. What each has to do itself, such as reading what the first has
written, the others do behind it. A failure of one is a failure of all: none waits for one that is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np

from jaxldm.errors import CheckpointError

Found = TypeVar("Found")


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


def least(number: int) -> int:
    """The smallest of the numbers that the processes give; every process has to call it."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.min(multihost_utils.process_allgather(np.int32(number))))


def together(action: Callable[[], Found]) -> Found:
    """What `action` gives in this process, when it is done in all.

    Raises:
        CheckpointError: it failed in another process. (In that one, its own error.)
    """
    if jax.process_count() == 1:
        return action()
    found, error = cast(Found, None), cast(BaseException | None, None)
    try:
        found = action()
    except BaseException as raised:  # noqa: BLE001  (Ctrl-C too: raised below, when the others know)
        error = raised
    if least(error is None):
        return found
    raise error or CheckpointError(
        "another of the processes that train together has failed, and its message says why: start all of "
        "them again with --resume (resume=True)"
    )


def first_then_others(action: Callable[[], Found]) -> Found:
    """What `action` gives in this process: the others do it when the first is done. Raises as `together`."""
    if jax.process_count() == 1:
        return action()
    nothing = lambda: cast(Found, None)  # noqa: E731
    before = together(action if is_first() else nothing)
    behind = together(nothing if is_first() else action)
    return before if is_first() else behind


def by_first(action: Callable[[], object]) -> None:
    """Do it in the first process alone, for which the others wait. Raises as `together`."""
    together(lambda: action() if is_first() else None)
