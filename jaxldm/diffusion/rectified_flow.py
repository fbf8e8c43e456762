"""Rectified flow: the straight path, the times it is trained on, and the shift that suits large images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError, one_of

TIME_DISTRIBUTIONS = ("uniform", "logit_normal", "mode", "cosmap")
# The mode density of SD3 is a density for scales up to 2 / (pi - 2) (Esser et al. 2024, section 3.1).
_LARGEST_MODE_SCALE = 2 / (np.pi - 2)


def flow_path(
    t_min: float = 1e-3,
    time_distribution: str = "uniform",
    *,
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Path:
    """The straight path of rectified flow: alpha = 1 - t, sigma = t, t in [0, 1] (Liu et al. 2022).

    Args:
        t_min: the cleanest t of `linspace` spacing and of grids with `final="sigma_min"`.
        time_distribution: of training, see `draw_time`.
        shift: t' = shift t / (1 + (shift - 1) t), on the training's draws and on grids that ask for no other:
            3 in SD3, `resolution_shift(tokens)` in FLUX. The network is told the shifted t.
        logit_mean, logit_std: of "logit_normal".
        mode_scale: s of "mode", in [-1, 1.75].

    Raises:
        InvalidArgumentError: unless 0 < t_min < 1, shift > 0, logit_std > 0 and mode_scale is in its range.
        UnknownNameError: another time distribution.
    """
    check_time_distribution(time_distribution, logit_std, mode_scale)
    if not 0 < t_min < 1:
        raise InvalidArgumentError(f"flow_path needs 0 < t_min < 1, not {t_min}")
    if not 0 < shift < np.inf:
        raise InvalidArgumentError(f"shift must be a positive number, not {shift}")

    def coefficients(xp, t):
        return 1 - t, t

    def draw(key, shape):
        t = draw_time(key, shape, time_distribution, logit_mean, logit_std, mode_scale)
        return shift * t / (1 + (shift - 1) * t)

    return Path(
        "flow", 0.0, float(t_min), 1.0, None, None, coefficients, flow_time, draw, default_shift=float(shift)
    )


def flow_time(xp: Any, ratio: Any) -> Any:
    """The t of a sigma / alpha on the straight path, in [0, 1]: ratio / (1 + ratio)."""
    with np.errstate(divide="ignore", over="ignore"):
        return 1 / (1 + 1 / ratio)  # finite at 0 and at infinity, where ratio / (1 + ratio) is not


def check_time_distribution(name: str, logit_std: float = 1.0, mode_scale: float = 1.29) -> None:
    """Raises `UnknownNameError` or `InvalidArgumentError` unless `draw_time` can draw."""
    one_of("time distribution", name, TIME_DISTRIBUTIONS)
    if not logit_std > 0:
        raise InvalidArgumentError(f"logit_std must be positive, not {logit_std}")
    if not -1 <= mode_scale <= _LARGEST_MODE_SCALE:
        raise InvalidArgumentError(f"mode_scale must lie in [-1, 2/(pi - 2) = 1.75], not {mode_scale}")


def draw_time(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    distribution: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Float[Array, "*shape"]:
    """t in [0, 1] for training, float32 (Esser et al. 2024, SD3, section 3.1).

    With u uniform: "uniform" u; "logit_normal" sigmoid(N(mean, std^2)) (equation 19); "mode"
    1 - u - s (cos^2(pi/2 u) - 1 + u), heavier in the middle and above 0 at both ends (equation 20); "cosmap"
    1 - 1 / (tan(pi/2 u) + 1), the cosine schedule's log-SNR (equation 21).
    """
    if distribution == "logit_normal":
        return jax.nn.sigmoid(logit_mean + logit_std * jax.random.normal(key, shape, jnp.float32))
    u = jax.random.uniform(key, shape, jnp.float32)
    if distribution == "mode":
        return jnp.clip(1 - u - mode_scale * (jnp.cos(np.pi / 2 * u) ** 2 - 1 + u), 0.0, 1.0)
    if distribution == "cosmap":
        return jnp.clip(1 - 1 / (jnp.tan(np.pi / 2 * u) + 1), 0.0, 1.0)
    return u


def resolution_shift(
    num_image_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    kind: str = "exponential",
) -> float:
    """FLUX's shift for an image of so many tokens, for `make_grid(..., shift=...)`: e^mu.

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
            f"resolution_shift needs at least 1 token and two different ends, not {num_image_tokens} tokens "
            f"between {base_tokens} and {max_tokens}"
        )
    mu = base_shift + (max_shift - base_shift) * (num_image_tokens - base_tokens) / (max_tokens - base_tokens)
    shift = float(np.exp(mu)) if kind == "exponential" else float(mu)
    if not shift > 0:
        raise InvalidArgumentError(f"{num_image_tokens} tokens give the shift {shift}, which is not positive")
    return shift
