"""Distributions of t for training: functions (key, shape, path) -> t, float32, of that shape.

A path's `default_shift` (the shift of a `Flow`) is applied to what they draw. On a continuous path a draw u
in [0, 1] becomes t from `path.t_train_min` to `path.t_noisy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm.arguments import checked, number
from jaxldm.diffusion import registry
from jaxldm.diffusion.paths import A_PATH, EDM, Path
from jaxldm.errors import InvalidArgumentError, Table, one_of

TrainingTimes = Callable[[Any, tuple[int, ...], Path], Float[Array, "..."]]
# The mode density of SD3 is a density for scales up to 2 / (pi - 2) (Esser et al. 2024, section 3.1).
_LARGEST_MODE_SCALE = 2 / (np.pi - 2)


def uniform() -> TrainingTimes:
    """Every t alike: one of the T timesteps on a discrete path, else evenly."""

    def draw(key, shape, path):
        if path.num_train_timesteps is not None:
            return jax.random.randint(key, shape, 0, path.num_train_timesteps).astype(jnp.float32)
        return _shifted(path, jax.random.uniform(key, shape, jnp.float32, path.t_train_min, path.t_noisy))

    return draw


@checked(mean=number(), std=number())
def logit_normal(mean: float = 0.0, std: float = 1.0) -> TrainingTimes:
    """u = sigmoid(N(mean, std^2)) (Esser et al. 2024, SD3, equation 19).

    Raises:
        InvalidArgumentError: unless std > 0; when drawing, a discrete path.
    """
    if not std > 0:
        raise InvalidArgumentError(f"logit_normal needs std > 0, got {std}")

    def draw(key, shape, path):
        u = jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))
        return _on_path("logit_normal", path, u)

    return draw


@checked(scale=number())
def mode(scale: float = 1.29) -> TrainingTimes:
    """1 - u - scale (cos^2(pi/2 u) - 1 + u) for a uniform u (Esser et al. 2024, SD3, equation 20).

    Heavier in the middle, and above 0 at both ends.

    Raises:
        InvalidArgumentError: a scale outside [-1, 1.75]; when drawing, a discrete path.
    """
    if not -1 <= scale <= _LARGEST_MODE_SCALE:
        raise InvalidArgumentError(f"mode needs a scale in [-1, 2/(pi - 2) = 1.75], got {scale}")

    def draw(key, shape, path):
        u = jax.random.uniform(key, shape, jnp.float32)
        u = 1 - u - scale * (jnp.cos(np.pi / 2 * u) ** 2 - 1 + u)
        return _on_path("mode", path, jnp.clip(u, 0.0, 1.0))

    return draw


def cosmap() -> TrainingTimes:
    """1 - 1 / (tan(pi/2 u) + 1) for a uniform u: the cosine schedule's log-SNR (SD3, equation 21).

    Raises:
        InvalidArgumentError: when drawing, a discrete path.
    """

    def draw(key, shape, path):
        u = jax.random.uniform(key, shape, jnp.float32)
        return _on_path("cosmap", path, jnp.clip(1 - 1 / (jnp.tan(np.pi / 2 * u) + 1), 0.0, 1.0))

    return draw


@checked(mean=number(), std=number())
def log_normal(mean: float = -1.2, std: float = 1.2) -> TrainingTimes:
    """ln(sigma / alpha) ~ N(mean, std^2), EDM's (Karras et al. 2022, table 1).

    Raises:
        InvalidArgumentError: unless std > 0; when drawing, a discrete path.
    """
    if not std > 0:
        raise InvalidArgumentError(f"log_normal needs std > 0, got {std}")

    def draw(key, shape, path):
        _check_continuous("log_normal", path)
        return path.time(jnp.exp(mean + std * jax.random.normal(key, shape, jnp.float32)))

    return draw


# Name, for files and the command line -> maker.
TRAINING_TIMES: dict[str, Callable[..., TrainingTimes]] = Table("time distribution")
TRAINING_TIMES |= {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
    "log_normal": log_normal,
}


def training_times(name: str, **options: Any) -> TrainingTimes:
    """The distribution of that name. Raises `UnknownNameError`, `InvalidArgumentError`."""
    make = TRAINING_TIMES[one_of("time distribution", name, TRAINING_TIMES)]
    return registry.call("time distribution", name, make, **options)


@checked(path=A_PATH)
def default_training_times(path: Path) -> TrainingTimes:
    """EDM's log-normal distribution on an EDM path, else `uniform`."""
    return log_normal() if isinstance(path, EDM) else uniform()


def _on_path(name: str, path: Path, u: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """u in [0, 1] as t of the path, shifted."""
    _check_continuous(name, path)
    return _shifted(path, path.t_train_min + (path.t_noisy - path.t_train_min) * u)


def _check_continuous(name: str, path: Path) -> None:
    if path.num_train_timesteps is not None:
        raise InvalidArgumentError(
            f"{name} needs a continuous path, but this {path.name} path has "
            f"{path.num_train_timesteps} timesteps: use uniform"
        )


def _shifted(path: Path, t: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """t where sigma / alpha is `path.default_shift` times as large."""
    if path.default_shift == 1:
        return t
    return path.time(path.default_shift * path.sigma(t) / path.alpha(t))
