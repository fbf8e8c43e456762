"""How often `read_shapes` reads rendered pictures rightly: clean, blurred and noisy ones.

Question: how often is each attribute read as it was drawn?
Command:  python -m experiments.captioned_shapes.reading --image-size 32
Needs:    nothing but the package. Minutes and figures: README.md in this folder.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import UInt8

from jaxldm.commands.terminal import run_script
from jaxldm.data import shapes
from jaxldm.metrics.shapes import read_shapes, shares_as_asked

SEED = 1234


@dataclasses.dataclass(frozen=True)
class Reading:
    """Render pictures whose attributes are known, and read them: clean, blurred and noisy."""

    image_size: int = 32
    """Height and width in pixels."""
    num_images: int = 10_000
    """Of the clean ones; a thousand of each other kind."""


def blurred(images: UInt8[np.ndarray, "N H W C"], sigma: float) -> UInt8[np.ndarray, "N H W C"]:
    """Pictures after a Gaussian blur of `sigma` pixels."""
    from scipy.ndimage import gaussian_filter

    return np.rint(gaussian_filter(images.astype(np.float64), (0, sigma, sigma, 0))).astype(np.uint8)


def noisy(images: UInt8[np.ndarray, "N H W C"], deviation: float) -> UInt8[np.ndarray, "N H W C"]:
    """Pictures with normal noise of `deviation` grey levels."""
    noise = np.random.default_rng(SEED).normal(0, deviation, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def main(options: Reading) -> None:
    """Print a row for the clean pictures, and one for each blur and each noise."""
    numbers = np.arange(options.num_images)
    shown = shapes.draw_attributes(SEED, numbers, (*shapes.SEEN, *sorted(shapes.HELD_OUT)))
    images = shapes.render(SEED, numbers, shown, options.image_size)
    few, scale = images[:1000], options.image_size / 32
    cases = {"clean": images}
    cases |= {f"blur of {sigma} pixels": blurred(few, sigma * scale) for sigma in (0.5, 0.75, 1.0, 1.5)}
    cases |= {f"noise of {deviation} levels": noisy(few, deviation) for deviation in (5, 10, 20, 40)}
    print("| pictures | shape | colour | size | place | background | all |\n|---|---|---|---|---|---|---|")
    for name, case in cases.items():
        asked = {kind: values[: len(case)] for kind, values in shown._asdict().items()}
        shares = shares_as_asked(read_shapes(case), asked)
        columns = [f"{shares[kind]:.2%}" for kind in (*shapes.KINDS, "all")]
        print(f"| {name} ({len(case)}) | {' | '.join(columns)} |")


if __name__ == "__main__":
    run_script(main, Reading)
