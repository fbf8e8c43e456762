"""Closed forms: data whose denoiser and probability-flow ODE are known exactly, on any path.

They test every solver, and they are denoisers without a network, to try things with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real, ScalarLike

from jaxldm.arguments import array, check_broadcast, checked
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.paths import A_PATH, Path, per_image
from jaxldm.errors import InvalidArgumentError


@checked(path=A_PATH, mean=array(), std=array())
def gaussian_denoiser(
    path: Path, mean: Float[ArrayLike, " ..."] = 0.0, std: Float[ArrayLike, " ..."] = 1.0
) -> Denoiser:
    """E[x_0 | x_t] = (sigma^2 m + alpha s^2 x_t) / (alpha^2 s^2 + sigma^2), for data N(m, s^2).

    Each number of an image is on its own.

    Args:
        path: any path.
        mean: m, a number or an array of the shape of one image [H, W, C].
        std: s > 0, likewise.
    """

    def function(x, t):
        m, s = _per_pixel(mean, x), _per_pixel(std, x)
        alpha, sigma = per_image(path.alpha(t), x), per_image(path.sigma(t), x)
        return (sigma**2 * m + alpha * s**2 * x) / (alpha**2 * s**2 + sigma**2)

    return Denoiser(function, path)


@checked(
    path=A_PATH,
    mean=array(filled=True),
    std=array(filled=True),
    x=array("floating", axes=(1, 64)),
    t_start=array(filled=True),
    t_end=array(filled=True),
)
def gaussian_solution(
    path: Path,
    mean: Float[ArrayLike, " ..."],
    std: Float[ArrayLike, " ..."],
    x: Float[Array, "B ..."],
    t_start: Real[ArrayLike, " ..."],
    t_end: Real[ArrayLike, " ..."],
) -> Float[Array, "B ..."]:
    """Where the probability-flow ODE takes x from t_start to t_end, exactly, for data N(mean, std^2).

    (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays constant along the ODE, because x_t is Gaussian with
    that mean and standard deviation at every t (Song et al. 2021, equation 13, for a linear score).
    """
    check_broadcast(mean=mean, x=x[:1])
    check_broadcast(std=std, x=x[:1])
    m, s = _per_pixel(mean, x), _per_pixel(std, x)
    check_broadcast(t_start=t_start, x=x)
    check_broadcast(t_end=t_end, x=x)
    start, end = ([jnp.asarray(of(t), x.dtype) for of in (path.alpha, path.sigma)] for t in (t_start, t_end))
    std_start, std_end = (jnp.sqrt(alpha**2 * s**2 + sigma**2) for alpha, sigma in (start, end))
    return end[0] * m + std_end / std_start * (x - start[0] * m)


@checked(
    path=A_PATH,
    weights=array(shape="[K]", axes=1),
    means=array(shape="[K, ...]", axes=(1, 64)),
    stds=array(shape="[K]", axes=1),
)
def gaussian_mixture_denoiser(
    path: Path,
    weights: Sequence[float] | Float[Array, " K"],
    means: Sequence[Any] | Float[Array, "K ..."],
    stds: Sequence[float] | Float[Array, " K"],
) -> Denoiser:
    """E[x_0 | x_t] for data sum_k w_k N(m_k, s_k^2 I): those of the components, weighed by their posterior.

    The posterior of component k is proportional to w_k N(x_t; alpha m_k, (alpha^2 s_k^2 + sigma^2) I).

    Args:
        path: any path.
        weights: [K], positive; they need not sum to 1.
        means: [K, H, W, C].
        stds: [K].
    """

    def function(x, t):
        logits, centres, variances = _components(path, weights, means, stds, x, t)
        alpha, sigma = per_image(path.alpha(t), x), per_image(path.sigma(t), x)
        posterior = jax.nn.softmax(logits, axis=0)
        x_0 = jnp.zeros_like(x)
        for k in range(len(centres)):
            s, variance = jnp.asarray(stds, x.dtype)[k], per_image(variances[k], x)
            answer = (sigma**2 * _per_pixel(centres[k], x) + alpha * s**2 * x) / variance
            x_0 = x_0 + per_image(posterior[k], x) * answer
        return x_0

    return Denoiser(function, path)


@checked(
    path=A_PATH,
    weights=array(shape="[K]", axes=1),
    means=array(shape="[K, ...]", axes=(1, 64)),
    stds=array(shape="[K]", axes=1),
    x=array("floating", axes=(1, 64)),
    t=array(),
)
def gaussian_mixture_log_density(
    path: Path,
    weights: Sequence[float] | Float[Array, " K"],
    means: Sequence[Any] | Float[Array, "K ..."],
    stds: Sequence[float] | Float[Array, " K"],
    x: Float[Array, "B ..."],
    t: ScalarLike | Real[Array, " B"],
) -> Float[Array, " B"]:
    """log p_t(x) of the same mixture, noised to t: its gradient is the score."""
    if np.shape(t) not in ((), x.shape[:1]):
        raise InvalidArgumentError(f"t must be one number, or one per image, got shape {list(np.shape(t))}")
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
    logits, _, _ = _components(path, weights, means, stds, x, t)
    total = jnp.log(jnp.sum(jnp.asarray(weights, x.dtype)))
    return jax.nn.logsumexp(logits, axis=0) - total


def _components(path, weights, means, stds, x, t):
    """log(w_k p_k(x_t)) [K, B], the centres [K, ...] and the variances alpha^2 s_k^2 + sigma^2 [K, B]."""
    weights, centres, stds = (jnp.asarray(value, x.dtype) for value in (weights, means, stds))
    if not len(weights) == len(centres) == len(stds) or x.shape[0] == 0:
        raise InvalidArgumentError(
            f"weights, means and stds must be as many, and x not empty, got {len(weights)}, {len(centres)}, "
            f"{len(stds)} and {x.shape[0]}"
        )
    check_broadcast(means=centres[:1], x=x[:1])
    alpha, sigma = path.alpha(t), path.sigma(t)
    dimension = x[0].size

    def one(weight, centre, std):
        variance = alpha**2 * std**2 + sigma**2
        distance = jnp.sum((x - per_image(alpha, x) * centre[None]).reshape(x.shape[0], -1) ** 2, axis=1)
        log_normal = -0.5 * (distance / variance + dimension * jnp.log(2 * jnp.pi * variance))
        return jnp.log(weight) + log_normal, variance

    logits, variances = jax.vmap(one)(weights, centres, stds)
    return logits, centres, variances


def _per_pixel(values: Float[ArrayLike, " ..."], x: Float[Array, "B ..."]) -> Float[Array, " ..."]:
    """A number, or an image [H, W, C] as [1, H, W, C] for x [B, H, W, C]."""
    values = jnp.asarray(values, x.dtype)
    return values if values.ndim == 0 else values[None]
