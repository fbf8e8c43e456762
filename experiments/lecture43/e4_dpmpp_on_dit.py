"""DPM-Solver++ on a DiT: 1000 steps to 20 (lecture 43, exercise E4).

Question: how many of DDPM's 1000 steps does a diffusion transformer need with a better solver?
Command:  python -m experiments.lecture43.e4_dpmpp_on_dit --run-dir runs/tiny-dit
Needs:    a run of tiny_dit.py in this folder; minutes and what came out: README.md.

The same digits are requested from each solver and number of steps; the run's classifier measures them.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from experiments.trained import load_classifier, load_dataset
from jaxldm import metrics, pipelines
from jaxldm.commands.terminal import run_script
from jaxldm.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class DPMppOnDiT:
    """Draw digits by DDPM, DDIM and DPM-Solver++ in fewer and fewer steps; quality and time of each."""

    run_dir: Path = Path("runs/tiny-dit")
    """A finished run of a class-conditional model of pixels with a classifier."""
    output_dir: Path = Path("runs/lecture43/e4")
    """Where the picture is written."""
    runs: tuple[tuple[str, int], ...] = (
        ("ddpm", 1000),
        ("ddim", 50),
        ("ddim", 20),
        ("dpmpp_2m", 20),
        ("dpmpp_2m", 10),
    )
    """(solver, number of steps), the slowest first."""
    guidance_scale: float = 1.0
    """1 is the model as trained, and costs half."""
    num_images: int = 96
    """Drawn with each."""


def draw(pipe: pipelines.Pipeline, options: DPMppOnDiT, solver: str, steps: int) -> np.ndarray:
    """Digits [N, 28, 28, 1], the same labels and first noise for all."""
    return pipe(
        jax.random.key(0),
        num_images=options.num_images,
        num_inference_steps=steps,
        guidance_scale=options.guidance_scale,
        solver=solver,
    )


def main(options: DPMppOnDiT) -> None:
    if not (options.run_dir / "config.json").exists():
        raise InvalidArgumentError(
            f"{options.run_dir} is no run: make it with `python -m experiments.lecture43.tiny_dit "
            f"--run-dir {options.run_dir}`, or name another with --run-dir"
        )
    pipe = pipelines.load(options.run_dir)
    classify, dataset = load_classifier(options.run_dir), load_dataset(options.run_dir)
    labels = pipe.cycle_labels(None, options.num_images)
    rows = []
    print("| solver | steps | seconds | times faster | as requested | Frechet distance / floor | diversity |")
    print("|---" * 7 + "|")
    slowest = None
    for solver, steps in options.runs:
        draw(pipe, options, solver, 1)  # compiles; another number of steps compiles nothing
        start = time.perf_counter()
        images = draw(pipe, options, solver, steps)
        seconds = time.perf_counter() - start
        slowest = seconds if slowest is None else slowest
        report = metrics.evaluate(images, labels, classify, dataset)
        print(
            f"| {solver} | {steps} | {seconds:.1f} | {slowest / seconds:.0f} | {report.accuracy:.0%} | "
            f"{report.frechet_ratio:.2f} | {report.feature_diversity:.2f} |"
        )
        rows.append(images[: 2 * pipe.num_classes])
    path = options.output_dir / "solvers.png"
    columns = min(2 * pipe.num_classes, options.num_images)
    grid = metrics.labelled_grid(
        np.concatenate(rows),
        columns,
        title=f"Digits of Tiny DiT at w = {options.guidance_scale:g}; columns: requested class",
        column_labels=[str(label) for label in labels[:columns]],
        row_labels=[f"{solver}, {steps} steps" for solver, steps in options.runs],
    )
    metrics.save_png(path, grid)
    print(f"\nLook at {path}.")


if __name__ == "__main__":
    run_script(main, DPMppOnDiT)
