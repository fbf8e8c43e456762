"""Consistency models: one function f(x_t, t) that gives the same x_0 everywhere along an ODE's trajectory.

Song et al. 2023 (distillation and training), Song and Dhariwal 2024 (improved training), Geng et al. 2025
(easy tuning), Luo et al. 2023 (latent consistency) differ in where x_s comes from, in which pairs (t, s) are
drawn, and in the distance; the loss is one.

| | x_s | pairs | target |
|---|---|---|---|
| distillation | `heun_jump(teacher)(x_t, t, s)` | neighbours among 18 sigmas | moving average |
| training, improved | x_0 and eps of x_t: `noised(...)` | `draw_neighbours`, more by `num_levels` | itself |
| easy tuning | the same | `easy_times` | itself |
| latent | `ddim_jump(guided teacher)(x_t, t, s)` | 20 timesteps apart | moving average |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from jaxldm.arguments import array, checked, count, function, number, one_key, optional
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.paths import EDM, per_image
from jaxldm.errors import InvalidArgumentError
from jaxldm.few_steps.jumps import (
    A_LATENT,
    ONE_EACH,
    TIMES,
    TIMESTEPS,
    check_batch,
    squares_of,
    stopped,
    times_on,
)
from jaxldm.functions import returned


@checked(network=function("(x, c_noise) -> F"), sigma_data=number(above=0), sigma_min=number(above=0))
def edm_consistency_model(
    network: Callable[[Any, Any], Any], sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Denoiser:
    """f(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4), with f(x, sigma) = x up to sigma_min.

        c_skip = d^2 / ((sigma - sigma_min)^2 + d^2),
        c_out = d (sigma - sigma_min) / sqrt(sigma^2 + d^2),  c_in = 1 / sqrt(sigma^2 + d^2).

    Song et al. 2023, appendix C. The result is a denoiser on `D.EDM(sigma_min)` for `solvers.lcm()`.
    """

    def function(x, sigma):
        # Below sigma_min, where easy tuning ends, F is trained by nobody: a factor for it would feed back.
        rest, root = jnp.maximum(sigma - sigma_min, 0), jnp.sqrt(sigma**2 + sigma_data**2)
        noise = jnp.log(jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny)) / 4
        output = returned("the network", network(x / per_image(root, x), noise), x.shape).astype(x.dtype)
        c_skip = sigma_data**2 / (rest**2 + sigma_data**2)
        return per_image(c_skip, x) * x + per_image(sigma_data * rest / root, x) * output

    return Denoiser(function, EDM(sigma_min=sigma_min))


@checked(c=number(0))
def pseudo_huber(c: float) -> Callable[[Any], Any]:
    """sqrt(|d|^2 + c^2) - c of each example's whole difference d.

    c = 0.00054 sqrt(number of pixels and channels) in improved consistency training (Song and Dhariwal 2024,
    section 3.3); 0 is |d|. Training scripts of latent consistency models take 0.001 and the distance of each
    number by itself; with 0.001 `lcm` takes that of the whole here.
    """

    def distance(error):
        squares = squares_of(error) + c**2
        return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0) - c

    return distance


@checked(
    f=function("(x_t, t) -> x_0"),
    target=function("(x_s, s) -> x_0"),
    x_t=A_LATENT,
    t=TIMESTEPS,
    x_s=A_LATENT,
    s=TIMESTEPS,
    distance=function("(difference) -> distances"),
    weight=optional(ONE_EACH),
)
def consistency_loss(
    f: Callable[[Any, Any], Any],
    target: Callable[[Any, Any], Any],
    x_t: Float[Array, "B ..."],
    t: Real[Array, " B"],
    x_s: Float[Array, "B ..."],
    s: Real[Array, " B"],
    *,
    distance: Callable[[Any], Any] = squares_of,
    weight: Real[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of w d(f(x_t, t) - target(x_s, s)), with the target a constant.

    Args:
        f: the student, a function that is x itself at the clean end: `edm_consistency_model(...)`, or
            `D.consistency_function(...)`. Dropout must use the same key in f and target.
        target: f itself, or f with a moving average of its parameters.
        x_t, t: noisier; x_s, s: the neighbour on the same trajectory, see the table above.
        distance: of each example's difference; `squares_of` or `pseudo_huber(c)`.
        weight: for each example; 1 / (t - s) in improved training and easy tuning.

    Returns:
        (loss, {"distance": the mean of d}).

    Sources: Song et al. 2023, eq. 7 and 10; Song and Dhariwal 2024, section 3.
    """
    check_batch(x_t=x_t, x_s=x_s, t=t, s=s, weight=weight)
    t, s = times_on(f.path if isinstance(f, Denoiser) else None, x_t, t=t, s=s)
    here, there = (
        returned(name, function(x, time), x_t.shape)
        for name, function, x, time in (("f", f, x_t, t), ("target", target, x_s, s))
    )
    apart = returned("distance", distance(here - stopped(there)), x_t.shape[:1])
    mean = jnp.mean(apart)
    loss = mean if weight is None else jnp.mean(jnp.asarray(weight, apart.dtype) * apart)
    return loss, {"distance": mean}


@checked(
    num_levels=count(2),
    sigma_min=number(above=0),
    sigma_max=number(above=0),
    rho=number(above=0),
)
def karras_levels(
    num_levels: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[np.ndarray, " N"]:
    """N rising sigmas, even in sigma^(1/rho), from sigma_min to sigma_max (Karras et al. 2022, eq. 5).

    Raises:
        InvalidArgumentError: sigma_min >= sigma_max.
    """
    if sigma_min >= sigma_max:
        raise InvalidArgumentError(f"sigma_min must be < sigma_max, got {sigma_min} and {sigma_max}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.linspace(low, high, num_levels) ** rho


@checked(step=count(0), total_steps=count(1), first=count(1), last=count(1))
def num_levels(step: int, total_steps: int, first: int = 10, last: int = 1280) -> int:
    """The number of sigmas after `step` updates: min(first 2^k, last) + 1, doubled at equal intervals.

    k = floor(step / K'), K' = floor(total_steps / (log2(floor(last / first)) + 1)): Song and Dhariwal 2024,
    section 3.4.

    >>> [num_levels(step, 800) for step in (0, 100, 799)]
    [11, 21, 1281]

    Raises:
        InvalidArgumentError: first > last.
    """
    if first > last:
        raise InvalidArgumentError(f"first must be <= last, got {first} and {last}")
    stage = max(1, math.floor(total_steps / (math.log2(last // first) + 1)))
    doublings = min(step // stage, math.ceil(math.log2(last / first)))
    return min(first * 2**doublings, last) + 1


@checked(sigmas=array("real", "[N]", axes=1), mean=number(), std=number(above=0))
def interval_probabilities(
    sigmas: Real[Any, " N"], mean: float = -1.1, std: float = 2.0
) -> Float[np.ndarray, " M"]:
    """The probability of each pair of neighbours [N - 1] among rising sigmas: ln sigma ~ N(mean, std^2).

    Song and Dhariwal 2024, eq. 10: the normal distribution's mass between two neighbours, normalised.

    Raises:
        InvalidArgumentError: fewer than two sigmas, or not rising and positive.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if len(sigmas) < 2 or sigmas[0] <= 0 or (np.diff(sigmas) <= 0).any():
        raise InvalidArgumentError("sigmas must be two or more rising positive numbers")
    below = np.array([math.erf(value) for value in (np.log(sigmas) - mean) / (math.sqrt(2) * std)])
    mass = np.diff(below)
    return mass / mass.sum()


@checked(
    key=one_key,
    sigmas=array("real", "[N]", axes=1),
    batch_size=count(1),
    probabilities=optional(array("real", "[N - 1]", axes=1)),
)
def draw_neighbours(
    key: PRNGKeyArray,
    sigmas: Real[Any, " N"],
    batch_size: int,
    probabilities: Real[Any, " M"] | None = None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(t, s): a pair of neighbours among rising sigmas for each example, t the noisier.

    Args:
        key: a key.
        sigmas: [N], such as `karras_levels(18)`.
        batch_size: B.
        probabilities: [N - 1], of the pairs (`interval_probabilities`); None: all alike.
    """
    pairs = len(sigmas) - 1
    if pairs < 1 or (probabilities is not None and len(probabilities) != pairs):
        raise InvalidArgumentError(
            f"the shapes do not go together: sigmas must be two or more, and probabilities one for each pair "
            f"of neighbours, got {len(sigmas)} sigmas and "
            f"{'none' if probabilities is None else len(probabilities)}"
        )
    levels = jnp.asarray(sigmas, jnp.float32)
    p = None if probabilities is None else jnp.asarray(probabilities, jnp.float32)
    row = jax.random.choice(key, len(levels) - 1, (batch_size,), p=p)
    return levels[row + 1], levels[row]


@checked(t=TIMES, stage=count(0), q=number(above=1), k=number(0), b=number(above=0))
def easy_times(
    t: Float[Array, " B"], stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0
) -> Float[Array, " B"]:
    """s = t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), never below 0.

    Where n(t) is more than q^(stage + 1), s = 0 and the target is the clean image: with q = 2, stage 0 is
    ordinary denoising, from which the pairs close up. Geng et al. 2025 (easy consistency tuning), section
    4.1.
    """
    t = jnp.asarray(t)
    n = 1 + k * jax.nn.sigmoid(-b * t)
    return jnp.maximum(t * (1 - n * q ** -(stage + 1)), 0)
