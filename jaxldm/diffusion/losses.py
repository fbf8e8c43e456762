"""The training objective: the mirror of `sample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.arguments import a_condition, a_tree, array, checked, function, number, one_key, optional
from jaxldm.diffusion.checks import check_condition
from jaxldm.diffusion.denoiser import check_output_shape
from jaxldm.diffusion.guidance import broadcast_null
from jaxldm.diffusion.paths import at_least_float32, per_image
from jaxldm.diffusion.predictions import A_PREDICTION, Prediction
from jaxldm.diffusion.training_times import TrainingTimes, default_training_times
from jaxldm.errors import InvalidArgumentError
from jaxldm.functions import returned
from jaxldm.pixels import check_not_pixels


@checked(
    key=one_key,
    network=function("(x_t, t, condition) -> output"),
    prediction=A_PREDICTION,
    condition=a_tree,
    x_0=array("floating", "[B, ...]", axes=(2, 64), instead="x / 127.5 - 1 of 8-bit images"),
    weight=optional(function("log-SNR -> weight")),
    time=optional(function("(key, shape, path) -> t")),
    log_variance=optional(function("log-SNR -> log-variance")),
    noise_offset=number(0),
    condition_dropout=number(0, 1),
)
def diffusion_loss(
    key: PRNGKeyArray,
    network: Callable[[Any, Any, Any], Any],
    prediction: Prediction,
    x_0: Float[Array, "B ..."],
    condition: Any = None,
    *,
    weight: Callable[[Any], Any] | None = None,
    time: TrainingTimes | None = None,
    log_variance: Callable[[Any], Any] | None = None,
    noise_offset: float = 0.0,
    null_condition: Any = None,
    condition_dropout: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of w(t) |network(x_t, t, condition) - target|^2, x_t = alpha x_0 + sigma eps, one t per example.

    Ho et al. 2020, equation 14, for any path and prediction, in float32; the network may compute in less.

    Args:
        key: split into one key each for t, eps, noise offset and condition dropout.
        network: (x_t [B, H, W, C], t [B], condition) -> output [B, H, W, C], parameters closed over.
        prediction: `epsilon(path)`, `v(path)`, `edm(path, sigma_data)` and so on: path and target.
        x_0: clean images or latents [B, H, W, C], floating point.
        condition: an array [B, ...], a tree of them, or None.
        weight: log-SNR [B] -> the weight of the squared error of x_0, such as `min_snr(5)`; it is carried
            over to the output by `prediction.gain(t)^2`. None: the plain error of the output.
        time: (key, shape, path) -> t, such as `logit_normal()`. None: `log_normal()` on an EDM path, else
            `uniform()`.
        log_variance: log-SNR [B] -> u [B], trained with the network: the weighted error becomes
            error / exp(u) + u, whose least is at u = ln of the mean error at that noise (Karras et al. 2024,
            EDM2, equation 15). Every noise then pulls alike, whatever the weight is.
        noise_offset: adds noise_offset N(0, 1) of shape [B, 1, 1, C] to eps, and keeps it in the target, so
            that the model learns to move the mean brightness (Guttenberg 2023; 0.05 to 0.1).
        null_condition: what a dropped condition is replaced by (see `classifier_free_guidance`).
        condition_dropout: probability, per example, that the condition is dropped.

    Returns:
        (loss, {"mse": the same mean without weights}).

    Raises:
        InvalidArgumentError: images of whole numbers, an option out of its range, dropout without a null
            condition, a network whose output has another shape than x_0.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> prediction, x_0 = D.v(D.VP.named("cosine")), jnp.zeros((2, 8, 8, 1))
    >>> network = lambda x, t, condition: x
    >>> loss, _ = D.diffusion_loss(jax.random.key(0), network, prediction, x_0, weight=D.min_snr(5))
    """
    path, x_0 = prediction.path, at_least_float32(jnp.asarray(x_0))
    check_condition(condition, x_0, x_name="x_0")
    if prediction.sigma_data is None:
        check_not_pixels("x_0", x_0, drawn=True)
    time_key, noise_key, dropout_key = jax.random.split(key, 3)
    draw = default_training_times(path) if time is None else time
    t = jnp.asarray(returned("time", draw(time_key, x_0.shape[:1], path), x_0.shape[:1]), x_0.dtype)
    epsilon = _offset_noise(noise_key, x_0, noise_offset)
    if condition_dropout:
        condition = drop_condition(dropout_key, condition, null_condition, condition_dropout)

    alpha, sigma = path.alpha(t), path.sigma(t)
    x_t = per_image(alpha, x_0) * x_0 + per_image(sigma, x_0) * epsilon
    output = network(*prediction.precondition(x_t, t), condition)
    check_output_shape(output, x_0)
    error = output.astype(x_0.dtype) - prediction.target(x_0, epsilon, t)
    squares = jnp.mean(error**2, axis=tuple(range(1, x_0.ndim)))
    mse, log_snr = jnp.mean(squares), 2 * (jnp.log(alpha) - jnp.log(sigma))
    if weight is not None:
        squares = (
            returned("weight", weight(log_snr), t.shape, or_one=True) * prediction.gain(t) ** 2 * squares
        )
    if log_variance is not None:
        u = returned("log_variance", log_variance(log_snr), t.shape, or_one=True)
        squares = squares * jnp.exp(-u) + u
    return jnp.mean(squares), {"mse": mse}


@checked(gamma=number(above=0, note="(5 in the paper)"))
def min_snr(gamma: float = 5.0) -> Callable[[Any], Any]:
    """min(SNR, gamma), a weight for `diffusion_loss` (Hang et al. 2023, equation 10; 5 in the paper).

    It weighs the error of x_0, whatever the network predicts: on the output it is min(SNR, gamma) for
    `sample`, divided by SNR for `epsilon` and by SNR + 1 for `v_prediction` (section 3.4). At pure noise it
    is 0: `sample` and `v_prediction` never learn it.

    Raises:
        InvalidArgumentError: unless gamma > 0.
    """
    return lambda log_snr: jnp.minimum(jnp.exp(log_snr), gamma)


@checked(k=number(above=0, note="(1 in the paper)"), gamma=number(0, note="(0.5 or 1 in the paper)"))
def p2(k: float = 1.0, gamma: float = 1.0) -> Callable[[Any], Any]:
    """SNR / (k + SNR)^gamma, a weight for `diffusion_loss` (Choi et al. 2022, equation 8).

    On the error of the noise it is 1 / (k + SNR)^gamma: less for the last details. With gamma = 0 it is no
    weight there.

    Raises:
        InvalidArgumentError: unless k > 0 and gamma >= 0.
    """

    def weight(log_snr: Any) -> Any:
        log_snr = jnp.minimum(log_snr, 80.0)  # exp(80) is near the largest number of float32
        return jnp.exp(
            log_snr - gamma * jnp.logaddexp(jnp.log(jnp.float32(k)).astype(log_snr.dtype), log_snr)
        )

    return weight


@checked(key=one_key, condition=a_condition, probability=number(0, 1))
def drop_condition(key: PRNGKeyArray, condition: Any, null_condition: Any, probability: float) -> Any:
    """The condition with each example replaced by the null condition with the given probability.

    Ho and Salimans 2022, Algorithm 1: what makes guidance possible later. One decision per example for all
    leaves.

    Raises:
        InvalidArgumentError: a probability outside [0, 1], or no condition or null condition.
    """
    if condition is None or null_condition is None:
        raise InvalidArgumentError("condition_dropout needs a condition, and a null_condition in its place")
    if not jax.tree.leaves(condition):
        raise InvalidArgumentError("condition must hold an array [B, ...] to be dropped, and it holds none")
    batch_size = jax.tree.leaves(condition)[0].shape[0]
    dropped = jax.random.bernoulli(key, probability, (batch_size,))
    return jax.tree.map(
        lambda null, kept: jnp.where(per_image(dropped, kept), null, kept),
        broadcast_null(null_condition, condition),
        condition,
    )


def _offset_noise(key, x, noise_offset):
    noise_key, offset_key = jax.random.split(key)
    epsilon = jax.random.normal(noise_key, x.shape, x.dtype)
    if not noise_offset:
        return epsilon
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
    return epsilon + noise_offset * jax.random.normal(offset_key, shape, x.dtype)
