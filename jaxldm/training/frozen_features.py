"""Features of a frozen encoder, one vector for each token of a denoising transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError
from jaxldm.files import expanded
from jaxldm.models.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from jaxldm.training.mesh import own_placement
from jaxldm.training.recipes import AlignmentRecipe
from jaxldm.training.stages import Context


class FrozenFeatures(NamedTuple):
    """An encoder whose features others are aligned with.

    Attributes:
        params: of the encoder.
        width: of a feature vector.
        of: (params, images in [-1, 1]) -> features `[B, N, width]`, row by row.
    """

    params: Any
    width: int
    of: Callable[[Any, Any], Float[Array, "B N D"]]


def check_encoder(recipe: AlignmentRecipe) -> None:
    """Raise `CheckpointError` for a folder that holds no DINOv2, before anything is read."""
    if recipe.encoder == "classifier":
        return
    config = models.config_from_dict(checkpoints.read_config(expanded(recipe.encoder)))
    if not isinstance(config, models.Dinov2Config):
        raise CheckpointError(
            f"{recipe.encoder} holds a {models.class_name(config)}: features are aligned with those of a "
            "Dinov2Model, or of the run's own classifier (encoder='classifier')"
        )


def load_features(context: Context, recipe: AlignmentRecipe, grid: tuple[int, int]) -> FrozenFeatures:
    """The encoder of a recipe, for so many rows and columns of tokens. Raises `CheckpointError`."""
    if recipe.encoder == "classifier":
        module, params = checkpoints.load(context.run.stage("classifier").model)
        context.log("diffusion: aligned with the features of the run's own classifier")
        return FrozenFeatures(params, module.config.block_out_channels[-1], classifier_features(module, grid))
    module, params = checkpoints.load(expanded(recipe.encoder), sharding=own_placement(context.mesh))
    context.log(f"diffusion: aligned with the features of {recipe.encoder}")
    return FrozenFeatures(params, module.config.hidden_size, dinov2_features(module, grid))


def classifier_features(module: Any, grid: tuple[int, int]) -> Callable[[Any, Any], Float[Array, "B N D"]]:
    """The last convolution's channels, resized to the grid of tokens."""

    def of(params: Any, images: Any) -> Float[Array, "B N D"]:
        last = cast(Any, module.apply({"params": params}, images, method="maps"))[-1]
        resized = jax.image.resize(jnp.float32(last), (len(last), *grid, last.shape[-1]), "linear")
        return resized.reshape(len(last), grid[0] * grid[1], -1)

    return of


def dinov2_features(module: Any, grid: tuple[int, int]) -> Callable[[Any, Any], Float[Array, "B N D"]]:
    """The states of the patches: images are resized so that there is a patch for each token."""

    def of(params: Any, images: Any) -> Float[Array, "B N D"]:
        patch = module.config.patch_size
        shape = (len(images), grid[0] * patch, grid[1] * patch, images.shape[-1])
        pixels = jax.image.resize(images, shape, "cubic", antialias=True) / 2 + 0.5
        pixels = jnp.broadcast_to(pixels, (*shape[:3], 3))
        mean, std = (jnp.asarray(value, jnp.float32).reshape(1, 1, 1, 3) for value in _OF_IMAGENET)
        states = cast(Any, module.apply({"params": params}, (pixels - mean) / std)).last_hidden_state
        return jnp.float32(states[:, 1:])  # the first is the class token

    return of


_OF_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
