"""DiT-XL/2, SD3 medium and FLUX.1-dev: jaxldm and diffusers, eager and torch.compile, on one device.

Question: seconds an image, share of the device's matrix peak, compile time and memory, side by side?
Command:  python -m experiments.benchmarks.diffusion_transformers   (--quick: small sizes, default on a CPU)
Needs:    the `test` extra, with a PyTorch that sees the accelerator that JAX sees; a C++ compiler.

The sizes are those of the published models, the weights are random and are drawn on the device in their own
dtype. A row is a whole run from the states of a text (or a label) to pixels on the host, or one call of the
transformer alone, whose share of the peak is its model FLOP/s utilisation.
The files are written after each row, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import dataclasses

from experiments.benchmarks import accelerator, diffusion_transformer_pairs
from jaxldm.commands.terminal import run_script


@dataclasses.dataclass(frozen=True)
class DiffusionTransformerOptions(accelerator.Options):
    """Time diffusion transformers compared with diffusers and write the table."""

    rows: tuple[str, ...] = ("dit-xl-256", "sd3-1024", "flux-1024")
    """Model and pixels; from small to large, as JAX tells only the largest memory use so far."""
    num_inference_steps: int = 28


def main(options: DiffusionTransformerOptions) -> None:
    """Measures the transformers."""
    accelerator.main(options, diffusion_transformer_pairs, "diffusion_transformers")


if __name__ == "__main__":
    run_script(main, DiffusionTransformerOptions)
