"""Perceptual distances for training: LPIPS where its weights are at hand, else the run's own classifier's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm import checkpoints
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.files import expanded
from jaxldm.models.lpips import unit_pixels
from jaxldm.training.recipes import AutoencoderRecipe
from jaxldm.training.stages import Context

SMALLEST_SIDE = 16  # of LPIPS with VGG16

Images = Float[Array, "B H W C"]


class PerceptualDistance(NamedTuple):
    """A frozen network that compares images.

    Attributes:
        params: of the network.
        between: (params, images, images) -> the distance of each pair `[B]`.
    """

    params: Any
    between: Callable[[Any, Images, Images], Float[Array, " B"]]


def check_perceptual(recipe: AutoencoderRecipe, image_shape: tuple[int, int, int]) -> None:
    """Raise for a file that is not there, and for images that LPIPS cannot take, before anything is read."""
    if not recipe.perceptual_weight or recipe.perceptual_file is None:
        return
    if not expanded(recipe.perceptual_file).is_file():
        raise CheckpointError(f"perceptual_file {recipe.perceptual_file} does not exist: check the path")
    if min(image_shape[:2]) < SMALLEST_SIDE or image_shape[2] not in (1, 3):
        raise InvalidArgumentError(
            f"LPIPS takes grey or RGB images of at least {SMALLEST_SIDE} pixels a side, the data has "
            f"{'x'.join(map(str, image_shape))}: leave perceptual_file out"
        )


def load_perceptual(context: Context, recipe: AutoencoderRecipe) -> PerceptualDistance:
    """The network of a recipe's perceptual distance, and a line in the log that says which.

    Raises `CheckpointError`.
    """
    if recipe.perceptual_file is not None:
        loaded = checkpoints.load_lpips(expanded(recipe.perceptual_file))
        context.log(f"autoencoder: perceptual distance by LPIPS with {loaded.file}")
        return PerceptualDistance(loaded.params, lpips_distance(cast(Any, loaded.module)))
    module, params = checkpoints.load(context.run.stage("classifier").model)
    context.log(
        "autoencoder: perceptual distance by the features of the run's own classifier, not by LPIPS: for "
        "that give perceptual_file, torchvision's vgg16-397923af.pth"
    )
    return PerceptualDistance(params, classifier_distance(cast(Any, module)))


def lpips_distance(module: nn.Module) -> Callable[[Any, Images, Images], Float[Array, " B"]]:
    """LPIPS of RGB images, and of grey ones as RGB."""

    def between(params: Any, x: Images, y: Images) -> Float[Array, " B"]:
        x, y = (jnp.broadcast_to(images, (*images.shape[:3], 3)) for images in (x, y))
        return cast(Any, module.apply({"params": params}, x, y))

    return between


def classifier_distance(module: nn.Module) -> Callable[[Any, Images, Images], Float[Array, " B"]]:
    """As LPIPS without its heads: squared differences of unit feature vectors, mean over places and layers.

    It lies in [0, 4]. `module` has the method `maps`.
    """

    def between(params: Any, x: Images, y: Images) -> Float[Array, " B"]:
        both = [cast(Any, module.apply({"params": params}, images, method="maps")) for images in (x, y)]
        layers = [
            jnp.square(unit_pixels(jnp.float32(a)) - unit_pixels(jnp.float32(b))).sum(-1).mean((1, 2))
            for a, b in zip(*both, strict=True)
        ]
        return sum(layers, jnp.zeros(x.shape[0])) / len(layers)

    return between
