"""Over-guidance, what the decoder makes of it, and methods against it (lecture 39, exercise E9).

Question: what does a strong guidance do to contrast and to the latents that reach the decoder, and what
          reduces it?
Command:  python -m experiments.lecture39.e9_over_guidance --run-dir runs/mini-ldm
Needs:    a run of `make demo` (or `jaxldm train mini-ldm`); minutes and what came out: README.md in this
          folder.

Digits at rising w, plain and with each method: guidance rescale, x_0 kept within the range of real
latents, and guidance only at middle noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import figure_png, save_results
from experiments.trained import load_classifier, load_dataset, load_latent_model
from jaxldm import diffusion as D
from jaxldm import metrics, models, pipelines
from jaxldm.commands.terminal import run_script
from jaxldm.errors import one_of
from jaxldm.metrics.pictures import png_bytes

METHODS = ("none", "rescale 0.7", "threshold", "interval")


@dataclasses.dataclass(frozen=True)
class OverGuidance:
    """Draw digits at rising guidance scales, with and without methods against it, and measure saturation."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run with an autoencoder, classes and a classifier."""
    output_dir: Path = Path("runs/lecture39/e9")
    """Where the pictures are written."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0, 7.5, 15.0, 30.0)
    """w; 1 is the conditional model as trained."""
    methods: tuple[str, ...] = METHODS
    """Which of "none", "rescale 0.7", "threshold" and "interval"."""
    num_images: int = 100
    """Drawn in each setting."""
    num_inference_steps: int = 20
    """DDIM steps."""


def make_sampler(
    pipe: pipelines.Pipeline, options: OverGuidance, method: str, bound: float
) -> Callable[[Any, Any, Any], Any]:
    """(parameters, labels [N], w) -> latents [N, h, w, c]; jitted once for all w."""
    path = pipe.prediction.path
    grid = D.make_grid(path, options.num_inference_steps)
    shape = (options.num_images, *pipe.latent_shape())

    @jax.jit
    def draw(params, labels, w):
        network = functools.partial(models.network(pipe.denoiser.module), params)
        scale = D.guidance_interval(path, w, 0.3, 5.0) if method == "interval" else w
        rescale = 0.7 if method == "rescale 0.7" else 0.0
        predict = D.classifier_free_guidance(network, labels, pipe.num_classes, scale, rescale)
        denoise = D.denoiser(predict, pipe.prediction)
        if method == "threshold":
            denoise = D.static_threshold(denoise, -bound, bound)
        key = jax.random.key(0)
        return D.sample(key, denoise, D.solvers.ddim(), grid, D.initial_noise(key, shape, grid))

    return draw


class Real(NamedTuple):
    """Test digits, their labels and latents, and the |latent| that 999 of 1000 stay below."""

    images: np.ndarray
    labels: np.ndarray
    latents: np.ndarray
    bound: float


def real_digits(options: OverGuidance, encode: Callable[[Any], Any]) -> Real:
    """The test set of the run."""
    images, labels = load_dataset(options.run_dir).arrays("test")
    latents = np.asarray(encode(images))
    return Real(images, labels, latents, float(np.quantile(np.abs(latents), 0.999)))


FIGURES = {
    "classified as requested": ".0%",
    "diversity": ".2f",  # of pixels within a class, as a ratio to real
    "contrast": ".2f",  # standard deviation within a picture, as a ratio to real
    "ink": ".2f",  # share of pixels above middle grey, as a ratio to real
    "latents' std": ".2f",  # as a ratio to real
    "latents out of range": ".1%",  # beyond what 99.9 % of the real ones stay below
    "round trip": ".2f",  # rms of encode(decode(z)) - z
}


def measure(images, latents, labels, back, logits, real: Real) -> dict[str, float]:
    """The figures above."""
    return {
        "classified as requested": np.mean(logits.argmax(axis=1) == labels),
        "diversity": metrics.diversity_ratio(images, labels, real.images, real.labels),
        "contrast": images.std(axis=(1, 2, 3)).mean() / real.images.std(axis=(1, 2, 3)).mean(),
        "ink": np.mean(images > 0) / np.mean(real.images > 0),
        "latents' std": latents.std() / real.latents.std(),
        "latents out of range": np.mean(np.abs(latents) > real.bound),
        "round trip": np.sqrt(np.mean((back - latents) ** 2)),
    }


def run(options: OverGuidance, pipe: pipelines.Pipeline) -> tuple[dict, np.ndarray]:
    """({(method, w): figures}, pictures): prints each row as it comes."""

    def decode(latents):
        return pipe.decode(latents, batch_size=len(latents))

    encode = jax.jit(lambda x: models.encode_latents(pipe.autoencoder.module, pipe.autoencoder.params, x))
    classify = load_classifier(options.run_dir)
    real = real_digits(options, encode)
    labels = np.arange(options.num_images, dtype=np.int32) % pipe.num_classes
    print(f"|latent| of real digits: 99.9 % below {real.bound:.2f}\n")
    print("| method | w | " + " | ".join(FIGURES) + " |\n" + "|---" * (len(FIGURES) + 2) + "|")

    def row(method, w, images, latents, labels):
        _, logits = classify(images)
        found = measure(images, latents, labels, np.asarray(encode(images)), logits, real)
        cells = [format(found[name], form) for name, form in FIGURES.items()]
        print("| " + " | ".join([method, w, *cells]) + " |")
        return found

    row("(real, through the decoder)", "-", np.asarray(decode(real.latents)), real.latents, real.labels)
    found, pictures = {}, []
    for method in options.methods:
        draw = make_sampler(pipe, options, method, real.bound)
        for w in options.guidance_scales:
            latents = np.asarray(draw(pipe.denoiser.params, labels, jnp.float32(w)))
            images = np.asarray(decode(latents))
            found[method, w] = row(method, f"{w:g}", images, latents, labels)
            pictures.append(images[: pipe.num_classes])
    return found, np.concatenate(pictures)


def plot(options: OverGuidance, found: dict) -> bytes:
    """A picture of contrast, ink, round trip and diversity against w, a line for each method."""
    from matplotlib.figure import Figure

    names = {
        "contrast": "contrast / real",
        "ink": "pixels above middle grey / real",
        "round trip": "rms of encode(decode(z)) - z",
        "diversity": "diversity within a class / real",
    }
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for axes, (name, label) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
        for method in options.methods:
            axes.plot(
                options.guidance_scales,
                [found[method, w][name] for w in options.guidance_scales],
                "o-",
                label=method,
            )
        axes.set(xlabel="guidance scale w", ylabel=label, xscale="log")
        axes.set_xticks(options.guidance_scales, [f"{w:g}" for w in options.guidance_scales])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(title="method", fontsize=8)
    return figure_png(figure)


def main(options: OverGuidance) -> None:
    pipe = load_latent_model(options.run_dir)
    for method in options.methods:
        one_of("method", method, METHODS)
    found, pictures = run(options, pipe)
    curves = plot(options, found)
    columns = min(pipe.num_classes, options.num_images)
    grid = metrics.labelled_grid(
        pictures,
        columns,
        title="Digits under strong guidance, the same noise; columns: requested class",
        column_labels=[str(label) for label in range(columns)],
        row_labels=[f"{method}, w = {w:g}" for method in options.methods for w in options.guidance_scales],
    )
    save_results(options.output_dir, {"over-guidance.png": curves, "digits.png": png_bytes(grid)})
    print(f"\nLook at {options.output_dir}/over-guidance.png and digits.png.")


if __name__ == "__main__":
    run_script(main, OverGuidance)
