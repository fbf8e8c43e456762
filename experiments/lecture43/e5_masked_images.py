"""A masked image model next to a diffusion transformer (lecture 43, exercise E5).

Question: what does unmasking 16 grey levels in 12 steps gain and cost, against Tiny DiT trained for as long?
Command:  python -m experiments.lecture43.e5_masked_images --run-dir runs/lecture43/e5
Needs:    the `demo` extra; two CPU cores. Minutes and what came out: README.md in this folder. A second
          call goes on with the training where the first one stopped.

Both networks are drawn from with the same labels; the classifier of the masked run measures both.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxldm
from experiments.trained import load_classifier, load_dataset
from jaxldm import host, metrics, models, pipelines, training
from jaxldm.commands.terminal import run_script
from jaxldm.files import write_together
from jaxldm.metrics.pictures import png_bytes


@dataclasses.dataclass(frozen=True)
class MaskedImages:
    """Train both models, draw from both, and compare seconds, network calls and quality."""

    run_dir: Path = Path("runs/lecture43/e5")
    """Folder of the two runs, masked/ and dit/, and of the results."""
    masked_recipe: str = "masked-digits"
    """masked-digits, or smoke-masked (seconds; draws noise)."""
    dit_recipe: str = "tiny-dit"
    """tiny-dit, or smoke-dit."""
    dit_epochs: int | None = 24
    """As many as take the seconds of the masked model; None: those of the recipe."""
    num_images: int = 500
    """Drawn and measured of each row; of those of more than 100 steps, only the timed ones."""
    timed_images: int = 16
    """The images of the seconds, drawn at once."""
    slow_steps: int = 1000
    """Steps of DDPM in the last row, as in the lecture."""
    seed: int = 0
    """Of the images."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to draw: a model, and the options of its call."""

    model: str
    words: str
    steps: int
    guidance_scale: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def call(self, pipe: pipelines.Pipeline, seed: int, labels: np.ndarray) -> np.ndarray:
        """Images [N, 28, 28, 1] of the labels."""
        options = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, **self.options}
        return pipe(jax.random.key(seed), labels, **options)


def rows_of(options: MaskedImages) -> list[Row]:
    """What is compared, in the order of the table."""
    ddim = {"solver": "ddim"}
    return [
        Row("masked", "masked tokens", 12, 1.0),
        Row("masked", "masked tokens", 12, 2.0),
        Row("masked", "masked tokens", 24, 2.0),
        Row("dit", "Tiny DiT, DDIM", 12, 1.0, ddim),
        Row("dit", "Tiny DiT, DDIM", 12, 3.0, ddim),
        Row("dit", "Tiny DiT, DDIM", 50, 3.0, ddim),
        Row("dit", "Tiny DiT, DDPM", options.slow_steps, 3.0, {"solver": "ddpm"}),
    ]


def train(options: MaskedImages) -> dict[str, training.RunFolder]:
    """The two runs, finished."""
    masked = training.RECIPES[options.masked_recipe]
    dit = dataclasses.replace(training.RECIPES[options.dit_recipe], classifier=None)
    if options.dit_epochs is not None:
        diffusion = dataclasses.replace(dit.diffusion, epochs=options.dit_epochs)
        dit = dataclasses.replace(dit, diffusion=diffusion)
    runs = {}
    for name, recipe in (("masked", masked), ("dit", dit)):
        folder = options.run_dir / name
        runs[name] = training.train(recipe, folder, resume=(folder / "config.json").exists())
    return runs


def facts_of(run: training.RunFolder) -> dict[str, Any]:
    """Parameters, updates and seconds of the training of what draws."""
    generator = training.read_recipe(run.path).generator
    log = training.read_log(run.stage(generator).log)
    network = pipelines.load(run.path).denoiser
    macs = models.count_macs(network.module)
    return {
        "parameters": int(models.count_params(network.module)),
        "multiply_accumulates": int(macs),
        "updates": int(log["step"][-1]),
        "training_seconds": round(float(log["seconds"][-1]), 1),
    }


def seconds_of(row: Row, pipe: pipelines.Pipeline, options: MaskedImages) -> float:
    """The least of three calls, or of one of many steps, without compiling."""
    labels = pipe.cycle_labels(None, options.timed_images)
    scale = row.guidance_scale
    pipe.warm_up(labels, num_inference_steps=row.steps, guidance_scale=scale, **row.options)
    taken = []
    for _ in range(3 if row.steps <= 100 else 1):
        start = time.perf_counter()
        row.call(pipe, options.seed, labels)
        taken.append(time.perf_counter() - start)
    return min(taken)


def measure(options: MaskedImages, runs: Mapping[str, training.RunFolder]) -> tuple[list[dict], list]:
    """The figures of each row, and its first 20 images."""
    pipes = {name: pipelines.load(run.path) for name, run in runs.items()}
    classify, dataset = load_classifier(runs["masked"].path), load_dataset(runs["masked"].path)
    found, pictures = [], []
    for row in rows_of(options):
        pipe = pipes[row.model]
        branches = 1 if row.guidance_scale == 1 else 2
        figures: dict[str, Any] = {
            "name": row.words,
            "steps": row.steps,
            "guidance_scale": row.guidance_scale,
            "network_calls": row.steps,
            "images_per_call": options.timed_images * branches,
        }
        figures["seconds"] = seconds_of(row, pipe, options)
        count = options.num_images if row.steps <= 100 else options.timed_images
        labels = pipe.cycle_labels(None, count)
        images = row.call(pipe, options.seed, labels)
        if row.steps <= 100:
            report = metrics.evaluate(images, labels, classify, dataset)
            figures |= {
                "accuracy": report.accuracy,
                "classifier_accuracy": report.classifier_accuracy,
                "frechet_ratio": report.frechet_ratio,
                "feature_diversity": report.feature_diversity,
            }
        found.append(figures)
        pictures.append(np.resize(images, (2 * pipe.num_classes, *images.shape[1:])))
        print(line_of(figures), flush=True)
    return found, pictures


HEAD = (
    "| model | w | steps | seconds for {n} images | network calls x images | as requested | "
    "Fréchet distance / floor | diversity |"
)


def line_of(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    measured = ["", "", ""]
    if "accuracy" in row:
        measured = [
            f"{row['accuracy']:.1%}",
            f"{row['frechet_ratio']:.2f}",
            f"{row['feature_diversity']:.2f}",
        ]
    cells = [row["name"], f"{row['guidance_scale']:g}", row["steps"], f"{row['seconds']:.2f}"]
    cells += [f"{row['network_calls']} x {row['images_per_call']}", *measured]
    return "| " + " | ".join(map(str, cells)) + " |"


def markdown(options: MaskedImages, facts: Mapping[str, Any], rows: list[dict]) -> str:
    """results.md."""
    lines = [
        f"# A masked image model next to Tiny DiT, jaxldm {jaxldm.__version__}",
        "",
        "| trained | parameters | multiply-accumulates of a call | updates | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, fact in facts.items():
        macs = f"{fact['multiply_accumulates'] / 1e6:.0f} M"
        cells = [name, f"{fact['parameters'] / 1e6:.2f} M", macs, fact["updates"], fact["training_seconds"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    real = next(row["classifier_accuracy"] for row in rows if "accuracy" in row)
    lines += ["", HEAD.format(n=options.timed_images), "|---" * 8 + "|", *map(line_of, rows)]
    lines += [f"| real test digits | | | | | {real:.1%} | 1 | 1 |", ""]
    return "\n".join(lines)


def main(options: MaskedImages) -> None:
    host.prepare()
    start = time.perf_counter()
    runs = train(options)
    trained = time.perf_counter()
    facts = {name: facts_of(run) for name, run in runs.items()}
    print(HEAD.format(n=options.timed_images) + "\n" + "|---" * 8 + "|")
    rows, pictures = measure(options, runs)
    names = [f"{row['name']}, {row['steps']} steps, w = {row['guidance_scale']:g}" for row in rows]
    columns = len(pictures[0])
    picture = metrics.labelled_grid(
        np.concatenate(pictures),
        columns,
        title="Digits by masked tokens and by Tiny DiT; columns: requested class",
        column_labels=[str(label % 10) for label in range(columns)],
        row_labels=names,
    )
    results = {"trained": facts, "rows": rows, "num_images": options.num_images, "jax": jax.__version__}
    contents = {
        "results.json": (json.dumps(results, indent=1) + "\n").encode(),
        "results.md": markdown(options, facts, rows).encode(),
        "digits.png": png_bytes(picture),
    }
    write_together(options.run_dir, contents, contents.__contains__)
    minutes = (trained - start) / 60, (time.perf_counter() - trained) / 60
    print(f"{sum(minutes):.1f} minutes: {minutes[0]:.1f} training, {minutes[1]:.1f} drawing and measuring")
    print(f"Look at {options.run_dir}: results.md, results.json, digits.png.")


if __name__ == "__main__":
    run_script(main, MaskedImages)
