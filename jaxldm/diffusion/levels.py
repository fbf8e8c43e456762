"""Noise levels of a path, and the ways to place, shift and stretch them. NumPy float64, noisiest first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError


def noise_level(path: Path, t: Real[Any, " *shape"] | float) -> Float[Any, " *shape"]:
    """sigma / alpha, or where that would be infinite sigma / (alpha + sigma), of a continuous path.

    The second, on paths that end in pure noise, is sigma itself on the flow path: what the programs for flow
    models call sigma.
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    with np.errstate(divide="ignore"):
        return sigma / (alpha + sigma) if _bounded(path) else sigma / alpha


def time_of_level(path: Path, level: Real[Any, " *shape"] | float) -> Float[Any, " *shape"]:
    """The t of a noise level: the inverse of `noise_level`."""
    with np.errstate(divide="ignore"):
        return path.time(np.divide(level, 1 - np.asarray(level)) if _bounded(path) else level)


def _bounded(path: Path) -> bool:
    return path.num_train_timesteps is None and path.zero_terminal_snr


def times_of_levels(path: Path, levels: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The t of given noise levels.

    Raises:
        InvalidArgumentError: a level that the path does not reach.
    """
    most = noise_level(path, path.t_noisy)
    if levels.max() > most * (1 + 1e-6):
        raise InvalidArgumentError(
            f"sigmas up to {levels.max():g} are noisier than this {path.name} path, which ends at {most:g}"
        )
    return time_of_level(path, np.minimum(levels, most))


def karras_levels(first: float, last: float, count: int, rho: float = 7.0) -> Float[np.ndarray, " N"]:
    """N levels, evenly in their 1/rho-th power (Karras et al. 2022, equation 5)."""
    ramp = np.linspace(0, 1, count)
    return (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho


def exponential_levels(first: float, last: float, count: int) -> Float[np.ndarray, " N"]:
    """N levels, evenly in their logarithm."""
    return np.exp(np.log(first) + np.linspace(0, 1, count) * (np.log(last) - np.log(first)))


def beta_levels(
    first: float, last: float, count: int, shape: tuple[float, float] = (0.6, 0.6)
) -> Float[np.ndarray, " N"]:
    """N levels at the quantiles 1 - k/(N - 1) of a beta distribution."""
    return last + (first - last) * beta_quantiles(1 - np.linspace(0, 1, count), shape)


def beta_quantiles(
    probabilities: Float[np.ndarray, " *shape"], shape: tuple[float, float]
) -> Float[np.ndarray, " *shape"]:
    """Of the beta distribution of that shape (alpha, beta).

    Raises:
        InvalidArgumentError: a shape that is not positive.
    """
    if not (shape[0] > 0 and shape[1] > 0):
        raise InvalidArgumentError(f"shape must be two positive numbers, not {shape}")
    from scipy import special  # late: nothing else of the start of a program needs it

    return special.betaincinv(*shape, probabilities)


def respaced(
    path: Path,
    count: int,
    levels: Callable[[float, float, int], Any],
    ends: Float[np.ndarray, " 2"],
    name: str,
) -> Float[np.ndarray, " N"]:
    """N values of t whose noise levels fall as levels(first, last, N) says, from the first t to the last.

    Raises:
        InvalidArgumentError: the first level is infinite.
    """
    first, last = noise_level(path, np.asarray(ends))
    if not np.isfinite(first):
        raise InvalidArgumentError(
            f"spacing {name!r} needs a finite sigma / alpha, but this {path.name} path ends in pure noise "
            "(alpha = 0): use 'trailing' or 'linspace', or D.at_sigmas"
        )
    t = time_of_level(path, levels(first, last, count))
    t[-1], t[0] = ends[1], ends[0]  # powers and logarithms are off by one rounding
    return t


def shifted(path: Path, t: Float[Any, " *shape"], shift: float) -> Float[Any, " *shape"]:
    """The times at which sigma / alpha is `shift` times as large.

    Raises:
        InvalidArgumentError: a path that does not end in pure noise, or a shift that is not positive.
    """
    if not path.zero_terminal_snr:
        raise InvalidArgumentError(
            f"shift moves sigma / alpha beyond the noisy end of this {path.name} "
            "path: it needs a path that ends in pure noise, such as D.Flow()"
        )
    if not (np.isfinite(shift) and shift > 0):
        raise InvalidArgumentError(f"shift must be a positive number, not {shift}")
    with np.errstate(divide="ignore"):
        return path.time(shift * path.sigma(t) / path.alpha(t))


def stretched(path: Path, t: Float[np.ndarray, " N"], shift_terminal: float) -> Float[np.ndarray, " N"]:
    """Scales 1 - level so that the last row's level is `shift_terminal` (LTX-Video, Qwen-Image).

    Raises:
        InvalidArgumentError: another path, one step, or a number outside (0, 1).
    """
    if not _bounded(path) or not 0 < shift_terminal < 1 or t[-1] == path.t_noisy:
        raise InvalidArgumentError(
            "shift_terminal needs a path that ends in pure noise, such as D.Flow(), two steps or more and "
            f"a number in (0, 1), not {shift_terminal} and {len(t)} steps"
        )
    cleanness = 1 - noise_level(path, t)
    return time_of_level(path, 1 - cleanness * (1 - shift_terminal) / cleanness[-1])
