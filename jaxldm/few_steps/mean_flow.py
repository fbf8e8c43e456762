"""Mean flows: a network learns the average velocity over an interval, without a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.arguments import a_tree, array, checked, count, function, number, one_key, optional
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.guidance import check_same_form
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.rectified_flow import Flow
from jaxldm.errors import InvalidArgumentError
from jaxldm.few_steps.jumps import A_LATENT, TIMES, check_batch, noised, squares_of, stopped
from jaxldm.functions import returned

# (z_t [B, ...], r [B], t [B], condition) -> the average velocity over [r, t], [B, ...]
MeanVelocity = Callable[[Any, Any, Any, Any], Any]
A_MEAN_VELOCITY = function("(z_t, r, t, condition) -> u")


@checked(key=one_key, batch_size=count(1), equal=number(0, 1), mean=number(), std=number(above=0))
def interval_times(
    key: PRNGKeyArray, batch_size: int, equal: float = 0.75, mean: float = -0.4, std: float = 1.0
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(r, t) with r <= t: two draws of sigmoid(N(mean, std^2)) in order; a share `equal` has r = t.

    Geng et al. 2025, section 4.3 and table 1. r = t is ordinary flow matching, which holds the rest down.
    """
    draws = jax.nn.sigmoid(mean + std * jax.random.normal(key, (2, batch_size), jnp.float32))
    t, r = jnp.max(draws, axis=0), jnp.min(draws, axis=0)
    return jnp.where(jnp.arange(batch_size) < int(equal * batch_size), t, r), t


@checked(
    u=A_MEAN_VELOCITY,
    z=A_LATENT,
    t=TIMES,
    velocity=A_LATENT,
    condition=a_tree,
    null_condition=a_tree,
    omega=array("real", axes=(0, 1), filled=True),
    kappa=array("real", axes=(0, 1), filled=True),
)
def guided_velocity(
    u: MeanVelocity,
    z: Float[Array, "B ..."],
    t: Float[Array, " B"],
    velocity: Float[Array, "B ..."],
    condition: Any,
    null_condition: Any,
    omega: Any,
    kappa: Any = 0.0,
) -> Float[Array, "B ..."]:
    """omega v + (1 - omega - kappa) u(z, t, t, null) + kappa u(z, t, t, c): guidance inside the target.

    The student then has guidance of scale omega / (1 - kappa) in one call; guiding it again doubles it. A
    constant. Where kappa is the number 0, u(z, t, t, c) is not asked.

    Source: Geng et al. 2025, eq. 19 and appendix B.1.
    """
    without = isinstance(kappa, (int, float)) and kappa == 0
    omega, kappa = (jnp.asarray(value, z.dtype) for value in (omega, kappa))
    check_batch(z=z, t=t, velocity=velocity, omega=omega, kappa=kappa)
    check_condition(condition, z, x_name="z")
    check_condition(null_condition, z, "null_condition", "z")
    check_same_form(null_condition, condition)
    omega, kappa = per_image(omega, z), per_image(kappa, z)
    mixed = omega * velocity + (1 - omega - kappa) * _ask(u, z, t, t, null_condition)
    return stopped(mixed if without else mixed + kappa * _ask(u, z, t, t, condition))


_checked_loss = checked(
    u=A_MEAN_VELOCITY,
    x_0=A_LATENT,
    epsilon=A_LATENT,
    r=TIMES,
    t=TIMES,
    condition=a_tree,
    velocity=optional(A_LATENT),
    power=number(0),
    offset=number(above=0),
    still=count(0),
)


@_checked_loss
def mean_flow_loss(
    u: MeanVelocity,
    x_0: Float[Array, "B ..."],
    epsilon: Float[Array, "B ..."],
    r: Float[Array, " B"],
    t: Float[Array, " B"],
    condition: Any = None,
    *,
    velocity: Float[Array, "B ..."] | None = None,
    power: float = 1.0,
    offset: float = 0.01,
    still: int = 0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of w |u(z_t, r, t) - (v - (t - r) du/dt)|^2, the target a constant.

        z_t = (1 - t) x_0 + t eps,  v = eps - x_0,  z_r = z_t - (t - r) u(z_t, r, t),

    du/dt is the derivative of u along (v, 0, 1), by one forward-mode product. From (t - r) u = the integral
    of v: differentiate by t. Sampling is one call, x_0 = eps - u(eps, 0, 1).

    Args:
        u: the average velocity, (z_t [B, ...], r [B], t [B], condition) -> [B, ...].
        x_0: data; epsilon: noise; r, t: [B], see `interval_times`.
        condition: of u.
        velocity: in place of v, where guidance is inside (`guided_velocity`).
        power, offset: w = 1 / (|error|^2 + offset)^power, a constant, with |error|^2 summed over an example;
            power 0 is the plain square.
        still: the first so many examples have r = t, so that their target is v, and the derivative is taken
            of the others alone: `int(equal * B)` of `interval_times`. The loss is the same, and three
            quarters of the derivative's cost are saved; over several devices the parts of a batch are moved.

    Returns:
        (loss, {"mse": the plain square of an example, summed}).

    Source: Geng et al. 2025 (Mean flows for one-step generative modeling), Algorithm 1, eq. 10 and 22.
    """
    z, v = _point(x_0, epsilon, r, t, velocity, condition)
    return _loss_along(u, z, v, (r, t, condition), lambda z, v, *rest: v, (power, offset, still))


@_checked_loss
def improved_mean_flow_loss(
    u: MeanVelocity,
    x_0: Float[Array, "B ..."],
    epsilon: Float[Array, "B ..."],
    r: Float[Array, " B"],
    t: Float[Array, " B"],
    condition: Any = None,
    *,
    velocity: Float[Array, "B ..."] | None = None,
    power: float = 1.0,
    offset: float = 0.01,
    still: int = 0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of w |u + (t - r) sg(du/dt) - v|^2, with du/dt along the network's own velocity u(z_t, t, t).

    The derivative no longer sees the noisy v of one example, and the target is that of flow matching. Same
    arguments as `mean_flow_loss`. Source: Geng et al. 2026 (Improved mean flows), section 4.1.
    """
    z, v = _point(x_0, epsilon, r, t, velocity, condition)
    own = lambda z, v, t, condition: stopped(_ask(u, z, t, t, condition))  # noqa: E731
    return _loss_along(u, z, v, (r, t, condition), own, (power, offset, still))


def _point(x_0, epsilon, r, t, velocity, condition):
    """(z_t, v): on the straight path, and the velocity there unless another is given."""
    check_batch(x_0=x_0, epsilon=epsilon, r=r, t=t, velocity=velocity)
    check_condition(condition, x_0, x_name="x_0")
    return noised(Flow(), x_0, epsilon, jnp.asarray(t)), epsilon - x_0 if velocity is None else velocity


def _ask(u, z, r, t, condition):
    """What the network says."""
    return returned("u", u(z, r, t, condition), z.shape)


def _loss_along(u, z, v, arguments, direction_of, numbers):
    """(mean of w |u - sg(v - (t - r) du/dt)|^2, {"mse"}), du/dt along (direction, 0, 1)."""
    power, offset, still = numbers
    if not 0 <= still <= len(z):
        raise InvalidArgumentError(f"still must be from 0 to the {len(z)} examples, got {still}")

    def of_rows(rows):  # a number in a condition is that of all examples
        return jax.tree.map(lambda leaf: leaf[rows] if jnp.ndim(leaf) else leaf, (z, v, *arguments))

    def of_still(z, v, r, t, condition):
        return _ask(u, z, r, t, condition) - stopped(v)

    def of_moving(z, v, r, t, condition):
        direction = direction_of(z, v, t, condition).astype(z.dtype)
        moves = direction, jnp.zeros_like(r), jnp.ones_like(t)
        value, slope = jax.jvp(lambda z, r, t: _ask(u, z, r, t, condition), (z, r, t), moves)
        return value - stopped(v - per_image(t - r, z) * slope)

    if still == 0:
        error = of_moving(z, v, *arguments)
    else:
        parts = [of_still(*of_rows(slice(still)))]
        parts += [of_moving(*of_rows(slice(still, None)))] if still < len(z) else []
        error = jnp.concatenate(parts)
    squares = squares_of(error)
    weight = stopped(1 / (squares + offset) ** power) if power else 1.0
    return jnp.mean(weight * squares), {"mse": jnp.mean(squares)}
