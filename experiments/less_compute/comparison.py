"""What the scripts of this folder share: rows against the first one and against fewer steps, and their plot.

A row is a dictionary with `name`, `kind`, `seconds` and `distance`, and whatever else a script has. The first
one is the whole run; rows of the kind `FEWER_STEPS` are the same network in fewer steps, which costs nothing
else, so that all others are measured by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import save_figure

FEWER_STEPS = "fewer steps"
Row = dict[str, Any]


def with_comparison(rows: Sequence[Row]) -> list[Row]:
    """The rows with what they are to the first one, and to fewer steps of the same seconds.

    Returns:
        Each row with `speedup` (times faster than the first), `worse` (of its distance, relative to that of
        the first) and `baseline`: the distance of fewer steps in as many seconds, on straight lines between
        those rows, and that of the nearest one outside of them.
    """
    whole = rows[0]
    plain = [row for row in rows if row is whole or row["kind"] == FEWER_STEPS]
    seconds, distances = zip(*sorted((row["seconds"], row["distance"]) for row in plain), strict=True)
    return [
        {
            **row,
            "speedup": whole["seconds"] / row["seconds"],
            "worse": row["distance"] / whole["distance"] - 1,
            "baseline": float(np.interp(row["seconds"], seconds, distances)),
        }
        for row in rows
    ]


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows than which no other is as fast and as good, and better in one of the two; fastest first."""

    def beats(other: Row, row: Row) -> bool:
        a, b = ((each["seconds"], each["distance"]) for each in (other, row))
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    left = [row for row in rows if not any(beats(other, row) for other in rows)]
    return sorted(left, key=lambda row: row["seconds"])


def plot(
    path: Path,
    title: str,
    rows: Sequence[Row],
    unit: str = "seconds",
    scale: float = 1.0,
    frontier: Sequence[Row] = (),
) -> None:
    """Distance against seconds: a line for each kind, the one of fewer steps in black.

    Args:
        path: of the PNG.
        title: of the figure.
        rows: the first one is the whole run, whose distance is a dotted line.
        unit: below the axis.
        scale: of this unit in a second: 1000 for milliseconds.
        frontier: rows that get a ring, of `pareto`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        points = sorted((scale * row["seconds"], row["distance"]) for row in rows if row["kind"] == kind)
        style = {"color": "black", "linewidth": 2.5} if kind == FEWER_STEPS else {"linewidth": 1}
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=kind, **style)
    if frontier:
        points = [(scale * row["seconds"], row["distance"]) for row in frontier]
        ring = {"markersize": 11, "markerfacecolor": "none", "color": "grey", "label": "Pareto frontier"}
        axes.plot(*zip(*points, strict=True), "o", **ring)
    axes.axhline(rows[0]["distance"], color="grey", linestyle=":", linewidth=1)
    axes.set(title=title, xlabel=unit, ylabel="Fréchet distance / floor", yscale="log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")  # 2 in place of 2 x 10^0
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(path, figure)
