"""Resampling of weighted particles, in log space."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.arguments import array, checked, one_key
from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.sampling import Keys
from jaxldm.errors import InvalidArgumentError, shown

_NUMBERS = array("floating", "[N]", axes=1, filled=True)


def _log_weights(name: str, value: Any) -> Any:
    """Logarithms of weights, -inf among them, but not all."""
    given = _NUMBERS(name, value)
    if not traced(given):
        numbers = np.asarray(given, np.float64)
        if np.isnan(numbers).any() or np.max(numbers) in (np.inf, -np.inf):
            raise InvalidArgumentError(
                f"{name} must be logarithms of weights, one of them above 0, and neither NaN nor inf, got "
                f"{shown(value)}: write jnp.log(weights)"
            )
    return given


@checked(log_weights=_log_weights)
def effective_sample_size(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """(sum w)^2 / sum w^2: N for equal weights, 1 where one particle has all the weight.

    Args:
        log_weights: [N], up to a constant; -inf for a weight of 0.

    Raises:
        InvalidArgumentError: NaN or infinity, or no weight above 0.
    """
    log_sum = jax.nn.logsumexp
    return jnp.exp(2 * log_sum(log_weights) - log_sum(2 * log_weights))


@checked(key=one_key, log_weights=_log_weights)
def systematic_resampling(key: Keys, log_weights: Float[Array, " N"]) -> Int[Array, " N"]:
    """The numbers of N particles drawn from N by their weights, with one random number for all.

    Particle n is drawn floor(N w_n) or ceil(N w_n) times, N w_n on average: the variance of that count is the
    least of all unbiased ways, and much below that of independent draws.

    Args:
        key: one.
        log_weights: [N], up to a constant.

    Returns:
        [N], rising.

    Raises:
        InvalidArgumentError: NaN or infinity, or no weight above 0.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> D.search.systematic_resampling(jax.random.key(0), jnp.log(jnp.array([0.5, 0.25, 0.25, 0.0]))).tolist()
    [0, 0, 1, 2]
    """
    log_weights = jnp.asarray(log_weights)
    count = log_weights.shape[0]
    ends = jnp.cumsum(jax.nn.softmax(log_weights))
    places = (jax.random.uniform(key, (), ends.dtype) + jnp.arange(count, dtype=ends.dtype)) / count
    # The last end is 1 but for rounding; behind the last particle of any weight no place may lie.
    index = jnp.searchsorted(ends / ends[-1], places, side="right")
    return jnp.minimum(index, count - 1).astype(jnp.int32)
