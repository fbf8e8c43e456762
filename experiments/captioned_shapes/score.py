"""How often a run draws what its prompts ask for, with pairs of shape and colour seen and held out.

Question: are shape, colour, size, place and background those of the prompt, also for pairs never trained on?
Command:  python -m experiments.captioned_shapes.score runs/captioned-shapes --guidance-scales 1.5 3 5
Needs:    a run of the recipe `captioned-shapes`. Minutes and figures: README.md in this folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxldm import data, pipelines
from jaxldm.data import shapes
from jaxldm.metrics.shapes import read_shapes, shares_as_asked

SEED = 99


def shares(
    pipe: Any, pairs: Sequence[tuple[int, int]], per_pair: int, scale: float, steps: int
) -> dict[str, float]:
    """The share of each attribute that is as the prompt asks, with size, place and background at random."""
    numbers = np.arange(per_pair * len(pairs))
    shown = shapes.draw_attributes(SEED, numbers, pairs)
    shape, colour = np.tile(np.asarray(pairs, np.int32), (per_pair, 1)).T
    shown = shown._replace(shape=shape, colour=colour)
    prompts = [shapes.caption(row) for row in np.stack(shown, axis=1).tolist()]
    images = pipe(
        jax.random.key(SEED),
        prompts,
        guidance_scale=scale,
        num_inference_steps=steps,
        batch_size=24,
    )
    return shares_as_asked(read_shapes(data.to_uint8(np.asarray(images))), shown._asdict())


def main() -> None:
    """Print a row for each guidance scale and kind of pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[1.5, 3.0, 5.0])
    parser.add_argument("--per-pair", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    pipe = pipelines.load(args.run)
    columns = ("shape and colour", *shapes.KINDS, "all")
    print(f"| w | pairs | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for scale in args.guidance_scales:
        for name, pairs in (("seen", shapes.SEEN), ("held out", sorted(shapes.HELD_OUT))):
            found = shares(pipe, pairs, args.per_pair, scale, args.steps)
            figures = " | ".join(f"{found[column]:.1%}" for column in columns)
            print(f"| {scale:g} | {name} ({args.per_pair * len(pairs)}) | {figures} |", flush=True)


if __name__ == "__main__":
    main()
