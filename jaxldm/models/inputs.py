"""Inputs of the models: shapes to trace them with, and class labels or their absence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError
from jaxtyping import Array, Float, Int

from jaxldm.arguments import as_array
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.models.config import height_width
from jaxldm.reading import reason


@contextlib.contextmanager
def fitting(module: nn.Module) -> Iterator[None]:
    """Turns what chex and Flax say about the shapes of a module's inputs and parameters into one line.

    Raises:
        InvalidArgumentError: they do not fit the module.
    """
    try:
        yield
    except (AssertionError, FlaxError) as error:
        raise InvalidArgumentError(
            f"the inputs or the parameters do not fit {type(module).__name__}: {reason(error)}"
        ) from error


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
    given = as_array("class labels", "whole numbers [B]", labels)
    if not jnp.issubdtype(given.dtype, jnp.integer) or given.shape != t.shape:
        raise InvalidArgumentError(
            f"class labels must be whole numbers, one for each of {t.shape[0]} images, got {shown(labels)}"
        )
    return given
