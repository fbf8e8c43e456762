"""The training objective: the mirror of `sample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.diffusion.guidance import broadcast_null
from jaxldm.diffusion.paths import Path, at_least_float32, per_image
from jaxldm.diffusion.predictions import (
    check_edm,
    check_prediction,
    edm_coefficients,
    target,
    x0_error_per_output_error,
)
from jaxldm.errors import InvalidArgumentError


def diffusion_loss(
    key: PRNGKeyArray,
    network: Callable[[Any, Any, Any], Any],
    path: Path,
    x_0: Float[Array, "B ..."],
    condition: Any = None,
    *,
    prediction: str = "epsilon",
    sigma_data: float | None = None,
    min_snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    null_condition: Any = None,
    condition_dropout: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of w(t) |network(x_t, t, condition) - target|^2, x_t = alpha x_0 + sigma eps, one t per example.

    Ho et al. 2020, equation 14, for any path and prediction, in float32; the network may compute in less.

    Args:
        key: split into one key each for t, eps, noise offset and condition dropout.
        network: (x_t [B, H, W, C], t [B], condition) -> output [B, H, W, C], parameters closed over.
        path: draws t and gives alpha and sigma.
        x_0: clean images or latents [B, H, W, C].
        condition: an array [B, ...], a tree of them, or None.
        prediction: what the output means.
        sigma_data: on an EDM path: train EDM's F, for `edm_preconditioned`, whatever `prediction` says.
        min_snr_gamma: weigh the error of x_0 by min(SNR, gamma) (Hang et al. 2023, equation 10; 5 in the
            paper). At pure noise that is 0: `sample` and `v_prediction` never learn it. None: no weights.
        noise_offset: adds noise_offset N(0, 1) of shape [B, 1, 1, C] to eps, and keeps it in the target, so
            that the model learns to move the mean brightness (Guttenberg 2023; 0.05 to 0.1).
        null_condition: what a dropped condition is replaced by (see `classifier_free_guidance`).
        condition_dropout: probability, per example, that the condition is dropped.

    Returns:
        (loss, {"mse": the same mean without weights}).

    Raises:
        UnknownNameError: an unknown prediction.
        InvalidArgumentError: epsilon on a path that ends in pure noise, an option out of its range, dropout
            without a null condition, sigma_data on a path that is not EDM's.
    """
    _check_options(path, prediction, sigma_data, min_snr_gamma, noise_offset)
    time_key, noise_key, dropout_key = jax.random.split(key, 3)
    x_0 = at_least_float32(x_0)
    t = path.sample_time(time_key, x_0.shape[:1]).astype(x_0.dtype)
    epsilon = _offset_noise(noise_key, x_0, noise_offset)
    if condition_dropout:
        condition = drop_condition(dropout_key, condition, null_condition, condition_dropout)
    error, gain = _output_error(network, path, prediction, sigma_data, x_0, epsilon, t, condition)
    squares = jnp.mean(error**2, axis=tuple(range(1, x_0.ndim)))
    loss = mse = jnp.mean(squares)
    if min_snr_gamma is not None:
        loss = jnp.mean(_clipped_snr(path.alpha(t), path.sigma(t), min_snr_gamma) * gain**2 * squares)
    return loss, {"mse": mse}


def _offset_noise(key, x, noise_offset):
    noise_key, offset_key = jax.random.split(key)
    epsilon = jax.random.normal(noise_key, x.shape, x.dtype)
    if not noise_offset:
        return epsilon
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
    return epsilon + noise_offset * jax.random.normal(offset_key, shape, x.dtype)


def _output_error(network, path, prediction, sigma_data, x_0, epsilon, t, condition):
    """Output minus target [B, ...], and how far x_0 moves for an output that is off by one [B]."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    x_t = per_image(alpha, x_0) * x_0 + per_image(sigma, x_0) * epsilon
    if sigma_data is None:
        wanted = target(prediction, x_0, epsilon, alpha, sigma)
        gain = x0_error_per_output_error(prediction, alpha, sigma)
    else:  # minimizing |F - (x_0 - c_skip x_t)/c_out|^2 is EDM's lambda = 1/c_out^2 on x_0
        c = edm_coefficients(sigma, sigma_data)
        wanted, gain = (x_0 - per_image(c.skip, x_0) * x_t) / per_image(c.out, x_0), c.out
        x_t, t = per_image(c.scale_in, x_0) * x_t, c.noise
    output = network(x_t, t, condition)
    chex.assert_equal_shape([output, x_0])
    return output.astype(x_0.dtype) - wanted, gain


def min_snr_weight(prediction: str, alpha: Any, sigma: Any, gamma: float) -> Any:
    """min(SNR, gamma) on the squared error of x_0, carried over to the squared error of the output.

    With SNR = alpha^2/sigma^2: min(SNR, gamma) for `sample`, divided by SNR for `epsilon` and by SNR + 1 for
    `v_prediction` (Hang et al. 2023, section 3.4; the v form follows from |d x_0 / d v|^2).
    """
    return _clipped_snr(alpha, sigma, gamma) * x0_error_per_output_error(prediction, alpha, sigma) ** 2


def _clipped_snr(alpha, sigma, gamma):
    snr = (alpha / jnp.where(sigma == 0, 1, sigma)) ** 2
    return jnp.where(sigma == 0, gamma, jnp.minimum(snr, gamma))


def drop_condition(key: PRNGKeyArray, condition: Any, null_condition: Any, probability: float) -> Any:
    """The condition with each example replaced by the null condition with the given probability.

    Ho and Salimans 2022, Algorithm 1: what makes guidance possible later. One decision per example for all
    leaves.

    Raises:
        InvalidArgumentError: a probability outside [0, 1], or no condition or null condition.
    """
    if not 0 <= probability <= 1:
        raise InvalidArgumentError(f"condition_dropout is a probability from 0 to 1, not {probability}")
    if condition is None or null_condition is None:
        raise InvalidArgumentError("condition_dropout needs a condition, and a null_condition in its place")
    batch_size = jax.tree.leaves(condition)[0].shape[0]
    dropped = jax.random.bernoulli(key, probability, (batch_size,))
    return jax.tree.map(
        lambda null, kept: jnp.where(per_image(dropped, kept), null, kept),
        broadcast_null(null_condition, condition),
        condition,
    )


def _check_options(path, prediction, sigma_data, min_snr_gamma, noise_offset) -> None:
    if sigma_data is None:
        check_prediction(prediction, path)
    else:
        check_edm(path, sigma_data)
    if min_snr_gamma is not None and not min_snr_gamma > 0:
        raise InvalidArgumentError(f"min_snr_gamma must be above 0 (5 in the paper), not {min_snr_gamma}")
    if not noise_offset >= 0:
        raise InvalidArgumentError(f"noise_offset must be 0 or more, not {noise_offset}")
