"""Negative prompts: the unconditional branch replaced (lecture 39, exercise E6).

Question: what does a negative prompt do, in algebra and in pictures?
Command:  python experiments/lecture39/e6_negative_prompt.py --run-dir runs/mini-ldm
Needs:    a run of `make demo` (or `jaxldm train mini-ldm`); minutes and what came out: README.md beside this
          file.

First the algebra, on the run's own network; then digits that are asked for and, in the second row of each
pair, steered away from the class that they are mistaken for.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import checkpoints, metrics, pipelines, training
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script

sys.path.append(str(Path(__file__).parents[1]))
from checks import Check, distance, show


@dataclasses.dataclass(frozen=True)
class NegativePrompt:
    """Check the algebra of negative prompts and draw digits with and without one."""

    run_dir: Path = Path("runs/mini-ldm")
    """A finished run with classes and a classifier."""
    output_dir: Path = Path("runs/lecture39/e6")
    """Where the picture is written."""
    pairs: tuple[tuple[int, int], ...] = ((4, 9), (7, 9), (3, 5), (8, 3))
    """(asked, steered away from)."""
    guidance_scale: float = 2.0
    """w: the pull towards the asked class is w, the push from the other w - 1."""
    num_images: int = 48
    """Drawn of each kind."""
    num_inference_steps: int = 25
    """DDIM steps."""


def check_algebra(pipe: pipelines.Pipeline, asked: int, negative: int, w: float) -> list[Check]:
    """What (1 - w) eps(negative) + w eps(asked) is in other words, on the network of the run."""
    shape = (8, *pipe.latent_shape())
    x, t = jax.random.normal(jax.random.key(0), shape), jnp.linspace(0, 999, 8)

    @jax.jit
    def network(x, t, labels):
        return pipe.denoiser.module.apply({"params": pipe.denoiser.params}, x, t, labels)

    def guided(label, null, scale):
        return D.classifier_free_guidance(network, jnp.full(8, label), null, scale)(x, t)

    away, towards, null = (network(x, t, jnp.full(8, label)) for label in (negative, asked, pipe.num_classes))
    ours = guided(asked, negative, w)
    three = null + w * (towards - null) - (w - 1) * (away - null)
    return [
        Check(
            "= eps(c) + (w - 1) (eps(c) - eps(n))", distance(ours, towards + (w - 1) * (towards - away)), 1e-4
        ),
        Check("= eps(0) + w (eps(c) - eps(0)) - (w - 1) (eps(n) - eps(0))", distance(ours, three), 1e-4),
        Check(
            "n = the null class is ordinary guidance",
            distance(guided(asked, pipe.num_classes, w), D.guide(null, towards, w)),
            1e-4,
        ),
        Check(
            "n = c is the conditional answer, whatever w", distance(guided(asked, asked, w), towards), 1e-4
        ),
        Check(
            "w = 1 does not hear the negative prompt", distance(guided(asked, negative, 1.0), towards), 1e-4
        ),
        Check("w = 0 draws the negative prompt", distance(guided(asked, negative, 0.0), away), 1e-4),
    ]


def draw(pipe: pipelines.Pipeline, options: NegativePrompt, asked: int, negative: int | None) -> np.ndarray:
    """Digits [N, H, W, 1] of one class; the same noise with and without a negative class."""
    return pipe(
        jax.random.key(0),
        [asked] * options.num_images,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        negative_labels=negative,
    )


def measure(options: NegativePrompt, pipe: pipelines.Pipeline) -> np.ndarray:
    """Prints how the judge reads the digits; returns rows of pictures, without and with the negative."""
    classify = metrics.classifier_function(
        *checkpoints.load(training.RunFolder(options.run_dir).stage("classifier").model)
    )
    rows = []
    print(
        f"\n| w = {options.guidance_scale:g}: asked, away from | read as asked | read as the other | "
        "logit of asked over other, median | diversity of pixels |\n|---|---|---|---|---|"
    )
    for asked, negative in options.pairs:
        for away in (None, negative):
            images = draw(pipe, options, asked, away)
            _, logits = classify(images)
            read, margin = logits.argmax(axis=1), np.median(logits[:, asked] - logits[:, negative])
            spread = metrics.within_class_diversity(images, np.zeros(len(images), np.int32))
            print(
                f"| {asked}, {'-' if away is None else away} | {np.mean(read == asked):.0%} | "
                f"{np.mean(read == negative):.0%} (a {negative}) | {margin:.1f} | {spread:.2f} |"
            )
            rows.append(images[:12])
    return np.concatenate(rows)


def main(options: NegativePrompt) -> None:
    pipe = pipelines.load(options.run_dir)
    asked, negative = options.pairs[0]
    show(
        "(1 - w) eps(n) + w eps(c), with c asked for and n the negative prompt (float32, relative)",
        check_algebra(pipe, asked, negative, options.guidance_scale),
    )
    pictures = measure(options, pipe)
    path = options.output_dir / "negative-prompt.png"
    metrics.save_png(path, metrics.image_grid(pictures, columns=min(12, options.num_images), scale=2))
    print(f"\nLook at {path}: for each pair a row without the negative class above a row with it.")


if __name__ == "__main__":
    run_script(main, NegativePrompt)
