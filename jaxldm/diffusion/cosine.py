"""The cosine schedule in continuous time, as Wuerstchen has it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm.diffusion.paths import Path, safe_sqrt
from jaxldm.errors import InvalidArgumentError

LEAST_ALPHAS_CUMPROD = 1e-4  # at the noisy end, where epsilon prediction would have no answer at 0
MOST_ALPHAS_CUMPROD = 0.9999  # at the cleanest row of the published sampler


def cosine_path(offset: float = 0.008, scaler: float = 1.0) -> Path:
    """alpha = cos((u + s)/(1 + s) pi/2) / cos(s/(1 + s) pi/2), t in [0, 1], and sigma = sqrt(1 - alpha^2).

    Nichol & Dhariwal 2021, equation 17, not cut into steps; s is `offset`. u is t, or t^scaler where the
    scaler is below 1, or 1 - (1 - t)^scaler where it is above. As in Wuerstchen alpha^2 does not fall below
    1e-4: the last 0.6 % of t are told apart by the network alone, and two rows of a grid in there have one
    noise level, which multistep solvers cannot stand (no grid of 150 even steps or fewer has two). alpha^2
    is 0.9999 at `t_min`, where its sampler stops. The network is told t.

    Raises:
        InvalidArgumentError: unless offset and scaler are above 0.

    >>> round(float(cosine_path().alpha(0.5)), 4)
    0.7027
    """
    if not (0 < offset < np.inf and 0 < scaler < np.inf):
        raise InvalidArgumentError(
            f"cosine_path needs offset > 0 and scaler > 0, not offset={offset}, scaler={scaler}"
        )
    rate = np.pi / 2 / (1 + offset)
    start = rate * offset
    first, least = float(np.cos(start)), LEAST_ALPHAS_CUMPROD

    def coefficients(xp, t):
        turned = rate * _stretched(xp.clip(t, 0, 1), scaler)
        alpha = xp.cos(turned + start) / first
        # 1 - alpha^2 without the difference, which float32 has no digits for near the clean end.
        square = xp.sin(turned) * xp.sin(turned + 2 * start) / first**2
        return xp.maximum(alpha, least**0.5), safe_sqrt(xp, xp.minimum(square, 1 - least))

    def time_of(xp, ratio):
        ratio = xp.minimum(ratio, float((1 / least - 1) ** 0.5))
        angle = xp.arctan2(xp.sqrt(ratio**2 + np.sin(start) ** 2), xp.full_like(ratio, first))
        return _straightened(xp.clip((angle - start) / rate, 0, 1), scaler)

    def draw(key, shape):
        return jax.random.uniform(key, shape, jnp.float32, t_min, 1.0)

    t_min = float(time_of(np, np.asarray((1 / MOST_ALPHAS_CUMPROD - 1) ** 0.5)))
    return Path("cosine", 0.0, t_min, 1.0, None, None, coefficients, time_of, draw)


def _stretched(t: Any, scaler: float) -> Any:
    if scaler > 1:
        return 1 - (1 - t) ** scaler
    return t**scaler if scaler < 1 else t


def _straightened(u: Any, scaler: float) -> Any:
    """The inverse of `_stretched`."""
    if scaler > 1:
        return 1 - (1 - u) ** (1 / scaler)
    return u ** (1 / scaler) if scaler < 1 else u
