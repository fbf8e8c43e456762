"""Inputs of the models: shapes to trace them with, and class labels or their absence."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import height_width


def image_shape(config: Any) -> tuple[jax.ShapeDtypeStruct]:
    """One image of the config's `sample_size`, `[1, H, W, in_channels]`, to trace an autoencoder."""
    height, width = height_width(config.sample_size)
    return (jax.ShapeDtypeStruct((1, height, width, config.in_channels), jnp.float32),)


def denoiser_shapes(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of (x, t) and, for a model with classes, labels, to trace a denoising network."""
    t, labels = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return (*image_shape(config), t) if config.num_classes is None else (*image_shape(config), t, labels)


def labels_or_null(
    labels: Int[Array, " B"] | None, t: Float[Array, " B"], num_classes: int | None
) -> Int[Array, " B"] | None:
    """The labels; without labels the null class `num_classes` for all; None for a model without classes.

    Raises:
        InvalidArgumentError: labels given to a model without classes.
    """
    if num_classes is None:
        if labels is not None:
            raise InvalidArgumentError("class labels given to a model without classes (num_classes is None)")
        return None
    if labels is None:
        return jnp.full(t.shape, num_classes, jnp.int32)
    chex.assert_shape(labels, t.shape)
    return labels
