"""Stable Diffusion 1.5 and XL: jaxldm and diffusers, eager and torch.compile, on one device.

Question: seconds an image, share of the device's matrix peak, compile time and memory, side by side?
Command:  python -m experiments.benchmarks.stable_diffusion      (--quick: small sizes; the default on a CPU)
Needs:    the `test` extra, with a PyTorch that sees the accelerator that JAX sees; a C++ compiler.

The sizes are those of the published models, the weights are random and are drawn on the device in their own
dtype. A row is a whole text-to-image run (tokens, text encoders, 30 steps of DPM-Solver++ 2M with guidance,
decoding, pixels on the host) or one call of the U-Net alone. The variants of a row take turns.
The files are written after each row, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import dataclasses

from experiments.benchmarks import accelerator, stable_diffusion_pairs
from jaxldm.commands.terminal import run_script


@dataclasses.dataclass(frozen=True)
class StableDiffusionOptions(accelerator.Options):
    """Time text-to-image runs compared with diffusers and write the table."""

    rows: tuple[str, ...] = ("sd15-512", "sd15-1024", "sdxl-1024")
    """Model and pixels; from small to large, as JAX tells only the largest memory use so far."""


def main(options: StableDiffusionOptions) -> None:
    """Measures Stable Diffusion."""
    accelerator.main(options, stable_diffusion_pairs, "stable_diffusion")


if __name__ == "__main__":
    run_script(main, StableDiffusionOptions)
