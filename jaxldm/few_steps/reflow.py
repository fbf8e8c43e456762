"""Reflow: straighter trajectories from pairs of (noise, its sample) (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real

from jaxldm.arguments import a_tree, array, checked, count, function, number, one_key
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.denoiser import check_output_shape
from jaxldm.diffusion.paths import wide_type
from jaxldm.diffusion.predictions import A_PREDICTION, Prediction
from jaxldm.errors import InvalidArgumentError
from jaxldm.few_steps.jumps import A_LATENT, TIMESTEPS, check_batch, means_of, noised, times_on
from jaxldm.functions import returned


@checked(
    network=function("(x_t, t, condition) -> output"),
    prediction=A_PREDICTION,
    samples=A_LATENT,
    noise=A_LATENT,
    t=TIMESTEPS,
    condition=a_tree,
    distance=function("(difference) -> distances"),
)
def reflow_loss(
    network: Callable[[Any, Any, Any], Any],
    prediction: Prediction,
    samples: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    t: Real[Array, " B"],
    condition: Any = None,
    *,
    distance: Callable[[Any], Any] = means_of,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of d(network(x_t, t) - target), x_t between a sample and the very noise that it was drawn from.

    It is the plain loss of the path with another coupling: eps is not independent of x_0 but what a teacher's
    ODE makes x_0 of, so that the lines between them do not cross, and one step is nearly exact.

    Args:
        network: the student, (x_t [B, ...], t [B], condition) -> output [B, ...].
        prediction: of the student; `D.flow(D.Flow())` in the paper.
        samples: x_0, drawn by the teacher from `noise`, with the quality that the student is to have.
        noise: [B, ...].
        t: [B], see `u_shaped_times`.
        condition: with which each sample was drawn.
        distance: of each example's difference; `pseudo_huber(c)` in 2-rectified flow++.

    Returns:
        (loss, {"mse": the mean square}).

    Sources: Liu et al. 2022, section 2.2; Lee et al. 2024 (times, distance).
    """
    check_batch(samples=samples, noise=noise, t=t)
    check_condition(condition, samples, x_name="samples")
    (t,) = times_on(prediction.path, samples, t=t)
    x_t = noised(prediction.path, samples, noise, t)
    output = network(*prediction.precondition(x_t, t), condition)
    check_output_shape(output, x_t)
    error = output.astype(x_t.dtype) - prediction.target(samples, noise, t)
    apart = returned("distance", distance(error), x_t.shape[:1])
    return jnp.mean(apart), {"mse": jnp.mean(means_of(error))}


@checked(key=one_key, batch_size=count(1), a=number(above=0, high=50))
def u_shaped_times(key: PRNGKeyArray, batch_size: int, a: float = 4.0) -> Float[Array, " B"]:
    """t in [0, 1] with density proportional to e^(a t) + e^(-a t) about the middle of the trajectory.

    The ends are where a reflowed network is still wrong (Lee et al. 2024, section 3.1, with a = 4 and u =
    2t - 1 in place of t, so that both ends count alike). Drawn by inverting the distribution: u =
    asinh(sinh(a) v) / a for v even in [-1, 1].
    """
    even = jax.random.uniform(key, (batch_size,), jnp.float32, -1.0, 1.0)
    return (jnp.arcsinh(jnp.sinh(a) * even) / a + 1) / 2


@checked(trajectory=array("floating", "[N + 1, B, ...]", axes=(2, 64)), t=array("real", "[N + 1]", axes=1))
def straightness(trajectory: Float[Any, "M B ..."], t: Real[Any, " M"]) -> Float[Any, ""]:
    """The mean over the path of |v - (x_1 - x_0) / (t_1 - t_0)|^2 of a pixel: 0 for straight lines.

    Args:
        trajectory: x at each t, [N + 1, B, ...]; v is the slope between neighbours, weighed by its interval.
        t: [N + 1], rising or falling.

    Source: Liu et al. 2022, eq. 9.
    """
    if len(t) != len(trajectory) or len(t) < 2:
        raise InvalidArgumentError(
            f"the shapes do not go together: t must be one number for each x of the trajectory, two or more, "
            f"got {len(t)} for {len(trajectory)}"
        )
    t = jnp.asarray(t, wide_type(trajectory))
    steps = jnp.diff(t)
    over = steps.reshape(-1, *[1] * (trajectory.ndim - 1))
    slopes = jnp.diff(trajectory, axis=0) / over
    whole = (trajectory[-1:] - trajectory[:1]) / (t[-1] - t[0])
    return jnp.sum(over * (slopes - whole) ** 2) / (t[-1] - t[0]) / trajectory[0].size
