"""What the training of a ControlNet has besides a fine-tuning: the network, and the pictures that it sees."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxldm import data, models
from jaxldm.data import Dataset, Rows
from jaxldm.data.folders import FolderRows
from jaxldm.data.images import to_uint8
from jaxldm.errors import CheckpointError, DataError, InvalidArgumentError, UnknownNameError
from jaxldm.metrics.pictures import save_png
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.training.conditions import CONTROL_IMAGE
from jaxldm.training.finetune_recipe import ControlRecipe

_WIDTHS = (16, 32, 96, 256)  # of the convolutions that bring the picture to the size of the latents


@dataclasses.dataclass(frozen=True)
class ControlledRows:
    """Examples with what a ControlNet sees of them as one more column.

    Attributes:
        rows: the examples.
        pictures: the training rows of their dataset, in the same order.
        images: as of `ControlRecipe`.
    """

    rows: Rows
    pictures: Rows
    images: str

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[np.ndarray, "B"]) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        return self.rows.take(rows) | {CONTROL_IMAGE: control_images(self.pictures, self.images, rows)}


def control_images(pictures: Rows, images: str, rows: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B H W 3"]:
    """The control images of examples, in [0, 1]. Raises as `FolderRows.control_images`."""
    if images == "edges":
        return np.repeat(data.edges(pictures.take(rows)["image"]), 3, axis=-1)
    return cast(FolderRows, pictures).control_images(rows)


def controlnet_config(pipe: Pipeline, source: str) -> models.ControlNetConfig:
    """The config of a ControlNet for a model, without its parameters.

    Raises:
        CheckpointError: a model for which none can be made.
    """
    config = pipe.denoiser.config
    if models.class_name(config) != "UNet2DConditionModel" or "controlnet" not in pipe.family.folder.control:
        raise CheckpointError(
            f"{source} has a {models.class_name(config)}: ControlNets are trained for the U-Nets of Stable "
            "Diffusion 1, 2 and XL"
        )
    factor = int(pipe.latent_spec.factor)
    halvings = factor.bit_length() - 1
    widths = (*_WIDTHS, *_WIDTHS[-1:] * halvings)[: halvings + 1]
    shared = {field.name for field in dataclasses.fields(models.ControlNetConfig)}
    own = {name: value for name, value in vars(config).items() if name in shared}
    try:
        made = models.ControlNetConfig(**own, conditioning_embedding_out_channels=widths)
    except (InvalidArgumentError, UnknownNameError) as error:
        raise CheckpointError(f"no ControlNet can be made for the U-Net of {source}: {error}") from error
    if made.image_factor != factor:
        raise CheckpointError(
            f"no ControlNet can be made for {source}: its latents are {factor} pixels wide, no power of 2"
        )
    return made


def new_controlnet(pipe: Pipeline, source: str, key: Any) -> Any:
    """The parameters of a ControlNet that changes nothing yet. Raises as `controlnet_config`."""
    widths = controlnet_config(pipe, source).conditioning_embedding_out_channels
    unet: Any = pipe.denoiser.module
    options = {"conditioning_embedding_out_channels": widths}
    return models.controlnet_from_unet(unet, pipe.denoiser.params, key, **options)[1]


def control_shapes(pipe: Pipeline, source: str) -> Any:
    """The shapes of its parameters. Raises as `controlnet_config`."""
    return models.shapes(models.from_config(controlnet_config(pipe, source)))


def check_control_pictures(recipe: ControlRecipe, dataset: Dataset) -> None:
    """Raise `DataError` for pictures without a condition picture that fits, where these are the folder's."""
    if recipe.images != "folder":
        return
    pictures = dataset.rows("train")
    if not isinstance(pictures, FolderRows):
        raise DataError(
            f"{dataset.name} is no folder of pictures, and has no condition pictures: take "
            "control_images='edges' (--control-images edges)"
        )
    pictures.check_control_images()


def save_control_images(folder: Path, images: Float[np.ndarray, "N H W 3"]) -> None:
    """Write control images as 0.png, 1.png and so on, to draw along."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(jax.device_get(images)):
        save_png(folder / f"{number}.png", to_uint8(2 * image - 1))
