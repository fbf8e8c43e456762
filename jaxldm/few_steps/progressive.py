"""Progressive distillation: a student whose one step is two of its teacher's (Salimans and Ho 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real

from jaxldm.arguments import a_tree, array, checked, count, function, one_key, optional
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.denoiser import check_output_shape
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.predictions import A_PREDICTION, Prediction, implied_noise
from jaxldm.errors import InvalidArgumentError
from jaxldm.few_steps.jumps import (
    A_LATENT,
    TIMESTEPS,
    Jump,
    check_batch,
    means_of,
    noised,
    stopped,
    times_on,
)
from jaxldm.functions import returned

A_GRID_OF_TIMES = array("real", "[2 N + 1]", axes=1)


@checked(times=A_GRID_OF_TIMES)
def halve(times: Real[Any, " M"]) -> Real[Any, " K"]:
    """Every second of the times of a teacher's grid: those of its student.

    >>> import numpy as np
    >>> halve(np.array([1.0, 0.75, 0.5, 0.25, 0.0])).tolist()
    [1.0, 0.5, 0.0]

    Raises:
        InvalidArgumentError: an odd number of steps, or none.
    """
    if len(times) < 3 or len(times) % 2 == 0:
        raise InvalidArgumentError(
            f"times must be those of an even number of steps (3, 5, 9, 17, ... numbers), got {len(times)}: "
            "start from 2, 4, 8, 16, ... steps"
        )
    return times[::2]


@checked(times=A_GRID_OF_TIMES, key=one_key, batch_size=count(1))
def draw_double_steps(
    key: PRNGKeyArray, times: Real[Any, " M"], batch_size: int
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """(t, middle, s) of one of the student's steps, evenly at random for each example.

    Args:
        key: a key.
        times: the teacher's, [2 N + 1], from noisy to clean: `D.make_grid(path, 2 * N).t`.
        batch_size: B.

    Raises:
        InvalidArgumentError: an odd number of steps, or none.
    """
    halve(times)  # refuses what is no grid of pairs
    row = 2 * jax.random.randint(key, (batch_size,), 0, len(times) // 2)
    t = jnp.asarray(times, jnp.float32)
    return t[row], t[row + 1], t[row + 2]


@checked(
    network=function("(x_t, t, condition) -> output"),
    jump=function("(x_t, t, s) -> x_s, such as ddim_jump(denoise)"),
    prediction=A_PREDICTION,
    x_0=A_LATENT,
    epsilon=A_LATENT,
    t=TIMESTEPS,
    middle=TIMESTEPS,
    s=TIMESTEPS,
    condition=a_tree,
    weight=optional(function("log-SNR -> weight")),
)
def progressive_loss(
    network: Callable[[Any, Any, Any], Any],
    jump: Jump,
    prediction: Prediction,
    x_0: Float[Array, "B ..."],
    epsilon: Float[Array, "B ..."],
    t: Real[Array, " B"],
    middle: Real[Array, " B"],
    s: Real[Array, " B"],
    condition: Any = None,
    *,
    weight: Callable[[Any], Any] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of w |network(x_t, t) - target|^2: one DDIM step of the student is two jumps of the teacher.

        x_s = jump(jump(x_t, t, middle), middle, s),
        x_0~ = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t),

    and the target is the output that stands for x_0~ at x_t. Algorithm 2 of Salimans and Ho 2022.

    Args:
        network: the student, (x_t [B, ...], t [B], condition) -> output [B, ...], parameters closed over.
        jump: the teacher's, with its condition closed over: `ddim_jump(denoise)`.
        prediction: what the student's output means; x_0 or v, as epsilon hardly says anything of x_0 where
            the signal is weak.
        x_0: data; epsilon: noise of its shape.
        t, middle, s: see `draw_double_steps`.
        condition: of the student.
        weight: log-SNR [B] -> weight of the squared error of x_0 (`jnp.maximum(jnp.exp(l), 1)` is the
            paper's "truncated SNR"); None: the plain error of the output.

    Returns:
        (loss, {"mse": of the output}).
    """
    check_batch(x_0=x_0, epsilon=epsilon, t=t, middle=middle, s=s)
    check_condition(condition, x_0, x_name="x_0")
    path = prediction.path
    t, middle, s = times_on(path, x_0, t=t, middle=middle, s=s)
    x_t = noised(path, x_0, epsilon, t)
    x_middle = returned("jump", jump(x_t, t, middle), x_t.shape)
    x_s = returned("jump", jump(x_middle, middle, s), x_t.shape)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((path.alpha(u), path.sigma(u)) for u in (t, s))
    ratio = sigma_s / sigma_t
    aim = (x_s - per_image(ratio, x_t) * x_t) / per_image(alpha_s - ratio * alpha_t, x_t)
    target = stopped(prediction.target(aim, implied_noise(aim, x_t, alpha_t, sigma_t), t))
    output = network(*prediction.precondition(x_t, t), condition)
    check_output_shape(output, x_t)
    squares = means_of(output.astype(x_t.dtype) - target)
    mse = jnp.mean(squares)
    if weight is None:
        return mse, {"mse": mse}
    log_snr = 2 * (jnp.log(alpha_t) - jnp.log(sigma_t))
    return jnp.mean(
        returned("weight", weight(log_snr), t.shape, or_one=True) * prediction.gain(t) ** 2 * squares
    ), {"mse": mse}
