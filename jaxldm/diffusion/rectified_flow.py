"""Rectified flow: the straight path, and the shift that suits large images."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import check_fields, checked, count, number
from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow(Path):
    """The straight path of rectified flow: alpha = 1 - t, sigma = t, t in [0, 1] (Liu et al. 2022).

    Attributes:
        shift: t' = shift t / (1 + (shift - 1) t), on training's draws and by default on grids: 3 in SD3,
            `resolution_shift(tokens)` in FLUX. The network's t is the shifted one.
        t_min: the cleanest t of `linspace` spacing and of grids with `final="sigma_min"`.

    Raises:
        InvalidArgumentError: unless 0 < t_min < 1 and shift > 0.
    """

    shift: float = 1.0
    t_min: float = 1e-3
    name = "flow"
    t_train_min: ClassVar[float] = 0.0

    def __post_init__(self):
        check_fields(self, shift=number(above=0), t_min=number(above=0, below=1))

    @property
    def default_shift(self) -> float:
        """The shift."""
        return self.shift

    def coefficients(
        self, xp: Any, t: Float[Any, " *shape"]
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """1 - t and t."""
        return 1 - t, t

    def time_of(self, xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
        """ratio / (1 + ratio)."""
        return flow_time(xp, ratio)


def flow_time(xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
    """The t of a sigma / alpha on the straight path, in [0, 1]: ratio / (1 + ratio)."""
    # 1 / (1 + 1 / ratio) is finite at infinity, where ratio / (1 + ratio) is not; near 0 its gradient is not.
    small = ratio < 1e-20
    with np.errstate(divide="ignore", over="ignore"):
        return xp.where(small, ratio, 1 / (1 + 1 / xp.where(small, 1.0, ratio)))


@checked(
    num_image_tokens=count(0),
    base_tokens=count(0),
    max_tokens=count(0),
    base_shift=number(),
    max_shift=number(),
)
def resolution_shift(
    num_image_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    kind: str = "exponential",
) -> float:
    """FLUX's shift for an image of so many tokens, for `Flow(shift=...)`: e^mu.

    mu is linear in the number of image tokens (256 -> 0.5, 4096 -> 1.15), because a large image needs more
    noise to be hidden as well; t' = e^mu / (e^mu + 1/t - 1) is the shift by e^mu. An image of 1024 x 1024
    pixels has 64 x 64 tokens. The defaults are FLUX.1-dev's; FLUX.1-schnell is not shifted.

    Args:
        kind: "exponential", e^mu; "linear", mu itself (diffusers' time_shift_type).

    Raises:
        InvalidArgumentError: no tokens, base_tokens = max_tokens, or a shift that is not positive.
        UnknownNameError: another kind.

    >>> round(resolution_shift(4096), 4)
    3.1582
    """
    one_of("kind of shift", kind, ("exponential", "linear"))
    if num_image_tokens < 1 or base_tokens == max_tokens:
        raise InvalidArgumentError(
            f"resolution_shift needs at least 1 token and two different ends, got {num_image_tokens} tokens "
            f"between {base_tokens} and {max_tokens}"
        )
    mu = base_shift + (max_shift - base_shift) * (num_image_tokens - base_tokens) / (max_tokens - base_tokens)
    shift = float(np.exp(mu)) if kind == "exponential" else float(mu)
    if not shift > 0:
        raise InvalidArgumentError(f"{num_image_tokens} tokens give the shift {shift}, which is not positive")
    return shift
