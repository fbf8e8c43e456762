"""Mini latent diffusion on MNIST, end to end (lecture 39, exercise E2).

Question: how small can a whole latent diffusion model be, and what does guidance do to what it draws?
Command:  make demo      (or: python -m experiments.lecture39.mini_ldm --run-dir runs/mini-ldm)
Needs:    the `demo` extra; two CPU cores, no accelerator. Minutes and expected figures: README.md in this
          folder. A second call goes on where the first one stopped; one on a finished run only draws.

Stages: autoencoder 28x28x1 -> 7x7x4, class-conditional U-Net on the latents, a digit classifier for the
metrics; then 500 digits by DDIM in 50 steps at each guidance scale, compared with real digits; pictures; the
export.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import jaxldm
from experiments.figures import figure_png, save_results
from experiments.trained import load_classifier, load_dataset
from jaxldm import host, metrics, pipelines, training
from jaxldm.commands.terminal import run_script
from jaxldm.metrics import health
from jaxldm.training.runs import RunFolder


@dataclasses.dataclass(frozen=True)
class MiniLDM:
    """Train a mini latent diffusion model, draw digits at several guidance scales, measure and export it."""

    run_dir: Path = Path("runs/mini-ldm")
    """Where everything is written."""
    recipe: str = "mini-ldm"
    """mini-ldm (U-Net), mini-ldm-32 (networks that diffusers has too), mini-ldm-dit (DiT, same latents),
    or smoke (seconds; draws noise)."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0, 7.5)
    """1 is the conditional model as trained."""
    num_images: int = 500
    """Digits drawn and measured at each scale; the real test set has 500."""
    num_inference_steps: int = 50
    """DDIM steps."""
    seed: int = 0
    """Of the drawing; the recipe has its own."""


# Within-class diversity below this share of that of real images is a collapse. Guidance lowers diversity by
# design, smoothly and for every class (to 0.45 at w = 30); a collapsed class is nearly one image, whatever w.
MIN_DIVERSITY, MIN_GUIDED_DIVERSITY = 0.6, 0.3


def check_health(
    images: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray, scale: float
) -> list[metrics.Finding]:
    """Health checks of drawn images [N, H, W, C] that a strong guidance alone does not fail."""
    min_ratio = MIN_DIVERSITY if scale <= 1 else MIN_GUIDED_DIVERSITY
    return [
        *health.check_guided(images, scale),
        *health.check_blank(images),
        *health.check_diversity(images, labels, real, real_labels, min_ratio=min_ratio),
        *health.check_saturation(images, real),
    ]


def draw_and_measure(options: MiniLDM, run: RunFolder) -> dict[float, metrics.Report]:
    """Draws, saves and measures at each guidance scale; returns the reports."""
    pipe = pipelines.load(run.path)
    dataset, classify = load_dataset(run.path), load_classifier(run.path)
    test_images, test_labels = dataset.arrays("test")
    labels = np.arange(options.num_images, dtype=np.int32) % pipe.num_classes
    reports = {}
    for scale in options.guidance_scales:
        start = time.perf_counter()
        images = pipe(
            jax.random.key(options.seed),
            labels,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=scale,
        )
        seconds = time.perf_counter() - start
        print(f"w = {scale:g}: {len(images)} digits in {seconds:.1f} s, {options.num_inference_steps} steps")
        findings = check_health(images, labels, test_images, test_labels, scale)
        print(health.report(health.failed(findings)) or f"     {len(findings)} health checks, all ok")
        pipelines.save_samples(run.path / "samples" / f"w{scale:g}", images, labels, columns=10)
        picture = class_columns(
            images[:60], dataset.class_names, f"Digits drawn at guidance scale w = {scale:g}"
        )
        metrics.save_png(run.path / f"grid-w{scale:g}.png", picture)
        reports[scale] = metrics.evaluate(images, labels, classify, dataset)
        nearest = nearest_of_each_class(images, labels, dataset.arrays("train")[0], scale)
        metrics.save_png(run.path / "nearest-training-digits.png", nearest)
    return reports


def class_columns(images: np.ndarray, class_names: Sequence[str], title: str) -> np.ndarray:
    """Images whose classes come round one after another, as a picture with a column for each class."""
    title += "; columns: requested class"
    return metrics.labelled_grid(images, len(class_names), title=title, column_labels=class_names, scale=2)


def nearest_of_each_class(
    images: np.ndarray, labels: np.ndarray, train_images: np.ndarray, scale: float
) -> np.ndarray:
    """Of each class the drawn image that is nearest to a training image, above that training image."""
    neighbours = metrics.nearest_neighbour_distances(images, train_images)
    classes = np.unique(labels)
    closest = [
        rows[np.argmin(neighbours.distance[rows])] for rows in (np.flatnonzero(labels == k) for k in classes)
    ]
    return metrics.labelled_grid(
        np.concatenate([images[closest], train_images[neighbours.index[closest]]]),
        len(classes),
        title=f"Drawn at w = {scale:g}: of each class the digit that is nearest to a training digit",
        column_labels=[str(k) for k in classes],
        row_labels=["drawn", "training"],
        scale=2,
    )


ROWS = (  # title, column of Report, format, column for real digits, what that is
    (
        "classified as the requested digit",
        "accuracy",
        ".1%",
        "classifier_accuracy",
        "the classifier on real test digits",
    ),
    (
        "Fréchet distance, classifier features",
        "frechet_distance",
        ".2f",
        "real_frechet_distance",
        "the floor",
    ),
    ("... as a multiple of the floor", "frechet_ratio", ".2f", None, ""),
    ("Inception-Score analogue, classifier", "inception_score", ".2f", "real_inception_score", ""),
    ("within-class diversity, features", "feature_diversity", ".2f", None, ""),
    ("within-class diversity, pixels", "pixel_diversity", ".2f", None, ""),
    ("median distance to nearest training digit", "nearest_distance", ".2f", "real_nearest_distance", ""),
    ("share nearer than 99 % of test digits are", "near_copies", ".1%", None, ""),
)


def table(reports: dict[float, metrics.Report]) -> str:
    """The reports side by side as one Markdown table: a row per figure, a column per guidance scale.

    The floor is the distance of real validation digits from real test digits, sets of the same size.
    """
    first = next(iter(reports.values()))
    scales = " | ".join(f"w = {scale:g}" for scale in reports)
    lines = [
        f"| {first.num_images} generated digits | {scales} | real digits |",
        "|---" * (len(reports) + 2) + "|",
    ]
    for title, column, form, real_column, note in ROWS:
        cells = [format(getattr(report, column), form) for report in reports.values()]
        real = format(getattr(first, real_column), form) if real_column else "1.0%" if form == ".1%" else "1"
        lines.append("| " + " | ".join([title, *cells, f"{real} ({note})" if note else real]) + " |")
    return "\n".join(lines)


def report_text(options: MiniLDM, reports: dict[float, metrics.Report]) -> str:
    """metrics.md: what was measured, when, and by what command."""
    command = shlex.join(["python", "-m", "experiments.lecture39.mini_ldm", *sys.argv[1:]])
    lines = [
        f"# Mini latent diffusion on MNIST: {options.num_images} digits at each guidance scale w",
        "",
        f"{datetime.date.today()}, recipe {options.recipe}, DDIM in {options.num_inference_steps} steps, "
        f"seed {options.seed}, jaxldm {jaxldm.__version__}, jax {jax.__version__}, written by `{command}`",
        "",
        table(reports),
    ]
    return "\n".join(lines) + "\n"


def plot_scales(reports: dict[float, metrics.Report]) -> bytes:
    """A picture of accuracy, Fréchet distance and diversity against the guidance scale."""
    from matplotlib.figure import Figure

    scales = list(reports)
    figure = Figure(figsize=(10.5, 3.5), layout="constrained")
    panels = (
        ("accuracy", "classified as the requested digit", next(iter(reports.values())).classifier_accuracy),
        ("frechet_ratio", "Fréchet distance / real-vs-real floor", 1.0),
        ("feature_diversity", "within-class diversity / real", 1.0),
    )
    for axes, (column, label, real) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(scales, [getattr(reports[w], column) for w in scales], "o-", label="drawn digits")
        axes.axhline(real, color="grey", linestyle="--", label="real digits")
        axes.set(xlabel="guidance scale w", ylabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle("Guidance buys legible digits with variety")
    return figure_png(figure)


def export(run: RunFolder) -> None:
    """Writes the model as safetensors, and reads it back to see that not a bit changed."""
    folder = run.path / "export"
    pipelines.save(pipelines.load(run.path), folder)
    rows = pipelines.compare(pipelines.load(folder), pipelines.load(run.path))
    changed = [row.name for row in rows if row.difference]
    print(f"exported to {folder}: {len(rows) - len(changed)} of {len(rows)} tensors read back bit for bit")
    if changed:
        raise SystemExit(f"these differ: {', '.join(changed)}")


def main(options: MiniLDM) -> None:
    host.prepare()
    start = time.perf_counter()
    recipe = training.RECIPES[options.recipe]
    run = training.train(recipe, options.run_dir, resume=(options.run_dir / "config.json").exists())
    trained = time.perf_counter()
    reports = draw_and_measure(options, run)
    print("\n" + table(reports) + "\n")
    figures = {f"{scale:g}": report.to_dict() for scale, report in reports.items()}
    contents = {
        "metrics.md": report_text(options, reports).encode(),
        "metrics.json": json.dumps(figures, indent=1).encode(),
    }
    save_results(run.path, contents | {"guidance.png": plot_scales(reports)})
    export(run)
    end = time.perf_counter()
    minutes = (trained - start) / 60, (end - trained) / 60
    print(f"{sum(minutes):.1f} minutes: {minutes[0]:.1f} training, {minutes[1]:.1f} drawing and measuring")
    print(f"Look at {run.path}/grid-w3.png, and at metrics.md and the other pictures there.")


if __name__ == "__main__":
    run_script(main, MiniLDM)
