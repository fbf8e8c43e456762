"""How often a run draws what its prompts ask for, with pairs of shape and colour seen and held out.

Question: are shape, colour, size, place and background those of the prompt, also for pairs never trained on?
Command:  python -m experiments.captioned_shapes.score runs/captioned-shapes --guidance-scales 1.5 3 5
Needs:    a run of the recipe `captioned-shapes`. Minutes and figures: README.md in this folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jaxtyping import UInt8

from experiments.captioned_shapes.contact_sheet import sheet
from experiments.trained import load_run
from jaxldm import data
from jaxldm.commands.terminal import run_script
from jaxldm.data import shapes
from jaxldm.files import write_atomically
from jaxldm.metrics.shapes import read_shapes, shares_as_asked

SEED = 99


@dataclasses.dataclass(frozen=True)
class Score:
    """Draw pairs of shape and colour, seen and held out, and read what was drawn."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """A finished run of the recipe captioned-shapes."""
    guidance_scales: tuple[float, ...] = (1.5, 3.0, 5.0)
    """A row for each."""
    per_pair: int = 10
    """Pictures of each pair."""
    steps: int = 20
    """Of the sampler."""
    picture: Path | None = None
    """PNG file for pictures of the pairs held out, at the last guidance scale, a column each."""


def prompts_of(pairs: Sequence[tuple[int, int]], per_pair: int) -> tuple[shapes.Attributes, list[str]]:
    """(attributes, prompts) of the pairs in turn, with size, place and background at random."""
    shown = shapes.draw_attributes(SEED, np.arange(per_pair * len(pairs)), pairs)
    shape, colour = np.tile(np.asarray(pairs, np.int32), (per_pair, 1)).T
    shown = shown._replace(shape=shape, colour=colour)
    return shown, [shapes.caption(row) for row in np.stack(shown, axis=1).tolist()]


def draw(
    pipe: Any, pairs: Sequence[tuple[int, int]], per_pair: int, scale: float, steps: int
) -> tuple[UInt8[np.ndarray, "N H W C"], dict[str, float]]:
    """Pictures of all pairs in turn, and the share of each attribute that is as the prompt asks.

    Size, place and background are at random.
    """
    shown, prompts = prompts_of(pairs, per_pair)
    options = {"guidance_scale": scale, "num_inference_steps": steps, "batch_size": 24}
    images = data.to_uint8(np.asarray(pipe(jax.random.key(SEED), prompts, **options)))
    return images, shares_as_asked(read_shapes(images), shown._asdict())


def main(options: Score) -> None:
    """Print a row for each guidance scale and kind of pair."""
    pipe = load_run(options.run_dir, "captioned-shapes")
    columns = ("shape and colour", *shapes.KINDS, "all")
    print(f"| w | pairs | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for scale in options.guidance_scales:
        for name, pairs in (("seen", shapes.SEEN), ("held out", sorted(shapes.HELD_OUT))):
            images, found = draw(pipe, pairs, options.per_pair, scale, options.steps)
            figures = " | ".join(f"{found[column]:.1%}" for column in columns)
            print(f"| {scale:g} | {name} ({options.per_pair * len(pairs)}) | {figures} |", flush=True)
    if options.picture is not None:
        write_atomically(options.picture, sheet(images, len(pairs)))


if __name__ == "__main__":
    run_script(main, Score)
