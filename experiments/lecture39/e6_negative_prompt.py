"""Negative prompts: the unconditional branch replaced (lecture 39, exercise E6).

Question: what does a negative prompt do, in algebra and in pictures?
Command:  python -m experiments.lecture39.e6_negative_prompt --run-dir runs/mini-ldm
Needs:    a run of `make demo` (or `jaxldm train mini-ldm`); minutes and what came out: README.md in this
          folder.

First the algebra, on the run's own network; then digits of a requested class and, in the second row of each
pair, with the class they are mistaken for as the negative prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.checks import Check, distance, show
from experiments.trained import load_classifier
from jaxldm import diffusion as D
from jaxldm import metrics, models, pipelines
from jaxldm.commands.terminal import run_script


@dataclasses.dataclass(frozen=True)
class NegativePrompt:
    """Check the algebra of negative prompts and draw digits with and without one."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run with classes and a classifier."""
    output_dir: Path = Path("runs/lecture39/e6")
    """Where the picture is written."""
    pairs: tuple[tuple[int, int], ...] = ((4, 9), (7, 9), (3, 5), (8, 3))
    """(requested, negative) classes."""
    guidance_scale: float = 2.0
    """w: the pull towards the requested class is w, the push from the negative one w - 1."""
    num_images: int = 48
    """Drawn of each kind."""
    num_inference_steps: int = 25
    """DDIM steps."""


def check_algebra(pipe: pipelines.Pipeline, requested: int, negative: int, w: float) -> list[Check]:
    """What (1 - w) eps(negative) + w eps(requested) is in other words, on the network of the run."""
    shape = (8, *pipe.latent_shape())
    x, t = jax.random.normal(jax.random.key(0), shape), jnp.linspace(0, 999, 8)

    network = jax.jit(functools.partial(models.network(pipe.denoiser.module), pipe.denoiser.params))

    def guided(label, null, scale):
        return D.classifier_free_guidance(network, jnp.full(8, label), null, scale)(x, t)

    labels = (negative, requested, pipe.num_classes)
    of_negative, cond, uncond = (network(x, t, jnp.full(8, label)) for label in labels)
    ours = guided(requested, negative, w)
    with_null = guided(requested, pipe.num_classes, w)
    same = guided(requested, requested, w)
    at_zero, at_one = (guided(requested, negative, scale) for scale in (0.0, 1.0))
    two = cond + (w - 1) * (cond - of_negative)
    three = uncond + w * (cond - uncond) - (w - 1) * (of_negative - uncond)
    return [
        Check("= eps(c) + (w - 1) (eps(c) - eps(n))", distance(ours, two), 1e-4),
        Check("= eps(0) + w (eps(c) - eps(0)) - (w - 1) (eps(n) - eps(0))", distance(ours, three), 1e-4),
        Check("n = the null class is ordinary guidance", distance(with_null, D.guide(uncond, cond, w)), 1e-4),
        Check("n = c is the conditional output, whatever w", distance(same, cond), 1e-4),
        Check("at w = 1 the negative prompt is ignored", distance(at_one, cond), 1e-4),
        Check("w = 0 draws the negative prompt", distance(at_zero, of_negative), 1e-4),
    ]


def draw(
    pipe: pipelines.Pipeline, options: NegativePrompt, requested: int, negative: int | None
) -> np.ndarray:
    """Digits [N, H, W, 1] of one class; the same noise with and without a negative class."""
    return pipe(
        jax.random.key(0),
        [requested] * options.num_images,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        negative_labels=negative,
    )


def measure(options: NegativePrompt, pipe: pipelines.Pipeline) -> np.ndarray:
    """Prints how the digits are classified; returns rows of pictures, without and with the negative."""
    classify = load_classifier(options.run_dir)
    rows = []
    print(
        f"\n| w = {options.guidance_scale:g}: requested, negative | classified as requested "
        "| as the negative | logit of requested over negative, median | diversity of pixels |\n"
        "|---|---|---|---|---|"
    )
    for requested, negative in options.pairs:
        for used in (None, negative):
            images = draw(pipe, options, requested, used)
            _, logits = classify(images)
            found = logits.argmax(axis=1)
            margin = np.median(logits[:, requested] - logits[:, negative])
            spread = metrics.within_class_diversity(images, np.zeros(len(images), np.int32))
            print(
                f"| {requested}, {'-' if used is None else used} | {np.mean(found == requested):.0%} | "
                f"{np.mean(found == negative):.0%} (a {negative}) | {margin:.1f} | {spread:.2f} |"
            )
            rows.append(images[:12])
    return np.concatenate(rows)


def main(options: NegativePrompt) -> None:
    pipe = pipelines.load(options.run_dir)
    requested, negative = options.pairs[0]
    show(
        "(1 - w) eps(n) + w eps(c), with c the requested class and n the negative prompt (float32, relative)",
        check_algebra(pipe, requested, negative, options.guidance_scale),
    )
    pictures = measure(options, pipe)
    path = options.output_dir / "negative-prompt.png"
    labels = [label for c, n in options.pairs for label in (f"{c}", f"{c}, negative {n}")]
    title = f"Digits at w = {options.guidance_scale:g}, the same noise without and with a negative class"
    columns = min(12, options.num_images)
    metrics.save_png(path, metrics.labelled_grid(pictures, columns, title=title, row_labels=labels, scale=2))
    print(f"\nLook at {path}.")


if __name__ == "__main__":
    run_script(main, NegativePrompt)
