"""A sweep of the guidance scale (lecture 39, exercise E1).

Question: which w is best, and by which figure?
Command:  python -m experiments.lecture39.e1_guidance_sweep --run-dir runs/mini-ldm
Needs:    a run of `make demo`; minutes and what came out: README.md in this folder. `--quick` for a look.
          --inception FILE adds FID and Inception Score, --clip FOLDER the CLIP score.

500 digits at each w, from the same noise: Fréchet distance and Inception-Score analogue on the features of
the run's classifier, share classified as requested (what a CLIP score is for texts), diversity within a
class.
A second call keeps the scales that are done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.figures import quick_options, save_figure
from experiments.results import Results, markdown, save_table
from experiments.trained import check_demo, load_classifier, load_dataset, load_latent_model, weights_hash
from jaxldm import metrics, pipelines
from jaxldm.commands.eval import Eval
from jaxldm.commands.terminal import run_script
from jaxldm.data import to_uint8
from jaxldm.files import write_atomically


@dataclasses.dataclass(frozen=True)
class GuidanceSweep:
    """Draw digits at each guidance scale, and measure distance, score, accuracy and diversity."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run with an autoencoder, classes and a classifier."""
    output_dir: Path = Path("runs/lecture39/e1")
    """Where results.json, table.md and the pictures are written."""
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 3.0, 5.0, 7.5, 10.0, 15.0)
    """w; 0 ignores the class, 1 is the conditional model as trained."""
    num_images: int = 500
    """Drawn at each scale."""
    num_inference_steps: int = 50
    """DDIM steps."""
    seed: int = 0
    """Of the noise, the same at every scale."""
    inception: Path | None = None
    """Weights of FID's InceptionV3, see `jaxldm eval --help`: adds FID and Inception Score."""
    clip: Path | None = None
    """Folder of CLIP: adds the score of each digit and "a handwritten digit 7"."""
    quick: bool = False
    """Three scales, 20 digits in 2 steps: only to see that everything runs."""


Column = tuple[str, str, str, str | None, float | None]
# Title, key of the figures, format, key of the same for real images, a line for real images in the plot.
COLUMNS: tuple[Column, ...] = (
    ("Fréchet distance / floor", "frechet_ratio", ".2f", None, 1.0),
    ("Inception-Score analogue", "inception_score", ".2f", "real_inception_score", None),
    ("classified as requested", "accuracy", ".1%", "classifier_accuracy", None),
    ("diversity within a class / real", "feature_diversity", ".2f", None, 1.0),
)
PUBLISHED = (("FID", "fid"), ("Inception Score", "is"), ("CLIP score", "clip-score"))


def draw(pipe: pipelines.Pipeline, options: GuidanceSweep, w: float) -> np.ndarray:
    """Digits [N, H, W, C] in [-1, 1]; every class equally often."""
    labels = pipe.cycle_labels(None, options.num_images)
    steps, key = options.num_inference_steps, jax.random.key(options.seed)
    return pipe(key, labels, num_inference_steps=steps, guidance_scale=w)


def published_figures(options: Any, images: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
    """Published metrics as `jaxldm eval` computes them; none without their weights."""
    folder = options.output_dir / "published"
    if not (options.inception or options.clip):
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    drawn, out, texts = folder / "drawn.npz", folder / "out.json", folder / "texts.txt"
    np.savez(drawn, images=to_uint8(images))
    write_atomically(texts, "".join(f"{prompt}\n" for prompt in prompts).encode())
    calls: list[dict[str, Any]] = []
    if options.inception:
        calls.append(
            {"metrics": ("fid", "is"), "real": str(options.run_dir), "inception": str(options.inception)}
        )
    if options.clip:
        calls.append({"metrics": ("clip-score",), "clip": str(options.clip), "prompts": str(texts)})
    figures: dict[str, Any] = {"weights": {}}
    for call in calls:
        Eval(str(drawn), json=str(out), **call).run()
        report = json.loads(out.read_text(encoding="utf-8"))
        figures["weights"] |= report["weights"]
        for values in report["metrics"].values():
            figures |= values
    return figures


def sweep(options: GuidanceSweep) -> dict[float, tuple[dict[str, Any], np.ndarray]]:
    """{w: (figures, the first digits)}; each is kept as soon as it is known."""
    pipe = load_latent_model(options.run_dir)
    classify, dataset = load_classifier(options.run_dir), load_dataset(options.run_dir)
    labels = pipe.cycle_labels(None, options.num_images)
    results = Results(options.output_dir)
    common = {
        "weights": weights_hash(options.run_dir),
        "images": options.num_images,
        "steps": options.num_inference_steps,
        "seed": options.seed,
        "published": [str(options.inception), str(options.clip)],
    }

    def make(w):
        images = draw(pipe, options, w)
        report = metrics.evaluate(images, labels, classify, dataset).to_dict()
        report |= published_figures(options, images, [f"a handwritten digit {label}" for label in labels])
        return report, {"images": images[: 2 * pipe.num_classes]}

    found = {}
    for w in options.guidance_scales:
        figures, arrays = results.row(f"w{w:g}", common, lambda w=w: make(w))
        found[w] = figures, arrays["images"]
        print(
            f"w = {w:g}: " + ", ".join(f"{title} {figures[key]:{form}}" for title, key, form, *_ in COLUMNS)
        )
    return found


def table(
    found: dict[float, tuple[dict[str, Any], np.ndarray]],
    columns: Sequence[Column] = COLUMNS,
    real_name: str = "(real digits)",
) -> str:
    """A row for each scale, and one for real images."""
    first = next(iter(found.values()))[0]
    extra = [(title, key) for title, key in PUBLISHED if key in first]
    body = [
        [f"{w:g}", *(format(figures[key], form) for _, key, form, *_ in columns)]
        + [f"{figures[key]:.2f}" for _, key in extra]
        for w, (figures, _) in found.items()
    ]
    real = [format(first[real] if real else 1, form) for _, _, form, real, _ in columns]
    body.append([real_name, *real, *("" for _ in extra)])
    text = markdown(["w", *(column[0] for column in columns), *(title for title, _ in extra)], body)
    for network, entry in first.get("weights", {}).items():
        text += f"\n{network}: {entry['file']}, SHA-256 {entry['sha256']}\n"
    return text


def plot(
    path: Path,
    found: dict[float, tuple[dict[str, Any], np.ndarray]],
    columns: Sequence[Column] = COLUMNS,
) -> None:
    """The four curves against w, with the real images' figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.4), layout="constrained")
    scales, reports = list(found), [figures for figures, _ in found.values()]
    for axes, (title, key, _, real, line) in zip(figure.subplots(1, len(columns)), columns, strict=True):
        axes.plot(scales, [report[key] for report in reports], "o-", label="drawn")
        axes.axhline(reports[0][real] if real else line, color="grey", linestyle="--", label="real")
        axes.set(xlabel="guidance scale w", ylabel=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    save_figure(path, figure)


def main(options: GuidanceSweep) -> None:
    few = {"num_images": 20, "num_inference_steps": 2}
    options = quick_options(options, **few, guidance_scales=(0.0, 1.0, 7.5))
    check_demo(options.run_dir)
    found = sweep(options)
    title = f"{options.num_images} digits at each w, DDIM in {options.num_inference_steps} steps"
    save_table(options.output_dir / "table.md", title, table(found))
    plot(options.output_dir / "curves.png", found)
    names = load_dataset(options.run_dir).class_names
    columns = 2 * len(names)
    rows = [images for _, images in found.values()]
    grid = metrics.labelled_grid(
        np.concatenate(rows),
        min(columns, options.num_images),
        title="The same noise at each guidance scale; columns: requested class",
        column_labels=(list(names) * 2)[: options.num_images],
        row_labels=[f"w = {w:g}" for w in found],
    )
    metrics.save_png(options.output_dir / "digits.png", grid)
    print(f"Look at {options.output_dir}/curves.png and digits.png.")


if __name__ == "__main__":
    run_script(main, GuidanceSweep)
