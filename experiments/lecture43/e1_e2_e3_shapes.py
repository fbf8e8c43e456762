"""Tiny DiT with larger patches, with more blocks, and without classes (lecture 43, exercises E1, E2 and E3).

Question: what do 16 tokens in place of 49, 8 blocks in place of 4, and class labels with guidance change?
Command:  python -m experiments.lecture43.e1_e2_e3_shapes
Needs:    a run of `make demo`, whose classifier measures; minutes and what came out: README.md in this
          folder. `--quick` for a look, `--time-again` to measure seconds on a quiet machine.

The same data, loss and number of updates for all. A second call goes on where the first one stopped, and uses
what `e6_dit_against_unet` has trained. Seconds are measured apart, the models taking turns.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from experiments.lecture43.small_models import EPOCHS, Bench, Measured, TrainAndMeasure, seconds_of
from experiments.results import markdown, save_table
from jaxldm import host, metrics, models
from jaxldm.commands.terminal import run_script
from jaxldm.files import write_atomically

# Title, model.
ROWS = {
    "patch 4, depth 4": "DiT-Tiny",
    "patch 7, depth 4 (E1)": "patch 7",
    "patch 4, depth 8 (E2)": "depth 8",
    "without classes (E3)": "no classes",
}


@dataclasses.dataclass(frozen=True)
class Shapes(TrainAndMeasure):
    """Train four Tiny DiTs and compare parameters, seconds, accuracy and distance."""

    output_dir: Path = Path("runs/lecture43/e1-e3")
    """Where table.md, figures.json and the picture are written."""


def table(found: dict[str, dict[float, Measured]], counts: dict[str, int], seconds: dict) -> str:
    """A row for each model and guidance scale."""
    body = []
    for title, by_scale in found.items():
        for w, (figures, _) in by_scale.items():
            times = seconds[ROWS[title]]
            cells = [f"{counts[title] / 1e6:.2f} M", f"{times['epoch_seconds']:.1f}"]
            cells += [f"{times['sample_milliseconds']:.1f}", f"{w:g}" if w else "no class"]
            cells += [f"{figures['accuracy']:.0%}" if w else "", f"{figures['frechet_ratio']:.1f}"]
            body.append([title, *cells, f"{figures['feature_diversity']:.2f}" if w else ""])
    head = ["Tiny DiT", "parameters", "seconds an epoch", "ms a sample", "w", "as requested"]
    return markdown([*head, "distance / floor", "diversity"], body)


def main(options: Shapes) -> None:
    host.prepare()
    options = options.fitted()
    bench = Bench(options)
    found: dict[str, dict[float, Measured]] = {}
    counts = {}
    for title, name in ROWS.items():
        curve = bench.curve(name)
        epoch = min(EPOCHS, max(epoch for epoch, _ in curve))
        found[title] = {w: measured for (at, w), measured in curve.items() if at == epoch}
        counts[title] = models.count_params(bench.module(name))
    seconds = seconds_of(tuple(ROWS.values()), bench)
    title = f"Tiny DiT after {epoch} epochs of {options.dataset}, {options.num_images} digits"
    save_table(options.output_dir / "table.md", title, table(found, counts, seconds))
    write_atomically(
        options.output_dir / "figures.json",
        json.dumps(
            {"seconds": seconds, "parameters": counts}
            | {
                name: {f"{w:g}": measured.figures for w, measured in rows.items()}
                for name, rows in found.items()
            },
            indent=1,
        ).encode(),
    )
    shown = {
        (title, w): measured.images
        for title, rows in found.items()
        for w, measured in rows.items()
        if w > 0 or len(rows) == 1
    }
    columns = len(next(iter(shown.values())))
    grid = metrics.labelled_grid(
        np.concatenate(list(shown.values())),
        columns,
        title="Digits of four Tiny DiTs from the same noise; columns: requested class",
        column_labels=[str(label) for label in bench.labels[:columns]],
        row_labels=[f"{title}, w = {w:g}" if w else title for title, w in shown],
    )
    metrics.save_png(options.output_dir / "digits.png", grid)
    print(f"Look at {options.output_dir}/digits.png.")


if __name__ == "__main__":
    run_script(main, Shapes)
