"""What the scripts of this folder share: solvers, spacings, files of results, tables and pictures."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments.figures import save_figure
from jaxldm import diffusion as D

RESULTS = Path(__file__).parent / "results"
# `euler` and `dpmpp_1s` take the same step as `ddim`.
DETERMINISTIC = {
    "ddim": D.solvers.ddim(),
    "lms": D.solvers.lms(),
    "pndm": D.solvers.pndm(),
    "deis, order 2": D.solvers.deis(order=2),
    "deis, order 3": D.solvers.deis(order=3),
    "dpmpp_2s": D.solvers.dpmpp_2s(),
    "dpmpp_2m": D.solvers.dpmpp_2m(),
    "dpmpp_3m": D.solvers.dpmpp_3m(),
    "unipc, order 2": D.solvers.unipc(order=2),
    "unipc, order 3": D.solvers.unipc(order=3),
    "heun": D.solvers.heun(),
    "dpm2": D.solvers.dpm2(),
    "flow_euler": D.solvers.flow_euler(),
    "flow_heun": D.solvers.flow_heun(),
}
STOCHASTIC = {
    "ddpm": D.solvers.ddpm(),
    "ddim, eta 1": D.solvers.ddim(eta=1.0),
    "euler_ancestral": D.solvers.euler_ancestral(),
    "dpm2_ancestral": D.solvers.dpm2_ancestral(),
    "dpmpp_2m_sde": D.solvers.dpmpp_2m_sde(),
    "dpmpp_3m_sde": D.solvers.dpmpp_3m_sde(),
    "sit_sde": D.solvers.sit_sde(),
}
SPACINGS = {
    "trailing": D.trailing,
    "leading": D.leading,
    "linspace": D.linspace,
    "karras": D.karras,
    "exponential": D.exponential,
    "beta": D.beta,
    "beta_sigmas": D.beta_sigmas,
    "shift 3": functools.partial(D.trailing, shift=3.0),
}
VP_SPACINGS = ("trailing", "leading", "linspace", "karras", "exponential", "beta", "beta_sigmas")
FLOW_SPACINGS = ("trailing", "shift 3", "karras", "exponential", "beta", "beta_sigmas")


def make_grid(path: D.Path, steps: int, spacing: str, max_steps: int) -> D.Grid:
    """The grid of a named spacing, padded so that all grids of a solver share one compiled function."""
    return D.pad(SPACINGS[spacing](path, steps), max_steps)


# ---------------------------------------------------------------- results

Row = dict[str, Any]


def as_csv(rows: Sequence[Row]) -> str:
    """Rows with the same columns as a CSV file; numbers with four digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()})
    return text.getvalue()


def read_results(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers, empty cells as None."""

    def value(text: str) -> Any:
        if text == "":
            return None
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if number == int(number) and "e" not in text and "." not in text else number

    with path.open(encoding="utf-8", newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def choose(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have all these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# ---------------------------------------------------------------- tables and pictures


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def budget_table(rows: Sequence[Row], name: str, value: str, budgets: Sequence[int], form: str) -> str:
    """A line for each `name` (solver or spacing), a column for each budget; least errors are bold."""
    lines = list(dict.fromkeys(row[name] for row in rows))
    at = {(row[name], row["budget"]): row[value] for row in rows}
    least = {budget: min(v for (_, of), v in at.items() if of == budget) for budget in budgets}
    body = []
    for line in lines:
        cells = [f"{at[line, budget]:{form}}" for budget in budgets]
        best = [value == "error" and at[line, budget] == least[budget] for budget in budgets]
        body.append(
            [line, *(f"**{cell}**" if bold else cell for cell, bold in zip(cells, best, strict=True))]
        )
    return table([name, *(f"{budget} evaluations" for budget in budgets)], body)


Curves = dict[str, tuple[Sequence[float], Sequence[float]]]


def curves_of(rows: Sequence[Row], name: str, value: str) -> Curves:
    """{name: (evaluations, values)}, a curve for each `name` (solver or spacing)."""
    found = {}
    for row in rows:
        evaluations, values = found.setdefault(row[name], ([], []))
        evaluations.append(row["evaluations"])
        values.append(row[value])
    return found


def draw(
    panels: Sequence[tuple[str, str, Curves]],
    paths: Sequence[Path],
    columns: int,
    floor: str = "",
    floors: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Writes a figure of panels (title, label, curves by name); both axes are logarithmic.

    A name looks the same in every panel. `floors` gives the height of a dotted line, named `floor`, by title.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, _, found in panels for name in found))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.9 * rows + 0.5), layout="constrained")
    lines = {}
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, label, found) in zip(every, panels, strict=False):
        for name, (evaluations, values) in found.items():
            k = names.index(name)
            style, colour = "os^vD"[k % 5] + ("-" if k < 10 else "--"), f"C{k % 10}"
            lines[name] = axes.plot(evaluations, values, style, markersize=4, linewidth=1.2, color=colour)[0]
        if title in floors:
            lines[floor] = axes.axhline(floors[title], color="grey", linestyle=":")
        axes.set(xscale="log", yscale="log", title=title, xlabel="network evaluations", ylabel=label)
        last = max(max(evaluations) for evaluations, _ in found.values())
        ticks = [tick for tick in (5, 10, 20, 50, 100, 200) if tick <= 1.1 * last]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=7, fontsize=8)
    for path in paths:
        save_figure(path, figure, dpi=80)


def relative_rms(x: Any, truth: Any) -> float:
    """Root mean square of x - truth, as a part of that of truth."""
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    return float(np.sqrt(np.mean((x - truth) ** 2) / np.mean(truth**2)))
