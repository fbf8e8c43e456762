"""The cosine schedule in continuous time, as Wuerstchen has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import check_fields, number
from jaxldm.diffusion.paths import Path, safe_sqrt

LEAST_ALPHAS_CUMPROD = 1e-4  # at the noisy end, where epsilon prediction would be undefined at 0
MOST_ALPHAS_CUMPROD = 0.9999  # at the cleanest row of the published sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Path):
    """alpha = cos((u + s)/(1 + s) pi/2) / cos(s/(1 + s) pi/2), t in [0, 1], and sigma = sqrt(1 - alpha^2).

    Nichol & Dhariwal 2021, equation 17, not cut into steps; s is `offset`. u is t, or t^scaler where the
    scaler is below 1, or 1 - (1 - t)^scaler where it is above. As in Wuerstchen alpha^2 does not fall below
    1e-4: in the last 0.6 % of t only the network's t changes, and two rows of a grid in there have one noise
    level, which breaks multistep solvers (no grid of 150 even steps or fewer has two). alpha^2 is 0.9999 at
    `t_min`, where its sampler stops. The network's t is the path's.

    Raises:
        InvalidArgumentError: unless offset and scaler are above 0.

    >>> round(float(Cosine().alpha(0.5)), 4)
    0.7027
    """

    offset: float = 0.008
    scaler: float = 1.0
    name = "cosine"

    def __post_init__(self):
        check_fields(self, offset=number(above=0), scaler=number(above=0))

    @property
    def t_min(self) -> float:
        """Where alpha^2 is 0.9999."""
        return float(self.time_of(np, np.asarray((1 / MOST_ALPHAS_CUMPROD - 1) ** 0.5)))

    def coefficients(
        self, xp: Any, t: Float[Any, " *shape"]
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """alpha and sqrt(1 - alpha^2)."""
        rate, start = self._angles()
        turned = rate * _stretched(xp.clip(t, 0, 1), self.scaler)
        alpha = xp.cos(turned + start) / float(np.cos(start))
        # 1 - alpha^2 without the difference, which float32 has no digits for near the clean end.
        square = xp.sin(turned) * xp.sin(turned + 2 * start) / float(np.cos(start)) ** 2
        least = LEAST_ALPHAS_CUMPROD
        return xp.maximum(alpha, least**0.5), safe_sqrt(xp, xp.minimum(square, 1 - least))

    def time_of(self, xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
        """From the angle whose cosine is alpha."""
        rate, start = self._angles()
        ratio = xp.minimum(ratio, float((1 / LEAST_ALPHAS_CUMPROD - 1) ** 0.5))
        angle = xp.arctan2(xp.sqrt(ratio**2 + np.sin(start) ** 2), xp.full_like(ratio, float(np.cos(start))))
        return _straightened(xp.clip((angle - start) / rate, 0, 1), self.scaler)

    def _angles(self) -> tuple[float, float]:
        """The angle that t = 1 turns by, and the angle at t = 0."""
        rate = np.pi / 2 / (1 + self.offset)
        return rate, rate * self.offset


def _stretched(t: Float[Any, " *shape"], scaler: float) -> Float[Any, " *shape"]:
    if scaler > 1:
        return 1 - (1 - t) ** scaler
    return t**scaler if scaler < 1 else t


def _straightened(u: Float[Any, " *shape"], scaler: float) -> Float[Any, " *shape"]:
    """The inverse of `_stretched`."""
    if scaler > 1:
        return 1 - (1 - u) ** (1 / scaler)
    return u ** (1 / scaler) if scaler < 1 else u
