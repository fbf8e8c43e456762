"""DiT against U-Net on digits (lecture 43, exercise E6).

Question: which draws better digits, a transformer or a U-Net, with as many epochs and with as many seconds?
Command:  python -m experiments.lecture43.e6_dit_against_unet
Needs:    a run of `make demo`, whose classifier measures; minutes and what came out: README.md in this
          folder. `--dataset mnist` for all 60 000 digits, `--quick` for a look.

Four networks of about 1.3 and 5 million parameters on the same pixels, with the same loss and updates. Each
is measured as it trains. Seconds are measured apart, the models taking turns, so that training may be
interrupted or share the machine: only `--time-again` wants it quiet.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from experiments.figures import save_figure
from experiments.lecture43.small_models import EPOCHS, Bench, TrainAndMeasure, seconds_of
from experiments.results import markdown, save_table
from jaxldm import host, metrics, models
from jaxldm.commands.terminal import run_script
from jaxldm.files import write_atomically

# Model -> parameters in millions of the lecture's table.
LECTURE = {"DiT-Tiny": 0.8, "DiT-Small": 3.2, "U-Net-Small": 1.2, "U-Net-Medium": 4.5}


@dataclasses.dataclass(frozen=True)
class DiTAgainstUNet(TrainAndMeasure):
    """Train two DiTs and two U-Nets; compare them at equal epochs and at equal seconds."""

    output_dir: Path = Path("runs/lecture43/e6")
    """Where table.md, figures.json, the plot and the picture are written."""
    models: tuple[str, ...] = tuple(LECTURE)
    """Which of DiT-Tiny, DiT-Small, U-Net-Small and U-Net-Medium."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a model reached after each epoch that was measured, at w = 1; the epochs take `epoch_seconds`."""

    epochs: np.ndarray
    accuracy: np.ndarray
    distance: np.ndarray
    epoch_seconds: float

    def at(self, seconds: float) -> tuple[float, float, float]:
        """(epochs, accuracy, distance) after so many seconds, on straight lines between measurements."""
        epochs = seconds / self.epoch_seconds
        distance = np.exp(np.interp(epochs, self.epochs, np.log(self.distance)))
        return epochs, float(np.interp(epochs, self.epochs, self.accuracy)), float(distance)


def table(curves: dict[str, Curve], counts: dict[str, int], seconds: dict, epochs: int, budget: float) -> str:
    """A row for each model."""
    head = ["model", "parameters", "lecture's count", "seconds an epoch", "ms a sample"]
    head += [f"as requested, {epochs} epochs", f"distance / floor, {epochs} epochs"]
    head += [
        f"epochs in {budget:.0f} s",
        f"as requested, {budget:.0f} s",
        f"distance / floor, {budget:.0f} s",
    ]
    body = []
    for name, curve in curves.items():
        _, accuracy, distance = curve.at(epochs * curve.epoch_seconds)
        done, late_accuracy, late_distance = curve.at(budget)
        cells = [f"{counts[name] / 1e6:.2f} M", f"{LECTURE[name]} M", f"{curve.epoch_seconds:.1f}"]
        cells += [f"{seconds[name]['sample_milliseconds']:.1f}", f"{accuracy:.0%}", f"{distance:.1f}"]
        body.append([name, *cells, f"{done:.1f}", f"{late_accuracy:.0%}", f"{late_distance:.1f}"])
    return markdown(head, body)


def plot(path: Path, curves: dict[str, Curve], budget: float) -> None:
    """Distance and accuracy against seconds of training, a line for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        seconds = curve.epochs * curve.epoch_seconds
        style = "o-" if name.startswith("DiT") else "s--"
        left.plot(seconds, curve.distance, style, label=name)
        right.plot(seconds, curve.accuracy, style, label=name)
    left.axhline(1, color="grey", linestyle=":", label="real from real")
    left.set(xlabel="seconds of training", ylabel="Fréchet distance / floor", yscale="log")
    right.set(xlabel="seconds of training", ylabel="classified as requested")
    for axes in (left, right):
        axes.axvline(budget, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save_figure(path, figure)


def main(options: DiTAgainstUNet) -> None:
    host.prepare()
    options = options.fitted()
    bench = Bench(options)
    found = {name: bench.curve(name) for name in options.models}
    seconds = seconds_of(options.models, bench)
    curves, pictures = {}, []
    for name, rows in found.items():
        reports = {epoch: measured.figures for (epoch, w), measured in rows.items() if w == 1}
        curves[name] = Curve(
            np.array(list(reports)),
            np.array([report["accuracy"] for report in reports.values()]),
            np.array([report["frechet_ratio"] for report in reports.values()]),
            seconds[name]["epoch_seconds"],
        )
        pictures.append(rows[max(reports), 1.0].images)
    counts = {name: models.count_params(bench.module(name)) for name in found}
    epochs = min(EPOCHS, *(int(curve.epochs[-1]) for curve in curves.values()))
    budget = min(curve.epochs[-1] * curve.epoch_seconds for curve in curves.values())
    title = f"DiT against U-Net, {options.dataset}, {options.num_images} digits"
    save_table(options.output_dir / "table.md", title, table(curves, counts, seconds, epochs, budget))
    figures = {
        name: {"parameters": counts[name], **seconds[name]}
        | {key: getattr(curve, key).tolist() for key in ("epochs", "accuracy", "distance")}
        for name, curve in curves.items()
    }
    write_atomically(
        options.output_dir / "figures.json",
        json.dumps(figures, indent=1).encode(),
    )
    plot(options.output_dir / "quality-against-seconds.png", curves, budget)
    columns = len(pictures[0])
    grid = metrics.labelled_grid(
        np.concatenate(pictures),
        columns,
        title="Digits at w = 1 after the last epoch of each, the same noise; columns: requested class",
        column_labels=[str(label) for label in bench.labels[:columns]],
        row_labels=[f"{name}, {curve.epochs[-1]} epochs" for name, curve in curves.items()],
    )
    metrics.save_png(options.output_dir / "digits.png", grid)
    print(f"Look at {options.output_dir}/quality-against-seconds.png and digits.png.")


if __name__ == "__main__":
    run_script(main, DiTAgainstUNet)
