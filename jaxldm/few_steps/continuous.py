"""Continuous-time consistency on TrigFlow: sCM (Lu and Song 2025)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.arguments import (
    array,
    check_fields,
    checked,
    count,
    flag,
    function,
    number,
    one_key,
    optional,
    several,
)
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.paths import Path, per_image, wide_type
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.few_steps.jumps import A_LATENT, TIMES, check_batch, means_of, stopped
from jaxldm.functions import returned


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrigFlow(Path):
    """alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2]: noise of the spread of the data.

    `D.on_path(denoise, TrigFlow())` moves a trained denoiser here. Lu and Song 2025, section 3.

    Raises:
        InvalidArgumentError: unless sigma_data > 0.
    """

    sigma_data: float = 0.5
    name = "trigflow"
    t_noisy = math.pi / 2

    def __post_init__(self):
        check_fields(self, sigma_data=number(above=0))

    def coefficients(
        self, xp: Any, t: Float[Any, " *shape"]
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """cos t and sigma_data sin t."""
        return xp.cos(t), self.sigma_data * xp.sin(t)

    def time_of(self, xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
        """arctan(ratio / sigma_data)."""
        return xp.arctan(ratio / self.sigma_data)


@checked(key=one_key, batch_size=count(1), mean=number(), std=number(above=0), sigma_data=number(above=0))
def trig_times(
    key: PRNGKeyArray, batch_size: int, mean: float = -1.0, std: float = 1.4, sigma_data: float = 0.5
) -> Float[Array, " B"]:
    """t = arctan(e^tau / sigma_data), tau ~ N(mean, std^2), in (0, pi/2): Lu and Song 2025, section 3.1."""
    tau = mean + std * jax.random.normal(key, (batch_size,), jnp.float32)
    return jnp.arctan(jnp.exp(tau) / sigma_data)


@checked(velocity=function("(x_t, t) -> sigma_data F"), x_t=A_LATENT, t=TIMES)
def trig_consistency(
    velocity: Callable[[Any, Any], Any], x_t: Float[Array, "B ..."], t: Float[Array, " B"]
) -> Float[Array, "B ..."]:
    """f(x_t, t) = cos(t) x_t - sin(t) sigma_data F: x_t itself at t = 0 (Lu and Song 2025, eq. 5)."""
    check_batch(x_t=x_t, t=t)
    found = returned("velocity", velocity(x_t, t), x_t.shape)
    return per_image(jnp.cos(t), x_t) * x_t - per_image(jnp.sin(t), x_t) * found


@checked(denoise=function("(x, t) -> x_0"), x_t=A_LATENT, t=TIMES)
def trig_teacher_slope(
    denoise: Denoiser | Callable[[Any, Any], Any], x_t: Float[Array, "B ..."], t: Float[Array, " B"]
) -> Float[Array, "B ..."]:
    """dx/dt of the probability-flow ODE on `TrigFlow`: (cos(t) x_t - x_0) / sin(t).

    Args:
        denoise: (x_t, t) -> x_0 on this path.
        x_t: [B, ...], not at t = 0.
    """
    check_batch(x_t=x_t, t=t)
    cos, sin = per_image(jnp.cos(t), x_t), per_image(jnp.sin(t), x_t)
    return (cos * x_t - returned("denoise", denoise(x_t, t), x_t.shape)) / sin


@checked(
    velocity=function("(x_t, t) -> sigma_data F"),
    x_t=A_LATENT,
    t=TIMES,
    slope=A_LATENT,
    warmth=array("real", axes=0),
    c=number(above=0),
    normalise=flag,
    difference=optional(number(above=0)),
    ends=several(number(), "two times"),
)
def continuous_consistency_loss(
    velocity: Callable[[Any, Any], Any],
    x_t: Float[Array, "B ..."],
    t: Float[Array, " B"],
    slope: Float[Array, "B ..."],
    *,
    warmth: Any = 1.0,
    c: float = 0.1,
    normalise: bool = True,
    difference: float | None = None,
    ends: tuple[float, float] = (0.0, math.pi / 2),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of |F(x_t, t) - F^-(x_t, t) - g / (|g| + c)|^2, with F^- and g constants.

        g = cos(t) df/dt = -cos(t)^2 (F^- - slope) - r cos(t) sin(t) (x_t + dF^-/dt),

    which is 0 where f is the consistency function, as f does not change along a trajectory. d/dt is the
    derivative along (slope, 1), taken along (cos sin slope, cos sin), so that it stays finite at pi/2.

    rCM, code for sCM, takes 0 for F and g of an example where they are NaN. Here no denominator is 0 at times
    between `ends`, and what is not finite all the same is not hidden: it is in the loss, so that
    `training.make_train_step` skips that update, and `training.train` stops after ten in a row.

    Args:
        velocity: the student, (x_t [B, ...], t [B]) -> sigma_data F [B, ...], parameters closed over. Its
            embedding of t must be smooth, or `difference` given.
        x_t: cos(t) x_0 + sin(t) z, z ~ N(0, sigma_data^2 I).
        t: see `trig_times`.
        slope: dx/dt: a teacher's (`trig_teacher_slope`), or cos(t) z - sin(t) x_0, without one.
        warmth: r, from 0 to 1 in the first 10 000 updates.
        c: of the normalisation of the tangent.
        normalise: False takes g as it is. Without a teacher g is mostly noise, and g / (|g| + c) is 0 on
            average at another map than g is, unless there are many dimensions or the noise is symmetric.
        difference: None: dF/dt is the exact derivative. A number: the slope of F between t - difference and
            t + difference along the trajectory, for networks whose embedding of t is made for a thousand
            timesteps: an error of one in a hundred that changes from one timestep to the next is most of
            their derivative, and is averaged away here.
        ends: the times beyond which the network is not asked for such a slope.

    Returns:
        (loss, {"tangent": the root mean square of g before it is normalised}).

    Raises:
        InvalidArgumentError: ends that are not two times, the lower first.

    Sources: Lu and Song 2025, Algorithm 1 (without the adaptive weight).
    """
    check_batch(x_t=x_t, t=t, slope=slope)
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise InvalidArgumentError(f"ends must be two times, the lower first, got {shown(tuple(ends))}")
    warmth = jnp.asarray(warmth, wide_type(x_t))
    cos, sin = per_image(jnp.cos(t), x_t), per_image(jnp.sin(t), x_t)
    both = jnp.cos(t) * jnp.sin(t)
    student = lambda x_t, t: returned("velocity", velocity(x_t, t), x_t.shape)  # noqa: E731
    if difference is None:
        F, dF = jax.jvp(student, (x_t, t), (cos * sin * slope, both))
    else:
        F = student(x_t, t)
        times = jnp.maximum(t - difference, ends[0]), jnp.minimum(t + difference, ends[1])
        before, after = (student(x_t + per_image(u - t, x_t) * slope, u) for u in times)
        dF = per_image(both / (times[1] - times[0]), x_t) * (after - before)
    still, dF = stopped(F), stopped(dF)
    g = -(cos**2) * (still - slope) - warmth * (cos * sin * x_t + dF)
    norm = jnp.sqrt(means_of(g))
    if normalise:
        g = g / per_image(norm + c, g)
    loss = jnp.mean(means_of(F - still - stopped(g)))
    return loss, {"tangent": jnp.sqrt(jnp.mean(norm**2))}
