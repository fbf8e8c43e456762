"""`report.html` of a run: curves, what was drawn on the way, the settings; one file, without scripts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxldm.arguments import a_path, checked
from jaxldm.errors import CheckpointError
from jaxldm.files import remove_leftovers, write_atomically
from jaxldm.metrics.page import Section, Shown, Table, page
from jaxldm.reading import read_bytes, shown
from jaxldm.training.batch_size import read_batch_size
from jaxldm.training.log import CLOCKS, read_log
from jaxldm.training.progress import rate_in_words, share_of_peak
from jaxldm.training.recipes import Recipe
from jaxldm.training.runs import STAGES, RunFolder, StageFolder, flat_entries, read_config

REPORT_FILE = "report.html"
MOST_PICTURES = 6  # of what was drawn on the way
MAX_PICTURE_BYTES = 32 * 2**20
MAX_TEXT_BYTES = 2**20
_CURVES = {
    "loss.png": "The loss of each update, and its mean.",
    "grad_norm.png": "The norm of the gradients of each update, before clipping.",
    "reconstructions.png": "Images that were not trained on, and their reconstructions.",
}


@contextlib.contextmanager
def reported(run: RunFolder) -> Iterator[None]:
    """Writes the report of a run when what is in the block ends, also by Ctrl-C; not after an error."""
    try:
        yield
    except KeyboardInterrupt:
        write_report(run.path)
        raise
    write_report(run.path)


@checked(run_dir=a_path)
def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` of a run, finished or not, from what lies in its folder; return its path.

    Raises:
        CheckpointError: no run.
        StorageError: it cannot be written.

    >>> from jaxldm import training                                  # doctest: +SKIP
    >>> training.write_report("runs/mini-ldm")                       # doctest: +SKIP
    """
    path = Path(run_dir) / REPORT_FILE
    write_atomically(path, _content(RunFolder(Path(run_dir))))
    return path


def bring_up_to_date(run: RunFolder) -> None:
    """Write the report where it is missing or older than the run: it was killed before or in writing it."""
    path, content = run.path / REPORT_FILE, _content(run)
    if path.is_file() and path.read_bytes() == content:
        remove_leftovers(run.path, REPORT_FILE)
    else:
        write_atomically(path, content)


def _content(run: RunFolder) -> bytes:
    config = read_config(run.path)
    recipe = Recipe.from_dict(config["recipe"])
    stages = [name for name in STAGES if run.stage(name).log.is_file()]
    facts = [
        ("recipe", recipe.name),
        ("data", str(config["data"].get("name", recipe.data))),
        ("pictures", config["data"].get("license") or ""),
        *((name, _progress(run.stage(name))) for name in stages),
        *((name, str(version)) for name, version in config["versions"].items()),
    ]
    sections = [Section(name, _stage_parts(run.stage(name))) for name in stages]
    settings = flat_entries({name: part for name, part in recipe.to_dict().items() if part is not None})
    rows = [(name, shown(value)) for name, value in settings.items()]
    return page(
        f"Run of {recipe.name}" + (f": {run.path.name}" if run.path.name != recipe.name else ""),
        [(name, value) for name, value in facts if value],
        [*sections, Section("settings", [Table(rows)])],
    )


def _progress(stage: StageFolder) -> str:
    """How far a stage is, in a line."""
    with contextlib.suppress(CheckpointError):
        log = read_log(stage.log)
        if len(log["step"]):
            minutes = log["seconds"][-1] / 60
            done = f"{log['step'][-1]} updates in {minutes:.1f} minutes"
            return f"{done}, {'complete' if stage.complete else 'not finished'}"
    return "nothing yet"


def _stage_parts(stage: StageFolder) -> list[str | Shown | Table]:
    """Figures of the last epoch, curves, findings, and what was drawn."""
    parts: list[str | Shown | Table] = []
    with contextlib.suppress(CheckpointError):
        rows = _last_epoch(read_log(stage.log))
        size = read_batch_size(stage)
        rows += [] if size is None else [("batch size that fits", str(size))]
        parts += [Table(rows)] if rows else []
    for name, caption in _CURVES.items():
        parts += _picture(stage.path / name, caption)
    health = stage.path / "health.txt"
    if health.is_file():
        parts += read_bytes(health, MAX_TEXT_BYTES).decode("utf-8", "replace").strip().splitlines()
    drawn = sorted((stage.path / "samples").glob("step-*.png"))
    some = np.unique(np.linspace(0, len(drawn) - 1, MOST_PICTURES).round().astype(int)) if drawn else []
    for number in some:
        parts += _picture(drawn[number], f"Drawn after {int(drawn[number].stem.split('-')[-1])} updates.")
    return parts


def _last_epoch(log: dict[str, Any]) -> list[tuple[str, str]]:
    """What the log has of the last epoch, as means."""
    if not len(log["step"]):
        return []
    own = log["epoch"] == log["epoch"][-1]
    rows = [("epoch", str(log["epoch"][-1])), *_speeds(log, own)]
    means = {name: log[name][own] for name in log if name not in ("epoch", "step", "examples", *CLOCKS)}
    return rows + [
        (name.replace("_", " "), f"{np.nanmean(part):.4g}")
        for name, part in means.items()
        if np.isfinite(part).any()
    ]


def _speeds(log: dict[str, Any], own: Bool[np.ndarray, " N"]) -> list[tuple[str, str]]:
    """How fast the updates `own` were, as the line of the epoch says it: all of one time.

    Without those that begin a process, whose time is compilation: they have no speeds.
    """
    speed = log.get("examples_per_second")
    timed = own if speed is None else own & np.isfinite(speed)
    seconds = float(np.diff(log["seconds"], prepend=0.0)[timed].sum())
    if seconds <= 0:
        return []
    updates = timed.sum() / seconds
    rows = [("updates per second", f"{updates:.3g}")]
    if "waiting" in log:
        rows.append(("waiting for data", f"{min(np.nansum(log['waiting'][timed]) / seconds, 1.0):.1%}"))
    if "examples" in log:
        rows.append(("examples per second", rate_in_words(np.nanmean(log["examples"][timed]) * updates)))
    share = _of_peak(log, timed, updates)
    return rows if np.isnan(share) else [*rows, ("share of the matrix peak", share_of_peak(share))]


def _of_peak(log: dict[str, Any], timed: Bool[np.ndarray, " N"], updates: float) -> float:
    """The share of the matrix peak at so many updates in a second; nan where it is not known."""
    if "of_peak" not in log or not np.isfinite(log["of_peak"][timed]).any():
        return np.nan
    of_peak = log["of_peak"][timed]
    if "examples" not in log:  # of a log of earlier versions: of the time that all took
        return float(1 / np.nanmean(1 / of_peak))
    # Both are of the same span, which may have earlier epochs: their ratio is of one example.
    of_one = np.nanmedian(of_peak / log["examples_per_second"][timed])
    return float(of_one * np.nanmean(log["examples"][timed]) * updates)


def _picture(path: Path, caption: str) -> list[Shown]:
    return [Shown(read_bytes(path, MAX_PICTURE_BYTES), caption)] if path.is_file() else []
