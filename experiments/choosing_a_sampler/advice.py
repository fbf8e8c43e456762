"""The tables of advice on the page "Choosing a sampler", from the files of results.

Question: which solver and spacing are nearest to the exact solution, and how much does another choice lose?
Command:  python -m experiments.choosing_a_sampler.advice      (writes the tables into the page)
Needs:    results/mixture.csv and results/digits.csv, which mixture.py and digits.py write; a second.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments.choosing_a_sampler import curves
from jaxldm.commands.terminal import run_script
from jaxldm.files import write_atomically

Settings = dict[str, tuple[str, dict[str, Any]]]
BUDGETS = (5, 10, 20, 50)
# Column of the tables -> file of results, and the rows that count for it.
SETTINGS: Settings = {
    "linear betas, exact": ("mixture.csv", {"betas": "linear", "w": 1}),
    "scaled-linear betas, exact": ("mixture.csv", {"betas": "scaled_linear", "w": 1}),
    "cosine betas, exact": ("mixture.csv", {"betas": "cosine", "w": 1}),
    "cosine betas, trained": ("digits.csv", {"network": "mini-ldm", "w": 1}),
    "linear betas, trained": ("digits.csv", {"network": "tiny-dit", "w": 1}),
    "flow path, exact": ("mixture.csv", {"betas": "flow", "w": 1}),
}
GUIDED: Settings = {
    "linear betas, exact, w = 7.5": ("mixture.csv", {"betas": "linear", "w": 7.5}),
    "scaled-linear betas, exact, w = 7.5": ("mixture.csv", {"betas": "scaled_linear", "w": 7.5}),
    "cosine betas, exact, w = 7.5": ("mixture.csv", {"betas": "cosine", "w": 7.5}),
    "cosine betas, trained, w = 3": ("digits.csv", {"network": "mini-ldm", "w": 3}),
    "flow path, exact, w = 7.5": ("mixture.csv", {"betas": "flow", "w": 7.5}),
}
CHOICES = (
    ("ddim", "trailing"),
    ("dpmpp_2m", "trailing"),
    ("dpmpp_2m", "karras"),
    ("dpmpp_2m", "exponential"),
    ("dpmpp_2m", "beta"),
    ("unipc, order 2", "trailing"),
    ("unipc, order 2", "exponential"),
    ("unipc, order 2", "beta"),
    ("lms", "trailing"),
    ("lms", "beta"),
)


@dataclasses.dataclass(frozen=True)
class Advice:
    """Write the tables of advice into the page."""

    results_dir: Path = curves.RESULTS
    """Where mixture.csv and digits.csv are."""
    page: Path = Path("docs/choosing-a-sampler.md")
    """The page; each table stands between two comments with its name."""


def read(folder: Path, settings: Settings) -> dict[str, list[curves.Row]]:
    """The rows of each column that keep to their budget and have an error."""
    files = {name: curves.read_results(folder / name) for name, _ in settings.values()}
    found = {title: curves.choose(files[name], **wanted) for title, (name, wanted) in settings.items()}
    return {
        title: [
            row
            for row in rows
            if row["error"] is not None and row["budget"] in BUDGETS and row["evaluations"] <= row["budget"]
        ]
        for title, rows in found.items()
    }


def derive(folder: Path) -> dict[str, str]:
    """Every table of the page by its name."""
    rows, guided = read(folder, SETTINGS), read(folder, GUIDED)
    return {
        "in short": in_short(rows),
        "losses": losses(rows),
        "in short, guided": in_short(guided),
        "losses, guided": losses(guided),
    }


def in_short(rows: dict[str, list[curves.Row]]) -> str:
    """The nearest solver and spacing for each number of evaluations, and its error."""
    body = []
    for budget in BUDGETS:
        best = [nearest(curves.choose(of_setting, budget=budget)) for of_setting in rows.values()]
        cells = [f"{typed(row['solver'])}, {row['spacing']}: {row['error']:.2g}" for row in best]
        body.append([str(budget), *cells])
    return curves.table(["evaluations", *rows], body)


def losses(rows: dict[str, list[curves.Row]]) -> str:
    """How many times the least error each choice has, as a geometric mean over the numbers of evaluations."""
    body = []
    for solver, spacing in CHOICES:
        cells = []
        for of_setting in rows.values():
            chosen = curves.choose(of_setting, solver=solver, spacing=spacing)
            ratios = [
                row["error"] / nearest(curves.choose(of_setting, budget=row["budget"]))["error"]
                for row in chosen
            ]
            cells.append(f"{np.exp(np.mean(np.log(ratios))):.1f}" if ratios else "")
        body.append([f"{typed(solver)}, {spacing}", *cells])
    return curves.table(["choice", *rows], body)


def nearest(rows: list[curves.Row]) -> curves.Row:
    """The row with the least error."""
    return min(rows, key=lambda row: row["error"])


def typed(solver: str) -> str:
    """ "unipc, order 2" -> "`unipc` of order 2"."""
    name, _, order = solver.partition(", order ")
    return f"`{name}`" + (f" of order {order}" if order else "")


def block(name: str, text: str) -> str:
    """A table between its two comments."""
    command = "python -m experiments.choosing_a_sampler.advice"
    return f"<!-- {name}: written by {command} -->\n\n{text}\n<!-- end -->"


def write_into(page: str, tables: dict[str, str]) -> str:
    """The page with new tables in their places."""
    for name, text in tables.items():
        pattern = rf"<!-- {name}: .*?<!-- end -->"
        if len(re.findall(pattern, page, re.DOTALL)) != 1:
            raise SystemExit(f"the page needs one place for the table {name!r}")
        before, after = re.split(pattern, page, flags=re.DOTALL)
        page = before + block(name, text) + after
    return page


def main(options: Advice) -> None:
    tables = derive(options.results_dir)
    page = options.page.read_text(encoding="utf-8")
    write_atomically(options.page, write_into(page, tables).encode())
    print("\n".join(tables.values()) + f"\nwritten into {options.page}")


if __name__ == "__main__":
    run_script(main, Advice)
