"""A sweep of the guidance scale on captioned shapes (lecture 39, exercise E1, from texts).

Question: which w is best for a model of captions, and by which figure?
Command:  python -m experiments.lecture39.e1_captions --run-dir runs/captioned-shapes
Needs:    a run of the recipe captioned-shapes; minutes and what came out: README.md in this folder.
          `--quick` for a look. --inception FILE adds FID and Inception Score, --clip FOLDER the CLIP score.

Pictures of every pair of shape and colour that was trained on, from the same noise at each w. `read_shapes`
reads from the pixels whether shape and colour are those of the caption: the stand-in for a CLIP score.
Distance, Inception-Score analogue and diversity rest on the features of a classifier of the pairs, which
is trained here on real pictures.
A second call keeps the scales that are done.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.captioned_shapes.score import prompts_of
from experiments.figures import quick_options
from experiments.lecture39.e1_guidance_sweep import Column, plot, published_figures, table
from experiments.results import Results, save_table
from experiments.trained import load_dataset, load_run
from jaxldm import checkpoints, data, metrics, models, training
from jaxldm.commands.terminal import run_script
from jaxldm.data import shapes
from jaxldm.metrics.shapes import read_shapes, shares_as_asked
from jaxldm.training.classifier import make_loss

RECIPE = "captioned-shapes"
# As of e1_guidance_sweep: title, key, format, key for real images, a line for real images in the plot.
COLUMNS: tuple[Column, ...] = (
    ("Fréchet distance / floor", "frechet_ratio", ".2f", None, 1.0),
    ("Inception-Score analogue", "inception_score", ".2f", "real_inception_score", None),
    ("shape and colour as in the caption", "shape and colour", ".1%", None, 1.0),
    ("diversity within a pair / real", "feature_diversity", ".2f", None, 1.0),
)


@dataclasses.dataclass(frozen=True)
class GuidanceSweepOfCaptions:
    """Draw captioned shapes at each guidance scale; measure distance, score, accuracy and diversity."""

    run_dir: Path = Path("runs/captioned-shapes")
    """A finished run of the recipe captioned-shapes."""
    output_dir: Path = Path("runs/lecture39/e1-captions")
    """Where results.json, table.md and the pictures are written."""
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 3.0, 5.0, 7.5, 10.0, 15.0)
    """w; 0 ignores the caption, 1 is the conditional model as trained."""
    per_pair: int = 10
    """Drawn of each of the 24 pairs, at each scale."""
    num_inference_steps: int = 20
    """DDIM steps."""
    batch_size: int = 24
    """Pictures at once."""
    classifier_epochs: int = 3
    """Of the classifier of the pairs, on the real pictures."""
    seed: int = 0
    """Of the noise, the same at every scale."""
    inception: Path | None = None
    """Weights of FID's InceptionV3, see `jaxldm eval --help`: adds FID and Inception Score."""
    clip: Path | None = None
    """Folder of CLIP: adds the score of each picture and its caption."""
    quick: bool = False
    """Two scales, a picture of each pair in 2 steps: only to see that everything runs."""


def trained_classifier(options: GuidanceSweepOfCaptions, dataset: data.Dataset) -> Any:
    """images -> (features, logits) of a classifier of the pairs, trained on the real pictures once."""
    module = models.build(
        "digit-classifier",
        sample_size=dataset.image_shape[0],
        in_channels=dataset.image_shape[-1],
        num_classes=dataset.num_classes,
    )
    images, labels = dataset.arrays("train")
    number = options.classifier_epochs * len(images) // 64
    adam = training.optimizer(2e-3, min(20, number), number)
    step = training.make_train_step(make_loss(training.ClassifierRecipe(augment=False), module), adam)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, rows: Any) -> Any:
        return step(state, {"image": train_images[rows], "label": train_labels[rows]})

    def make() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        key, random = jax.random.key(1), np.random.default_rng(1)
        state = training.create_train_state(key, models.init(module, key), adam, ema=False)
        for count in range(number):
            state, found = update(state, random.integers(0, len(images), 64))
            if count % 200 == 199:
                print(f"classifier: update {count + 1} of {number}, accuracy {found['accuracy']:.3f}")
        leaves = jax.tree.leaves(state.params)
        return {}, {str(place): np.asarray(leaf) for place, leaf in enumerate(leaves)}

    train_images, train_labels = jax.numpy.asarray(images), jax.numpy.asarray(labels)
    settings = {"epochs": options.classifier_epochs, "images": len(images)}
    _, arrays = Results(options.output_dir).row("classifier", settings, make)
    structure = jax.tree.structure(models.shapes(module))
    params = jax.tree.unflatten(structure, [arrays[str(place)] for place in range(len(arrays))])
    return metrics.classifier_function(module, params)


def sweep(options: GuidanceSweepOfCaptions) -> dict[float, tuple[dict[str, Any], np.ndarray]]:
    """{w: (figures, the first pictures)}; each is kept as soon as it is known."""
    pipe, dataset = load_run(options.run_dir, RECIPE), load_dataset(options.run_dir)
    classify = trained_classifier(options, dataset)
    asked, prompts = prompts_of(shapes.SEEN, options.per_pair)
    labels = (asked.shape * len(shapes.COLOURS) + asked.colour).astype(np.int32)
    networks = sorted(options.run_dir.glob("*/*.safetensors"))
    common = {
        "weights": checkpoints.hash_of_files(networks),
        "images": len(prompts),
        "steps": options.num_inference_steps,
        "seed": options.seed,
    }

    def draw(w: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        images = pipe(
            jax.random.key(options.seed),
            prompts,
            guidance_scale=w,
            num_inference_steps=options.num_inference_steps,
            batch_size=options.batch_size,
            solver="ddim",
        )
        return {}, {"images": data.to_uint8(images)}

    def measure(w: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        _, drawn = results.row(f"pictures at w{w:g}", common, lambda: draw(w))
        images = data.from_uint8(drawn["images"])
        report = metrics.evaluate(images, labels, classify, dataset).to_dict()
        report |= shares_as_asked(read_shapes(drawn["images"]), asked._asdict())
        report |= published_figures(options, images, prompts)
        return report, {"images": images[: len(shapes.SEEN)]}

    results = Results(options.output_dir)
    measured = {
        **common,
        "classifier": options.classifier_epochs,
        "published": [str(options.inception), str(options.clip)],
    }
    found = {}
    for w in options.guidance_scales:
        figures, arrays = results.row(f"w{w:g}", measured, lambda w=w: measure(w))
        found[w] = figures, arrays["images"]
        print(
            f"w = {w:g}: " + ", ".join(f"{title} {figures[key]:{form}}" for title, key, form, *_ in COLUMNS),
            flush=True,
        )
    return found


def main(options: GuidanceSweepOfCaptions) -> None:
    options = quick_options(
        options, per_pair=1, num_inference_steps=2, classifier_epochs=1, guidance_scales=(1.0, 3.0)
    )
    found = sweep(options)
    number = options.per_pair * len(shapes.SEEN)
    title = f"{number} captioned shapes at each w, DDIM in {options.num_inference_steps} steps"
    save_table(options.output_dir / "table.md", title, table(found, COLUMNS, "(real pictures)"))
    plot(options.output_dir / "curves.png", found, COLUMNS)
    # One picture of each pair, of which the first half is enough to look at.
    shown = len(shapes.SEEN) // 2
    names = [f"{shapes.COLOURS[colour]} {shapes.SHAPES[shape]}" for shape, colour in shapes.SEEN[::2]]
    grid = metrics.labelled_grid(
        np.concatenate([images[::2] for _, images in found.values()]),
        shown,
        title="The same noise at each guidance scale; columns: shape and colour of the caption",
        column_labels=names,
        row_labels=[f"w = {w:g}" for w in found],
        scale=3,
    )
    metrics.save_png(options.output_dir / "pictures.png", grid)
    print(f"Look at {options.output_dir}/curves.png and pictures.png.")


if __name__ == "__main__":
    run_script(main, GuidanceSweepOfCaptions)
