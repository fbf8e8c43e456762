"""Which times a grid visits: evenly in t, evenly in some power of the noise level, or from a published table.

Float64 on the host, noisiest first, without the row that `final` adds; `make_grid` puts them together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError

# Name -> which t, after Lin et al. 2023, table 2, on a discrete path of T timesteps; k = 0 ... N - 1. On a
# continuous path the same, not rounded, from `path.t_noisy` to `path.t_min`.
SPACINGS = {
    "trailing": "T - k T/N - 1, rounded: starts at the noisiest t, right for few steps",
    "leading": "k (T // N) + steps_offset: does not start at the noisiest t",
    "linspace": "N integers from T - 1 to 0; for N = 1 that is t = 0, like leading",
    "linspace_fractional": "not rounded; sigma / alpha is linear between whole t (diffusers' Euler, Heun)",
    "leading_open": "N + 1 of leading, less the cleanest (diffusers' DPM-Solver++)",
    "linspace_open": "N + 1 of linspace, less the cleanest (diffusers' DPM-Solver++)",
    "beta": "(T - 1) x the quantile 1 - k/N of Beta(0.6, 0.6), rounded: dense at both ends (Lee et al. 2024)",
    "stage_c": "19/29 of the steps in the noisiest third of t, evenly, and the others evenly (Wuerstchen)",
    "lcm": "evenly N of the original_steps times that a consistency model was distilled on (Luo et al. 2023)",
}
# sigma / alpha at the rows of ten steps, and behind them where the run ends (Sabour et al. 2024, "Align Your
# Steps", quickstart guide). Made for the paths of Stable Diffusion 1.5, SDXL and Stable Video Diffusion.
ALIGN_YOUR_STEPS = {
    "ays_sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
# Name -> how the noise level (see `noise_level`) falls between the two ends.
SIGMAS = {
    "karras": "evenly in its 1/rho-th power (Karras et al. 2022, equation 5)",
    "exponential": "evenly in its logarithm",
    "uniform_log_snr": "the same as exponential, under its name in DPM-Solver (Lu et al. 2022)",
    "beta": "at the quantiles 1 - k/(N - 1) of Beta(0.6, 0.6), as diffusers reads Lee et al. 2024",
    "ays_sd15": "Align Your Steps, the table for Stable Diffusion 1.5 (Sabour et al. 2024)",
    "ays_sdxl": "Align Your Steps, SDXL",
    "ays_svd": "Align Your Steps, Stable Video Diffusion: needs edm_path(sigma_max=700)",
}


def spaced(
    path: Path,
    count: int,
    spacing: str,
    steps_offset: int = 0,
    beta_shape: tuple[float, float] = (0.6, 0.6),
    original_steps: int = 50,
) -> np.ndarray:
    """N values of t by the named convention; see `make_grid`."""
    if spacing.endswith("_open"):
        return spaced(path, count + 1, spacing.removesuffix("_open"), steps_offset)[:-1]
    if spacing == "lcm":
        return _lcm(path, count, original_steps)
    if path.num_train_timesteps is None:
        start = max(path.t_clean, 0.0)  # an interpolant's clean row may lie a little below t = 0
        if spacing == "leading":
            return np.linspace(path.t_min, path.t_noisy, count, endpoint=False)[::-1]
        if spacing == "trailing":
            return np.linspace(path.t_noisy, start, count, endpoint=False)
        if spacing == "beta":
            return start + (path.t_noisy - start) * _beta_quantiles(1 - np.arange(count) / count, beta_shape)
        if spacing == "stage_c":
            return start + (path.t_noisy - start) * _stage_c(count)
        return np.linspace(path.t_noisy, path.t_min, count)
    total = path.num_train_timesteps
    if spacing == "leading":
        return (np.arange(count) * (total // count))[::-1].astype(np.float64) + steps_offset
    if spacing == "trailing":
        return np.round(total - total / count * np.arange(count)) - 1
    if spacing == "beta":
        return np.round((total - 1) * _beta_quantiles(1 - np.arange(count) / count, beta_shape))
    if spacing == "stage_c":
        return np.round((total - 1) * _stage_c(count))
    t = np.linspace(0, total - 1, count)[::-1]
    if spacing == "linspace":
        return np.round(t)
    whole = np.arange(total, dtype=np.float64)
    with np.errstate(divide="ignore"):
        between = path.time(np.interp(t, whole, path.sigma(whole) / path.alpha(whole)))
    return np.where(t == np.round(t), t, between)


def _beta_quantiles(probabilities: np.ndarray, shape: tuple[float, float]) -> np.ndarray:
    if not (shape[0] > 0 and shape[1] > 0):
        raise InvalidArgumentError(f"beta_shape must be two positive numbers, not {shape}")
    return special.betaincinv(*shape, probabilities)


def _stage_c(count: int) -> np.ndarray:
    """From 1 to 2/3 in 19/29 of the steps, and to 0 in the others; the 0 itself is left out."""
    noisy = max(round(count * 19 / 29), 1)
    return np.append(np.linspace(1, 2 / 3, noisy + 1)[:-1], np.linspace(2 / 3, 0, count - noisy + 1)[:-1])


def _lcm(path: Path, count: int, original_steps: int) -> np.ndarray:
    """N of the `original_steps` times that a consistency model was distilled on, evenly."""
    from jaxldm.diffusion.consistency import lcm_timesteps  # above this file: it knows denoisers

    if path.num_train_timesteps is None:
        raise InvalidArgumentError(
            f"spacing='lcm' counts timesteps, and this {path.name} path has none: use 'trailing'"
        )
    return lcm_timesteps(count, path.num_train_timesteps, original_steps).astype(np.float64)


def noise_level(path: Path, t: Any) -> Any:
    """What `sigmas` respaces: sigma / alpha, or t of the straight path where that would be infinite.

    On a continuous path that ends in pure noise it is sigma / (alpha + sigma), which on the flow path is
    sigma
    itself: what the programs for flow models call sigma.
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    with np.errstate(divide="ignore"):
        return sigma / (alpha + sigma) if _bounded(path) else sigma / alpha


def time_at_level(path: Path, level: Any) -> np.ndarray:
    """The t of a noise level: the inverse of `noise_level`."""
    with np.errstate(divide="ignore"):
        return path.time(np.divide(level, 1 - np.asarray(level)) if _bounded(path) else level)


def _bounded(path: Path) -> bool:
    return path.num_train_timesteps is None and path.zero_terminal_snr


def times_of_levels(path: Path, levels: np.ndarray) -> np.ndarray:
    """The t of given noise levels, refusing what the path does not reach."""
    most = noise_level(path, path.t_noisy)
    if levels.max() > most * (1 + 1e-6):
        raise InvalidArgumentError(
            f"sigmas up to {levels.max():g} are noisier than this {path.name} path, which ends at {most:g}"
        )
    return time_at_level(path, np.minimum(levels, most))


def respaced(
    path: Path,
    count: int,
    sigmas: str,
    t_first: float,
    t_last: float,
    rho: float = 7.0,
    beta_shape: tuple[float, float] = (0.6, 0.6),
) -> np.ndarray:
    """N values of t whose noise level falls from t_first to t_last by the named rule; see `make_grid`."""
    first, last = noise_level(path, np.array([t_first, t_last]))
    if not np.isfinite(first):
        raise InvalidArgumentError(
            f"{sigmas} sigmas need a finite sigma / alpha, but this {path.name} path ends in pure noise "
            "(alpha = 0): use spacing='trailing' or 'linspace', or give sigmas=[...] themselves"
        )
    ramp = np.linspace(0, 1, count)
    if sigmas == "karras":
        level = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    elif sigmas == "beta":
        level = last + (first - last) * _beta_quantiles(1 - ramp, beta_shape)
    else:
        level = np.exp(np.log(first) + ramp * (np.log(last) - np.log(first)))
    t = time_at_level(path, level)
    t[-1], t[0] = t_last, t_first  # powers and logarithms are off by one rounding
    return t


def align_your_steps(path: Path, count: int, name: str) -> np.ndarray:
    """N values of t from a table of `ALIGN_YOUR_STEPS`, log-linear between its rows for other N than ten."""
    table = np.log(ALIGN_YOUR_STEPS[name])
    ratio = np.exp(np.interp(np.linspace(0, len(table) - 1, count + 1), np.arange(len(table)), table))[:-1]
    with np.errstate(divide="ignore"):
        most = path.sigma(path.t_noisy) / path.alpha(path.t_noisy)
    if ratio[0] > most * 1.001:  # the tables have three decimals
        raise InvalidArgumentError(
            f"{name} starts at sigma / alpha = {ratio[0]:g}, but this {path.name} path ends at {most:g}: use "
            "the path that the table was made for, or sigmas='karras'"
        )
    return path.time(np.minimum(ratio, most))


def shifted(path: Path, t: np.ndarray, shift: float) -> np.ndarray:
    """The times at which sigma / alpha is `shift` times as large."""
    if not path.zero_terminal_snr:
        raise InvalidArgumentError(
            f"shift moves sigma / alpha beyond the noisy end of this {path.name} "
            "path: it needs a path that ends in pure noise, such as flow_path()"
        )
    if not (np.isfinite(shift) and shift > 0):
        raise InvalidArgumentError(f"shift must be a positive number, not {shift}")
    with np.errstate(divide="ignore"):
        return path.time(shift * path.sigma(t) / path.alpha(t))


def stretched(path: Path, t: np.ndarray, shift_terminal: float) -> np.ndarray:
    """Scales 1 - level so that the last row's level is `shift_terminal` (LTX-Video, Qwen-Image)."""
    if not _bounded(path) or not 0 < shift_terminal < 1 or t[-1] == path.t_noisy:
        raise InvalidArgumentError(
            "shift_terminal needs a path that ends in pure noise, such as flow_path(), two steps or more and "
            f"a number in (0, 1), not {shift_terminal} and {len(t)} steps"
        )
    cleanness = 1 - noise_level(path, t)
    return time_at_level(path, 1 - cleanness * (1 - shift_terminal) / cleanness[-1])
