"""How an exercise shows what it checked: a line per check with its error, and an exit status for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Check(NamedTuple):
    """One statement, how far it is from true, and how far it may be."""

    what: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound; never for NaN."""
        return self.error <= self.bound


def distance(ours: Any, theirs: Any) -> float:
    """The largest |ours - theirs|, as a share of the largest |theirs|; as it is where theirs is 0.

    Raises `ValueError` for arrays of different shapes.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {ours.shape} and {theirs.shape} cannot be compared")
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1))


def show(title: str, checks: Sequence[Check]) -> None:
    """Prints a line per check; ends the program with status 1 if one of them fails."""
    print(f"\n{title}")
    for check in checks:
        verdict = "PASS" if check.ok else "FAIL"
        # Both with the same digits: rounding then never shows a passing error above its bound.
        print(f"  {verdict}  {check.what:<76s} {check.error:8.1e}  (at most {check.bound:.1e})")
    failed = sum(not check.ok for check in checks)
    if failed:
        raise SystemExit(f"{failed} of {len(checks)} checks failed")
