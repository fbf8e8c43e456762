"""What one kind of fault test gives back."""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    """The outcome of `run(count, seed)` of one kind.

    Attributes:
        name: of the kind, for the table: "kills", "mutated files", "command lines", "misuses".
        count: how many cases were tried.
        faults: one line for each case that went wrong: what was done, and what came of it.
        seconds: of wall-clock time.
    """

    name: str
    count: int
    faults: list[str]
    seconds: float
