"""Shortcut models: the length of the step is an input of the network (Frans et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.arguments import a_tree, checked, count, function, number, one_key, optional
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.rectified_flow import Flow
from jaxldm.errors import InvalidArgumentError
from jaxldm.few_steps.jumps import A_LATENT, TIMES, check_batch, means_of, noised, stopped
from jaxldm.functions import returned


@checked(key=one_key, batch_size=count(1), smallest=count(1))
def shortcut_times(
    key: PRNGKeyArray, batch_size: int, smallest: int = 128
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(t, d): a step of d = 1, 1/2, 1/4, ... 2/smallest, and where it starts: t = d, 2 d, ... 1.

    d / 2 is then never below 1/smallest, the step of the finest sampling. Frans et al. 2025, section 3.1; t
    is 1 at the noise here.

    Raises:
        InvalidArgumentError: a number that is no power of two, or 1.
    """
    _check_smallest(smallest)
    step_key, time_key = jax.random.split(key)
    power = jax.random.randint(step_key, (batch_size,), 0, smallest.bit_length() - 1)
    d = jnp.exp2(-power.astype(jnp.float32))
    row = jnp.floor(jax.random.uniform(time_key, (batch_size,)) / d)
    return jnp.minimum((row + 1) * d, 1.0), d


def _ask(network, x_t, t, d, condition):
    """What the network says."""
    check_condition(condition, x_t, x_name="x")
    return returned("the network", network(x_t, t, d, condition), x_t.shape)


def _check_smallest(smallest: int) -> None:
    if smallest < 2 or smallest & (smallest - 1):
        raise InvalidArgumentError(f"smallest must be 2, 4, 8, 16, ..., got {smallest}")


@checked(
    network=function("(x_t, t, d, condition) -> velocity"),
    x_t=A_LATENT,
    t=TIMES,
    d=TIMES,
    condition=a_tree,
    clip=optional(number(above=0)),
    smallest=count(1),
)
def shortcut_target(
    network: Callable[[Any, Any, Any, Any], Any],
    x_t: Float[Array, "B ..."],
    t: Float[Array, " B"],
    d: Float[Array, " B"],
    condition: Any = None,
    *,
    clip: float | None = 4.0,
    smallest: int = 128,
) -> Float[Array, "B ..."]:
    """The mean velocity of two steps of d / 2, which one step of d should have; a constant.

    Args:
        network: with a moving average of its parameters.
        x_t: [B, ...]; t, d: [B]. The step goes from t to t - d.
        condition: of the network.
        clip: bound of the intermediate x and of the target, in standard deviations of data; None: none.
        smallest: of `shortcut_times`. The network is asked for a step of 1 / smallest as for d = 0, the
            velocity: of both `shortcut_loss` trains that one alone.

    Raises:
        InvalidArgumentError: a smallest that is no power of two, or 1.

    Source: Frans et al. 2025, eq. 5 and section 3.1.
    """
    check_batch(x_t=x_t, t=t, d=d)
    _check_smallest(smallest)
    half = jnp.where(d * smallest < 3, 0.0, d / 2)  # d = 2 / smallest, whatever its last digit
    bounded = (lambda x: x) if clip is None else (lambda x: jnp.clip(x, -clip, clip))
    first = _ask(network, x_t, t, half, condition)
    middle = bounded(x_t - per_image(d / 2, x_t) * first)
    second = _ask(network, middle, t - d / 2, half, condition)
    return stopped(bounded((first + second) / 2))


@checked(
    network=function("(x_t, t, d, condition) -> velocity"),
    x_0=A_LATENT,
    epsilon=A_LATENT,
    t=TIMES,
    d=TIMES,
    target=A_LATENT,
    condition=a_tree,
)
def shortcut_loss(
    network: Callable[[Any, Any, Any, Any], Any],
    x_0: Float[Array, "B ..."],
    epsilon: Float[Array, "B ..."],
    t: Float[Array, " B"],
    d: Float[Array, " B"],
    target: Float[Array, "K ..."],
    condition: Any = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of |s(x_t, t, d) - target|^2: the first K examples bootstrap, the others learn the flow.

    x_t = (1 - t) x_0 + t eps, and s(x_t, t, d) is the velocity with which x_(t-d) = x_t - d s. The others' d
    is 0 and their target eps - x_0, whatever is given as d.

    Args:
        network: (x_t [B, ...], t [B], d [B], condition) -> velocity [B, ...].
        x_0: data; epsilon: noise; t, d: [B], see `shortcut_times`; t of the others may be any.
        target: [K, ...], `shortcut_target` of the first K examples: a quarter of the batch in the paper.
        condition: of the network; for the first K, that with which the target was made.

    Returns:
        (loss, {"flow": of the others, "consistency": of the first}).

    Raises:
        InvalidArgumentError: a target for all examples or none, so that one half of the loss is left out.
    """
    check_batch(x_0=x_0, epsilon=epsilon, t=t, d=d)
    check_batch(target=target, x_0=x_0[: len(target)])
    first = target.shape[0]
    if not 0 < first < x_0.shape[0]:
        raise InvalidArgumentError(
            f"target must be of some of the {x_0.shape[0]} examples, not of {first}: a quarter is usual"
        )
    x_t = noised(Flow(), x_0, epsilon, jnp.asarray(t))
    steps = jnp.where(jnp.arange(len(d)) < first, d, 0)
    wanted = jnp.concatenate([stopped(target), (epsilon - x_0)[first:]])
    squares = means_of(_ask(network, x_t, t, steps, condition) - wanted)
    parts = {"flow": jnp.mean(squares[first:]), "consistency": jnp.mean(squares[:first])}
    return jnp.mean(squares), parts
