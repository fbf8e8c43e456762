"""How a scheduler makes a run: by the rule of its rows. `Quirks` makes it as diffusers does."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxldm import diffusion as D
from jaxldm.schedulers.grids import GridRule


@dataclasses.dataclass(frozen=True)
class Runs:
    """How a scheduler makes a run, cuts it, and samples a part of it."""

    def run(self, sampler: Any, rule: GridRule, path: D.Path, count: int) -> tuple[Any, D.Grid]:
        """(sampler, rows) of N steps.

        Args:
            sampler: a `Sampler`.
            rule: of the rows.
            path: with its shift.
            count: N.
        """
        return sampler, rule.make(path, count)

    def cut_by_strength(self, rows: D.Grid, count: int, strength: float, *, round_up: bool) -> D.Grid:
        """The rows of image-to-image, of those of N steps."""
        return D.cut_by_strength(rows, strength, round_up=round_up)

    def part(self, sampler: Any, whole: D.Grid) -> Any:
        """The sampler of a part of the run whose rows these are."""
        return sampler

    def shift_of_levels(self, path: D.Path) -> float | None:
        """The shift of noise levels that a call writes down; None: they are as written."""
        return None


PLAIN = Runs()
