"""Pictures of the class of a subject next to its own: DreamBooth, Ruiz et al. 2022, section 3.3."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Int, Shaped

from jaxldm import data
from jaxldm.data import Dataset, Rows
from jaxldm.data.images import to_uint8
from jaxldm.metrics.pictures import save_png
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.training.finetune_recipe import FinetuneRecipe, PriorRecipe
from jaxldm.training.stages import Context, stage_keys

PREFIX = "prior_"  # of the columns of the class's pictures
_AT_ONCE = 8  # that are drawn between two lines of the log


@dataclasses.dataclass(frozen=True)
class PairedRows:
    """Each example next to one of others, whose columns begin with "prior_"; the fewer are repeated."""

    own: Rows
    others: Rows

    def __len__(self) -> int:
        return max(len(self.own), len(self.others))

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        others = self.others.take(rows % len(self.others))
        return self.own.take(rows % len(self.own)) | {PREFIX + name: part for name, part in others.items()}


def of_class(batch: dict[str, Any]) -> dict[str, Any]:
    """The columns of the others in a batch of `PairedRows`, under their own names."""
    return {name.removeprefix(PREFIX): part for name, part in batch.items() if name.startswith(PREFIX)}


def class_pictures(context: Context, recipe: FinetuneRecipe, pipe: Pipeline) -> Dataset:
    """The pictures of the class: those of a folder, or drawn by the model as it is, where they are not yet.

    Raises what `data.load_folder` raises.
    """
    prior = cast(PriorRecipe, recipe.prior)
    height, width, _ = context.dataset.image_shape
    folder = context.run.path / "class-images" if prior.images is None else Path(prior.images)
    if prior.images is None:
        key = stage_keys(context.recipe.seed, "class-images").sample
        missing = [k for k in range(prior.number) if not (folder / f"{k:05d}.png").exists()]
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            context.log(f"finetune: drawing the pictures of the class {some[0] + 1} to {some[-1] + 1}")
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(some))
            options = {"height": height, "width": width, "num_inference_steps": recipe.sample_steps}
            for k, image in zip(
                some, to_uint8(pipe(keys, [prior.prompt] * len(some), **options)), strict=True
            ):
                folder.mkdir(exist_ok=True)
                save_png(folder / f"{k:05d}.png", image)
    return data.load_folder(folder, image_size=height, hold_out=False)
