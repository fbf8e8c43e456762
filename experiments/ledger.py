"""The ledger of figures: where each number of README and docs comes from.

Question: which command, machine and day is a printed figure from, and is it still so?
Command:  python -m experiments.ledger --list          (all rows)
          python -m experiments.ledger --missing       (figures without a row: none, says a test)
          python -m experiments.ledger --check         (runs the quick rows again and compares; a minute)
Needs:    nothing but the package; the other rows name their own command and minutes.

The rows are in `ledger.toml`. A figure is a number with a decimal point or a unit in README.md or a page of
docs, outside of code. A row of its section must name it, or have a file of results with a number that rounds
to it, so that what a script writes is not typed twice. What is no measurement (versions, settings, published
numbers) is named with its reason. Tables between `<!-- ...: written by COMMAND -->` and `<!-- end -->` are
the command's.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.ledger_checks import CHECKS
from jaxldm.commands.terminal import run_script
from jaxldm.errors import DataError

ROOT = Path(__file__).parents[1]
LEDGER = Path(__file__).with_name("ledger.toml")
PAGES = ("README.md", "docs/*.md", "docs/tutorials/*.md")

_CODE = re.compile(r"^```.*?^```|<!-- [^>]*: written by .*?<!-- end -->|`[^`\n]*`|\]\([^)]*\)", re.M | re.S)
# "w = 7.5", "SD 3.5", "v2.5", "JAX 0.8", "arXiv:2403.04692", "3.11 to 3.13": names and settings.
_NAMES = re.compile(
    r"\b[A-Za-z_α-ω]\w* = -?[\d.]+|arXiv:[\d.]+|\d{4}\.\d{4,5}|\bv\d[\d.]*|CC[ -]BY[\w ./-]*"
    r"|\b(?:Python|JAX|jax|SD|Diffusion|Stability|PyTorch|FLUX|version|Version|From|from|diffusers|`)"
    r"[ .(]+\d+\.\d+(?:\.\d+)?(?:(?:,| and| to| or)+ \d+\.\d+)*"
)
_UNIT = r"(?:ms|s|minutes?|hours?|seconds?|[kKMGT]i?B|times|points|percent)\b|%"
_FIGURE = re.compile(
    rf"(?<![\w./=-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)? ?(?:{_UNIT})|(?<![\w./=-])\d[\d,]*\.\d+(?:e-?\d+)?(?![\w.])"
)
# What a script's number is multiplied with before it is printed with a unit: shares, seconds, bytes.
_SCALES = {
    "%": (1.0, 100.0),
    "ms": (1.0, 1e3),
    "minutes": (1.0, 1 / 60),
    "hours": (1.0, 1 / 3600),
    **dict.fromkeys(("KB", "kB"), (1.0, 1e-3)),
    "MB": (1.0, 1e-6, 1e3),
    "GB": (1.0, 1e-9),
}
_COUNTS = (1.0, 1e-6, 1e-9, 1e-12)  # without a unit: millions, billions


class Row(NamedTuple):
    """Where some figures of one section come from.

    Attributes:
        where: "README.md#how-fast-it-is": a page and the anchor of a heading; a page alone is all of it.
        what: in words.
        command: prints or writes them.
        machine: that it ran on.
        minutes: that it takes there.
        date: of the measurement.
        tolerance: relative, between two runs of the command.
        results: files that the command wrote; every number in them, as it is rounded, is accounted for.
        figures: as they are printed.
        check: key of `ledger_checks.CHECKS`, which computes `figures` again in their order.
    """

    where: str
    what: str
    command: str
    machine: str
    minutes: float
    date: str
    tolerance: float
    results: Sequence[str] = ()
    figures: Sequence[str] = ()
    check: str = ""


class Stated(NamedTuple):
    """Numbers that are no measurement of this project, and why; each is named, so that a new one is seen."""

    where: str
    why: str
    figures: Sequence[str]


class Figure(NamedTuple):
    """A printed number: page, anchor of its section, and as it is printed."""

    page: str
    anchor: str
    text: str


def read_ledger(path: Path = LEDGER) -> tuple[list[Row], list[Stated]]:
    """The rows, and what is no measurement. Raises `DataError` for an entry with other fields."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        rows = [Row(**entry) for entry in entries.get("measured", [])]
        return rows, [Stated(**entry) for entry in entries.get("stated", [])]
    except TypeError as error:
        raise DataError(f"{path}: {error}") from error


def figures_of(page: str, text: str) -> list[Figure]:
    """The figures of a page, in order."""
    found, anchor = [], ""
    kept = _CODE.sub(lambda cut: "\n" * cut.group().count("\n") + "`", text)
    for line in kept.splitlines():
        if line.startswith("#"):
            anchor = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", line.lstrip("#").lower()).strip())
            continue
        found += [Figure(page, anchor, match.group()) for match in _FIGURE.finditer(_NAMES.sub("", line))]
    return found


def all_figures(root: Path = ROOT) -> list[Figure]:
    """Those of README and docs."""
    pages = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    return [
        figure
        for path in pages
        for figure in figures_of(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
    ]


def value_of(text: str) -> tuple[float, float]:
    """(number, half a unit of its last digit) of a figure.

    >>> value_of("93.2%"), value_of("4 s")
    ((93.2, 0.05), (4.0, 0.5))
    """
    number = re.match(r"[\d,.]+(?:e-?\d+)?", text)
    assert number is not None
    digits = number.group().rstrip(".,").replace(",", "")
    mantissa, _, power = digits.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(digits), float(f"{0.5 * 10.0**-decimals:.1g}") * 10 ** int(power or 0)


def numbers_in(path: Path) -> list[float]:
    """Every number of a file of results: JSON, CSV, or a table in Markdown."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return list(_leaves(json.loads(text)))
    cells = [cell for row in csv.reader(text.splitlines()) for cell in row] if path.suffix == ".csv" else []
    words = cells or re.findall(r"(?<![\w.])[\d,]+(?:\.\d+)?(?:e-?\d+)?", text)
    return [float(word.replace(",", "")) for word in words if re.fullmatch(r"[\d,]*\.?\d+(e-?\d+)?", word)]


def _leaves(data: Any) -> Iterator[float]:
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from _leaves(value)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield float(data)


def covers(where: str, figure: Figure) -> bool:
    """Whether a place holds a figure."""
    page, _, anchor = where.partition("#")
    return page == figure.page and (not anchor or anchor == figure.anchor)


def missing(figures: Sequence[Figure], rows: Sequence[Row], stated: Sequence[Stated]) -> list[Figure]:
    """The figures that no row accounts for."""
    numbers = {file: numbers_in(ROOT / file) for row in rows for file in row.results}

    def is_result(row: Row, figure: Figure) -> bool:
        value, half = value_of(figure.text)
        unit = re.sub(r"^[\d.,e -]+", "", figure.text)
        scales = _SCALES.get(unit, (1.0,)) if unit else _COUNTS
        return any(
            abs(scale * number - value) <= half * 1.0001
            for file in row.results
            for number in numbers[file]
            for scale in scales
        )

    def is_known(figure: Figure) -> bool:
        for entry in stated:
            if covers(entry.where, figure) and figure.text in entry.figures:
                return True
        mine = [row for row in rows if covers(row.where, figure)]
        return any(figure.text in row.figures for row in mine) or any(is_result(row, figure) for row in mine)

    return [figure for figure in figures if not is_known(figure)]


def stale(figures: Sequence[Figure], rows: Sequence[Row], stated: Sequence[Stated]) -> list[str]:
    """What the ledger names and no page prints any more."""
    return [
        f"{entry.where}: {text}"
        for entry in (*rows, *stated)
        for text in entry.figures
        if not any(covers(entry.where, figure) and figure.text == text for figure in figures)
    ] + [
        f"{entry.where}: no such place with figures"
        for entry in (*rows, *stated)
        if not any(covers(entry.where, figure) for figure in figures)
    ]


def check_row(row: Row) -> list[str]:
    """Computes a row's figures again; a line for each that is off by more than the tolerance."""
    values = CHECKS[row.check]()
    if len(values) != len(row.figures):
        return [f"{row.where}: {row.check} has {len(values)} values for {len(row.figures)} figures"]
    lines = []
    for text, value in zip(row.figures, values, strict=True):
        printed, half = value_of(text)
        if not abs(value - printed) <= half * 1.0001 + row.tolerance * abs(printed):
            lines.append(f"{row.where}: printed {text}, now {value:.6g}")
    return lines


def lines_of(row: Row) -> str:
    """A row for `--list`: its place, and below it the rest in lines of a terminal."""
    facts = f"{row.machine}; {row.minutes:g} min; {row.date}; +-{row.tolerance:.0%}"
    below = [row.what, row.command, facts, ", ".join((*row.results, *row.figures))]
    fill = textwrap.TextWrapper(98, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return "\n".join([row.where, *map(fill.fill, below)])


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Where each number of README and docs comes from."""

    list: bool = False
    """Show all rows."""
    missing: bool = False
    """Show figures without a row, and rows without a figure."""
    check: bool = False
    """Run the quick rows again and compare."""


def main(options: Ledger) -> None:
    """Does what is asked for; ends with status 1 where something is wrong."""
    rows, stated = read_ledger()
    wrong: list[str] = []
    if options.list or not (options.missing or options.check):
        print("\n\n".join(map(lines_of, rows)))
    if options.missing:
        figures = all_figures()
        wrong += [
            f"{figure.page}#{figure.anchor}: {figure.text}" for figure in missing(figures, rows, stated)
        ]
        wrong += stale(figures, rows, stated)
    if options.check:
        for row in filter(lambda row: row.check, rows):
            lines = check_row(row)
            print(f"{'FAIL' if lines else 'PASS'}  {row.where}  {row.what}")
            wrong += lines
    for line in wrong:
        print(line)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Ledger)
