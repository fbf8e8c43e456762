"""Guidance distillation: a student that takes the guidance scale as an input (Meng et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real

from jaxldm.arguments import a_tree, checked, count, function, number, one_key
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.denoiser import check_output_shape
from jaxldm.diffusion.guidance import check_same_form, guide
from jaxldm.diffusion.paths import wide_type
from jaxldm.diffusion.predictions import A_PREDICTION, Prediction
from jaxldm.errors import InvalidArgumentError
from jaxldm.few_steps.jumps import (
    A_LATENT,
    ONE_EACH,
    TIMESTEPS,
    check_batch,
    means_of,
    noised,
    stopped,
    times_on,
)
from jaxldm.functions import returned


@checked(key=one_key, batch_size=count(1), lowest=number(0), highest=number(0))
def draw_scales(
    key: PRNGKeyArray, batch_size: int, lowest: float = 1.0, highest: float = 7.5
) -> Float[Array, " B"]:
    """A guidance scale for each example, evenly between two ends.

    1 is no guidance, as everywhere here; papers that mix as (1 + w) c - w u have w = scale - 1.

    Raises:
        InvalidArgumentError: ends in the wrong order.
    """
    if lowest > highest:
        raise InvalidArgumentError(f"lowest must be <= highest, got {lowest} and {highest}")
    return jax.random.uniform(key, (batch_size,), jnp.float32, lowest, highest)


@checked(
    network=function("(x_t, t, condition, scale) -> output"),
    teacher=function("(x_t, t, condition) -> output"),
    prediction=A_PREDICTION,
    x_0=A_LATENT,
    epsilon=A_LATENT,
    t=TIMESTEPS,
    scale=ONE_EACH,
    condition=a_tree,
    null_condition=a_tree,
)
def guidance_distillation_loss(
    network: Callable[[Any, Any, Any, Any], Any],
    teacher: Callable[[Any, Any, Any], Any],
    prediction: Prediction,
    x_0: Float[Array, "B ..."],
    epsilon: Float[Array, "B ..."],
    t: Real[Array, " B"],
    scale: Real[Array, " B"],
    condition: Any,
    null_condition: Any,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of |network(x_t, t, c, w) - ((1 - w) teacher(x_t, t, null) + w teacher(x_t, t, c))|^2.

    Meng et al. 2023, stage one: one network call in place of two, at any scale in the range of `scale`.

    Args:
        network: the student, (x_t [B, ...], t [B], condition, scale [B]) -> output [B, ...].
        teacher: without guidance.
        prediction: what the outputs of both mean.
        x_0: data; epsilon: noise of its shape; t: [B], of a distribution from `D.training_times`.
        scale: w, [B], see `draw_scales`.
        condition: [B, ...]; null_condition: of the same structure and shapes.

    Returns:
        (loss, {"mse": the same}).
    """
    check_batch(x_0=x_0, epsilon=epsilon, t=t, scale=scale)
    check_condition(condition, x_0, x_name="x_0")
    check_condition(null_condition, x_0, "null_condition", "x_0")
    check_same_form(null_condition, condition)
    (t,) = times_on(prediction.path, x_0, t=t)
    scale = jnp.asarray(scale, wide_type(x_0))
    x_t = noised(prediction.path, x_0, epsilon, t)
    inputs = prediction.precondition(x_t, t)
    free, bound = (
        returned("teacher", teacher(*inputs, each), x_t.shape) for each in (null_condition, condition)
    )
    target = guide(free, bound, scale)
    output = network(*inputs, condition, scale)
    check_output_shape(output, x_t)
    mse = jnp.mean(means_of(output.astype(x_t.dtype) - stopped(target).astype(x_t.dtype)))
    return mse, {"mse": mse}
