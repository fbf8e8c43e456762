"""Inputs of the models: shapes to trace them with, and class labels or their absence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError
from jaxtyping import Array, Float, Int

from jaxldm.arguments import array, as_array
from jaxldm.errors import InvalidArgumentError, one_of, shown
from jaxldm.models.config import check, height_width
from jaxldm.reading import shortened

# Numbers, one for each image, that a network can take besides the time (`scalar_inputs` of its config): the
# scale of classifier-free guidance that a student has learned, and how far one call goes, in units of t: it
# is t - r of mean flows and d of shortcut models.
SCALAR_INPUTS = ("guidance_scale", "step_size")
NUMBERS = array("real", "[B]", axes=1)


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
            f"the inputs or the parameters do not fit {type(module).__name__}: {_in_words(error)}"
        ) from error


def _in_words(error: Exception) -> str:
    """What chex and Flax say, without what is for those who wrote the module."""
    text = " ".join(str(error).split())
    found = re.search(r"input \d+ has shape \((.*?),?\) but expected \((.*?),?\)", text)
    if found:
        return f"an input is [{found[1]}], it takes [{found[2]}] (None: any)"
    if "extra params layer" in text:
        return "give what is inside of {'params': ...}: variables['params']"
    text = re.sub(r" ?\(https?://[^)]*\)", "", text).removeprefix("[Chex] ")
    return shortened(text.removeprefix("Assertion "), 250)


def image_shape(config: Any) -> tuple[jax.ShapeDtypeStruct]:
    """One image of the config's `sample_size`, `[1, H, W, in_channels]`, to trace an autoencoder."""
    height, width = height_width(config.sample_size)
    return (jax.ShapeDtypeStruct((1, height, width, config.in_channels), jnp.float32),)


def denoiser_shapes(config: Any) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Shapes of (x, t), then labels and `SCALAR_INPUTS`, None for those that a network does not take."""
    t, labels = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    taken = getattr(config, "scalar_inputs", ())
    inputs = [None if config.num_classes is None else labels]
    inputs += [t if name in taken else None for name in SCALAR_INPUTS]
    while inputs and inputs[-1] is None:
        inputs.pop()
    return (*image_shape(config), t, *inputs)


def check_scalar_inputs(names: Sequence[str]) -> None:
    """Raises `UnknownNameError` for names not in `SCALAR_INPUTS`, `InvalidArgumentError` for one twice."""
    for name in names:
        one_of("scalar input", name, SCALAR_INPUTS)
    check(len(set(names)) == len(names), f"scalar_inputs must name each input once, got {shown(list(names))}")


def scalars_given(names: Sequence[str], t: Float[Array, " B"], **given: Any) -> dict[str, Float[Array, " B"]]:
    """The further numbers of a network, float32 [B] each, in the order of its config's `scalar_inputs`.

    Raises:
        InvalidArgumentError: one that is missing, that the network does not take, or not one for each image.
    """
    for name, value in given.items():
        if value is None and name in names:
            raise InvalidArgumentError(
                f"this network needs {name} (scalar_inputs of its config), a number for each image: give a "
                f'condition such as {{"labels": labels, "{name}": {name}}}'
            )
        if value is not None and name not in names:
            raise InvalidArgumentError(
                f"{name} given to a network that does not take it: its config has scalar_inputs {list(names)}"
            )
        if value is not None and NUMBERS(name, value).shape != t.shape:
            raise InvalidArgumentError(
                f"{name} must be [B], one for each of {t.shape[0]} images, got {shown(value)}"
            )
    return {name: jnp.asarray(given[name], jnp.float32) for name in names}


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
