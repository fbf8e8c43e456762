"""All ways to less compute for one model in one table and one plot: distance against seconds a digit.

Question: which of fewer steps, caches, pruned, smaller, dynamic, merged and early-stopped networks are on the
          Pareto frontier of seconds and distance?
Command:  python -m experiments.less_compute.frontier --model DiT-Tiny
Needs:    rows of the other scripts of this folder, which it reads: it draws and measures nothing, and says
          which script to run where there are none. What came out: README.md in this folder.

Each script has timed the whole run of the same model itself, next to its other rows. So seconds are compared
within a script alone: "times faster" is the seconds of its own whole run by those of the row, and the plot
has the first script's whole run divided by that. Rows of other digits or of another model than the whole run
of their script, and rows of which only one was timed again, are left out and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.figures import output_folder, quick_options
from experiments.less_compute import dynamic, smaller
from experiments.less_compute.comparison import FEWER_STEPS, Row, pareto, plot, with_comparison
from experiments.results import Results, markdown, save_table
from jaxldm.commands.terminal import run_script
from jaxldm.errors import InvalidArgumentError

Kept = Mapping[str, Mapping[str, Any]]  # name -> {"settings": ..., "figures": ...}
JUDGED = ("judge", "images", "num_images", "seed", "w", "solver", "repeats", "quick", "teacher")
SAME = ("model", *JUDGED)
DATES = ("timed", "again")  # of --time-again: a date where a row was timed so
TOLERANCE = 0.01  # of the distance of the same run, drawn by another script


class Source(NamedTuple):
    """A script whose rows are read.

    Attributes:
        command: that makes them.
        folder: of its results, in that of the options.
        whole: the name of the whole run's row.
        seconds: (figures, settings) -> of one digit; None where a row has none.
        kind: of a row, by its name; "" is left out.
        same_draws: whether its whole run draws the digits of the other scripts' whole runs.
        same: settings that a row shares with the whole run.
    """

    command: str
    folder: Callable[[Frontier], Path | None]
    whole: Callable[[Kept], str | None]
    seconds: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]
    kind: Callable[[str], str]
    same_draws: bool = True
    same: tuple[str, ...] = SAME


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Put the rows of all scripts about one model together, and mark what nothing else beats."""

    model: str = "DiT-Tiny"
    """The name of the run that the other scripts drew with."""
    output_dir: Path = Path("runs/less-compute")
    """That of caching, smaller and bits; table and picture go to the folder of the model in it."""
    dynamic_dir: Path | None = Path("runs/less-compute/dynamic")
    """That of dynamic; None leaves it out."""
    students_dir: Path | None = None
    """That of experiments.few_steps.digits, where the model is its teacher: runs/few-steps-digits."""
    leave_out: tuple[str, ...] = ()
    """Scripts whose rows are not used, of caching, smaller, dynamic, bits and students."""
    quick: bool = False
    """Reads what the other scripts wrote with --quick."""

    def fitted(self) -> Frontier:
        """These options, or with `quick` those of the other scripts' looks."""
        for name in self.leave_out:
            if name not in SOURCES:
                raise InvalidArgumentError(f"leave_out must be of {', '.join(SOURCES)}, got {name!r}")
        looks = {
            name: None if folder is None else output_folder(folder, self.quick)
            for name, folder in (("dynamic_dir", self.dynamic_dir), ("students_dir", self.students_dir))
        }
        return quick_options(self, **looks)


def _longest(rows: Kept) -> str | None:
    """Of the rows of the caches' script without a cache the one of the most steps."""
    plain = [name for name, row in rows.items() if row["settings"].get("settings") is None]
    return max(plain, key=lambda name: rows[name]["settings"]["steps"], default=None)


def _teacher(rows: Kept) -> str | None:
    """The teacher's row of the most steps without guidance."""
    names = [name for name in rows if name.startswith("teacher, ") and name.endswith(", w 1")]
    return max(names, key=lambda name: rows[name]["settings"]["steps"], default=None)


def _named(name: str) -> Callable[[Kept], str | None]:
    return lambda rows: name if name in rows else None


def _of_students(name: str) -> str:
    """Students at w = 1; their teacher in fewer steps; nothing of guided rows and of other figures."""
    if not name.endswith(", w 1") or name.startswith("straightness"):
        return ""
    return FEWER_STEPS if name.startswith("teacher, ") else "students of few steps"


SOURCES = {
    "caching": Source(
        "experiments.less_compute.caching --model-dir RUN",
        lambda options: options.output_dir / options.model,
        _longest,
        lambda figures, settings: figures["seconds"] / settings["images"],
        lambda name: FEWER_STEPS if name.endswith(" steps") else "caches",
    ),
    "smaller": Source(
        "experiments.less_compute.smaller --model-dir RUN",
        lambda options: options.output_dir / options.model / "smaller",
        _named("full"),
        lambda figures, _: figures["seconds"],
        smaller.kind_of,
    ),
    "dynamic": Source(
        "experiments.less_compute.dynamic --source RUN",
        lambda options: options.dynamic_dir,
        _named("DiT-Tiny"),
        lambda figures, _: figures["milliseconds"] / 1e3,
        lambda name: FEWER_STEPS if name.endswith(" steps") else dynamic.kind_of(name),
        same=JUDGED,  # each network is a model of its own
    ),
    "bits": Source(
        "experiments.less_compute.bits --model-dir RUN",
        lambda options: options.output_dir / options.model / "bits",
        _named("float32"),
        lambda figures, _: figures.get("seconds"),
        lambda _: "fewer bits",
    ),
    "students": Source(
        "experiments.few_steps.digits --run-dir RUN",
        lambda options: options.students_dir,
        _teacher,
        lambda figures, settings: figures.get("sampling seconds", 0.0) / settings["num_images"],
        _of_students,
        same_draws=False,
    ),
}


def fits(settings: Mapping[str, Any], whole: Mapping[str, Any], same: tuple[str, ...] = SAME) -> bool:
    """Whether a row has the settings of its script's whole run, and both or none of them were timed again."""
    dated = [any(isinstance(row.get(name), str) for name in DATES) for row in (settings, whole)]
    return dated[0] == dated[1] and all(settings.get(name) == whole.get(name) for name in same)


def rows_of(name: str, rows: Kept) -> tuple[list[Row], list[str]]:
    """(rows of a script, its whole run first, in shares of its time; what is left out, and why)."""
    source = SOURCES[name]
    first = source.whole(rows)
    if first is None:
        return [], [f"{name}: the whole run is not drawn yet. Run  python -m {source.command}"]
    whole = rows[first]
    taken = source.seconds(whole["figures"], whole["settings"])
    if taken is None:
        return [], [f"{name}: no seconds were kept, so that its rows have no place on this plot"]
    found, left_out = [], []
    for title in (first, *(title for title in rows if title != first)):
        settings, figures = rows[title]["settings"], rows[title]["figures"]
        kind = source.kind(title)
        if not kind:
            continue
        seconds = source.seconds(figures, settings)
        if seconds is None or not fits(settings, whole["settings"], source.same):
            left_out.append(
                f"{name}: {title!r} is of other settings than the whole run. Run  python -m {source.command}"
            )
            continue
        row = {"name": title, "kind": kind, "script": name, "own": 1e3 * seconds, "share": seconds / taken}
        found.append(row | {"distance": figures["distance"], "accuracy": figures["accuracy"]})
    return found, left_out


def collected(options: Frontier) -> tuple[list[Row], list[str]]:
    """(rows of all scripts, the whole run first and once; what is missing or left out)."""
    rows: list[Row] = []
    notes: list[str] = []
    for name, source in SOURCES.items():
        folder = source.folder(options)
        if folder is None or name in options.leave_out:
            continue
        kept = Results(folder).rows()
        if not kept:
            notes.append(f"{name}: no rows in {folder}. Run  python -m {source.command}")
            continue
        found, left_out = rows_of(name, kept)
        notes += left_out
        if rows and found and source.same_draws:
            check_same(rows[0], found[0], options)
        rows += found[1:] if rows else found
    return rows, notes


def check_same(whole: Row, other: Row, options: Frontier) -> None:
    """Raises `InvalidArgumentError` where the whole runs of two scripts are not those of one model."""
    if abs(other["distance"] / whole["distance"] - 1) > TOLERANCE:
        raise InvalidArgumentError(
            f"{other['script']} has drawn another model or other digits than {whole['script']}: the whole "
            f"run of {options.model} has a distance of {other['distance']:.3f}, not {whole['distance']:.3f}. "
            f"Run both again, or leave one out: --leave-out {other['script']}"
        )


COLUMNS = (
    ("what", "name", ""),
    ("kind", "kind", ""),
    ("script", "script", ""),
    ("ms a digit, as measured", "own", ".2f"),
    ("times faster", "speedup", ".2f"),
    ("distance, multiple of the floor", "distance", ".3f"),
    ("worse by", "worse", "+.1%"),
    ("as requested", "accuracy", ".1%"),
    ("fewer steps in this time", "baseline", ".3f"),
    ("on the frontier", "mark", ""),
)


def main(options: Frontier) -> None:
    """Reads, compares, and writes the table and the picture."""
    options = options.fitted()
    rows, notes = collected(options)
    for note in notes:
        print(note)
    if not rows:
        raise InvalidArgumentError(f"there are no rows of {options.model} yet: run one of the scripts above")
    unit = rows[0]["own"] / 1e3
    compared = with_comparison([{**row, "seconds": unit * row["share"]} for row in rows])
    best = pareto(compared)
    for row in compared:
        row["mark"] = "yes" if any(row is each for each in best) else ""
    body = [
        [format(row[key], form) for _, key, form in COLUMNS]
        for row in sorted(compared, key=lambda row: -row["speedup"])
    ]
    folder = options.output_dir / options.model
    title = f"{options.model}: less compute, times faster than the whole run of the same script"
    save_table(folder / "frontier.md", title, markdown([head for head, _, _ in COLUMNS], body))
    plot(folder / "frontier.png", title, compared, "milliseconds a digit", 1e3, frontier=best)
    print(f"Look at {folder}/frontier.png.")


if __name__ == "__main__":
    run_script(main, Frontier)
