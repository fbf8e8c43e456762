"""Predictions: what a network's output means, and nowhere else.

With x_t = alpha x_0 + sigma eps and n = sqrt(alpha^2 + sigma^2) (1 on the variance-preserving path):

| name           | output                         | x_0                                  |
|----------------|--------------------------------|--------------------------------------|
| `epsilon`      | eps                            | (x_t - sigma output) / alpha         |
| `sample`       | x_0                            | output                               |
| `v_prediction` | (alpha eps - sigma x_0) / n    | (alpha x_t - sigma n output) / n^2   |
| `flow`         | eps - x_0                      | (x_t - sigma output)/(alpha + sigma) |

`v_prediction` is Salimans and Ho 2022 (appendix D); dividing by n makes it theirs on every path: the v of the
variance-preserving point on the same ray. `flow` is the velocity of the straight path (Liu et al. 2022).

alpha and sigma are numbers, or one per image [B]. Arrays may be NumPy or JAX.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.diffusion.paths import Path, per_image
from jaxldm.errors import InvalidArgumentError, one_of

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


def to_x0(prediction: str, output: Any, x_t: Any, alpha: Any, sigma: Any) -> Any:
    """The clean image [B, H, W, C] that a network's output stands for; see the table above.

    `epsilon` divides by alpha and has no answer at alpha = 0; the other three are finite there.

    Raises:
        UnknownNameError: a prediction not in `PREDICTIONS`.
    """
    one_of("prediction", prediction, PREDICTIONS)
    alpha, sigma = per_image(alpha, x_t), per_image(sigma, x_t)
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction == "v_prediction":
        square = alpha**2 + sigma**2
        return (alpha * x_t - sigma * square**0.5 * output) / square
    if prediction == "flow":
        return (x_t - sigma * output) / (alpha + sigma)
    return output


def from_x0(prediction: str, x_0: Any, x_t: Any, alpha: Any, sigma: Any) -> Any:
    """The output of a network that would have said x_0 [B, H, W, C] at x_t: the inverse of `to_x0`.

    At sigma = 0 the noise in x_t cannot be seen; it is taken to be zero there, so that the result stays
    finite.

    Raises:
        UnknownNameError: a prediction not in `PREDICTIONS`.
    """
    one_of("prediction", prediction, PREDICTIONS)
    if prediction == "sample":
        return x_0
    alpha_x, sigma_x = per_image(alpha, x_t), per_image(sigma, x_t)
    if isinstance(sigma_x, jax.Array):
        divisor = jnp.where(sigma_x == 0, 1, sigma_x)
    else:
        divisor = sigma_x + (sigma_x == 0)
    return target(prediction, x_0, (x_t - alpha_x * x_0) / divisor, alpha, sigma)


def target(prediction: str, x_0: Any, epsilon: Any, alpha: Any, sigma: Any) -> Any:
    """What the network should have said, [B, H, W, C], given the clean image and the noise that was added.

    Raises:
        UnknownNameError: a prediction not in `PREDICTIONS`.
    """
    one_of("prediction", prediction, PREDICTIONS)
    alpha, sigma = per_image(alpha, x_0), per_image(sigma, x_0)
    if prediction == "epsilon":
        return epsilon
    if prediction == "v_prediction":
        return (alpha * epsilon - sigma * x_0) / (alpha**2 + sigma**2) ** 0.5
    if prediction == "flow":
        return epsilon - x_0
    return x_0


def x0_error_per_output_error(prediction: str, alpha: Any, sigma: Any) -> Any:
    """|d x_0 / d output|: how far x_0 moves when the output is off by one.

    It carries weights on the error of x_0 over to the error of the output.

    Its square is 1 / SNR for `epsilon` and 1 / (SNR + 1) for `v_prediction`, with SNR = alpha^2 / sigma^2.
    """
    one_of("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon":
        return sigma / alpha
    if prediction == "v_prediction":
        return sigma / (alpha**2 + sigma**2) ** 0.5
    if prediction == "flow":
        return sigma / (alpha + sigma)
    return sigma * 0 + 1


class EDMCoefficients(NamedTuple):
    """x_0 = skip x_t + out F(scale_in x_t, noise), with numbers per image [B]."""

    skip: Any
    out: Any
    scale_in: Any
    noise: Any


def edm_coefficients(sigma: Float[Array, " B"], sigma_data: float) -> EDMCoefficients:
    """EDM's preconditioning (Karras et al. 2022, table 1), where alpha = 1; s = sigma, d = sigma_data.

    c_skip = d^2/(s^2 + d^2), c_out = s d/sqrt(s^2 + d^2), c_in = 1/sqrt(s^2 + d^2), c_noise = ln(s)/4: the
    network sees and answers with unit variance at every noise level. c_noise is kept finite at s = 0.
    """
    total = sigma**2 + sigma_data**2
    noise = jnp.log(jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny)) / 4
    return EDMCoefficients(
        sigma_data**2 / total, sigma * sigma_data * jax.lax.rsqrt(total), jax.lax.rsqrt(total), noise
    )


def check_edm(path: Path, sigma_data: float) -> None:
    """Raises `InvalidArgumentError` unless EDM's preconditioning fits the path."""
    if path.name != "edm" or not sigma_data > 0:
        raise InvalidArgumentError("EDM's preconditioning needs an edm_path() and a sigma_data above 0")


def check_prediction(prediction: str, path: Path) -> None:
    """Refuses unknown predictions, and epsilon where the path ends in pure noise.

    Raises:
        UnknownNameError: a prediction not in `PREDICTIONS`.
        InvalidArgumentError: `epsilon` on a path with zero terminal SNR, where x_0 = (x_t - sigma eps) / 0.
    """
    one_of("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon" and path.zero_terminal_snr:
        raise InvalidArgumentError(
            f"epsilon prediction says nothing about x_0 at the noisy end of this {path.name} path, where "
            "alpha = 0 (zero terminal SNR): use prediction='v_prediction', 'flow' or 'sample'"
        )
