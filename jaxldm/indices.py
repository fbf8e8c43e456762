"""Indices that come from outside: refused where they are beyond their table.

Inside of a compiled program JAX takes the nearest row for such an index, without a word.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxldm.arguments import is_tracer
from jaxldm.errors import InvalidArgumentError


def check_indices(
    what: str, indices: Any, rows: int, *, where: str = "", fix: str = "", allowed: int | None = None
) -> None:
    """Raises `InvalidArgumentError` unless all indices are in [0, rows). Those of tracers cannot be seen.

    Args:
        what: the indices, for the message.
        indices: an array of whole numbers, or nested lists of them.
        rows: of the table.
        where: the table, for the message.
        fix: what may have gone wrong, and what to do.
        allowed: one more index that is right, such as that of a mask token.

    >>> check_indices("labels", [0, 9], 10)
    """
    if is_tracer(indices):
        return
    seen = np.asarray(indices)  # JAX's own operations would be traced inside of jit
    wrong = (seen < 0) | (seen >= rows)
    if allowed is not None:
        wrong &= seen != allowed
    if wrong.any():
        more = "" if allowed is None else f" or be {allowed}"
        of = f" for {where}" if where else ""
        raise InvalidArgumentError(
            f"{what} must lie in [0, {rows - 1}]{more}{of}, got {seen[wrong][0]}{': ' if fix else ''}{fix}"
        )
