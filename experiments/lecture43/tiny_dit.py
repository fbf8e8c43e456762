"""Tiny DiT on MNIST pixels (lecture 43.2, with the class labels of exercise 43.E3).

Question: does a transformer over 49 patches of a digit learn to draw, with the training loop of the U-Net?
Command:  python -m experiments.lecture43.tiny_dit --run-dir runs/tiny-dit
Needs:    the `demo` extra; two CPU cores. Minutes and what came out: README.md in this folder. A second
          call goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxldm import host, training
from jaxldm.commands.eval import Eval
from jaxldm.commands.terminal import run_script


@dataclasses.dataclass(frozen=True)
class TinyDiT:
    """Train Tiny DiT on the pixels of digits, then draw and measure at several guidance scales."""

    run_dir: Path = Path("runs/tiny-dit")
    """Where everything is written."""
    recipe: str = "tiny-dit"
    """tiny-dit, or smoke-dit (seconds; draws noise)."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    """1 is the conditional model as trained."""
    num_images: int = 500
    """Digits drawn and measured at each scale."""


def main(options: TinyDiT) -> None:
    host.prepare()
    resume = (options.run_dir / "config.json").exists()
    run = training.train(training.RECIPES[options.recipe], options.run_dir, resume=resume)
    Eval(str(run.path), guidance_scale=options.guidance_scales, num_images=options.num_images).run()
    print(f"Look at {run.path}/eval/grid-w3.png, and at {run.path}/diffusion/loss.png.")


if __name__ == "__main__":
    run_script(main, TinyDiT)
