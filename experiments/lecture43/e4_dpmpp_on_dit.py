"""DPM-Solver++ on a DiT: 1000 steps to 20 (lecture 43, exercise E4).

Question: how many of DDPM's 1000 steps does a diffusion transformer need with a better solver?
Command:  python experiments/lecture43/e4_dpmpp_on_dit.py --run-dir runs/tiny-dit
Needs:    a run of tiny_dit.py beside this file; minutes and what came out: README.md.

The same digits are asked for with each solver and number of steps; the run's classifier is the judge.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from jaxldm import checkpoints, data, metrics, pipelines, training
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
            f"{options.run_dir} is no run: make it with `python experiments/lecture43/tiny_dit.py "
            f"--run-dir {options.run_dir}`, or name another with --run-dir"
        )
    pipe, recipe = pipelines.load(options.run_dir), training.read_recipe(options.run_dir)
    classify = metrics.classifier_function(
        *checkpoints.load(training.RunFolder(options.run_dir).stage("classifier").model)
    )
    dataset = data.load(recipe.data, image_size=recipe.image_size)
    labels = pipe.cycle_labels(None, options.num_images)
    rows = []
    print(
        "| solver | steps | seconds | times faster | read as asked | Frechet distance / floor | diversity |"
    )
    print("|---" * 7 + "|")
    slowest = None
    for solver, steps in options.runs:
        draw(pipe, options, solver, 1)  # compiles; another number of steps compiles nothing anew
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
    metrics.save_png(path, metrics.image_grid(np.concatenate(rows), columns=columns))
    print(f"\nLook at {path}: a row for each line of the table.")


if __name__ == "__main__":
    run_script(main, DPMppOnDiT)
