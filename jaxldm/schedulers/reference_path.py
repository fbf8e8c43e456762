"""The discrete path in the float32 of diffusers, digit by digit, and the times that the network gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from jaxldm import diffusion as D
from jaxldm.diffusion import levels
from jaxldm.schedulers.grids import GridRule

# In place of a last cumulative alpha of 0, where a scheduler divides by it.
_SMALLEST = 2.0**-24
DIVIDES_BY_ALPHA = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)


def reference_path(path: D.VP, scheduler: str, config: Mapping[str, Any]) -> D.VP:
    """The path whose cumulative alphas are the float32 numbers of a scheduler of diffusers.

    Args:
        path: of the same betas, in float64.
        scheduler: its class.
        config: of the file.
    """
    cumulative = alphas_cumprod_of(path, config).astype(np.float64)
    if path.zero_terminal_snr and scheduler in DIVIDES_BY_ALPHA:
        cumulative[-1] = _SMALLEST
        # A path falls: the few before that are less are raised above it, where no grid but a full one looks.
        least = _SMALLEST * (1 + 1e-6 * np.arange(len(cumulative))[::-1])
        cumulative = np.maximum(cumulative, least)
    before = np.append(1.0, cumulative[:-1])
    return D.VP(cast(Any, 1 - cumulative / before))


def alphas_cumprod_of(path: D.VP, config: Mapping[str, Any]) -> Float[np.ndarray, " T"]:
    """float32 [T]: products in float64 of 1 - beta in float32, rounded."""
    names, schedule = ("linear", "scaled_linear"), path.schedule
    given = config.get("trained_betas") is not None
    if schedule is None or given or schedule.name not in names or path.zero_terminal_snr:
        betas = np.asarray(path.betas, np.float32)
    else:
        start, end = schedule.ends().values()
        power = 2 if schedule.name == "scaled_linear" else 1
        betas = linspace(start ** (1 / power), end ** (1 / power), len(path.betas)) ** power
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def linspace(first: float, last: float, count: int) -> Float[np.ndarray, " T"]:
    """float32, from either end to the middle, each number rounded once."""
    ends, k = np.asarray((first, last), np.float32), np.arange(count, dtype=np.float64)
    step = (ends[1] - ends[0]) / np.float32(max(count - 1, 1))
    low, high = ends[0] + step.astype(np.float64) * k, ends[1] - step.astype(np.float64) * (count - 1 - k)
    return np.where(k < count // 2, low, high).astype(np.float32)


def rounded_times(path: D.VP, grid: GridRule, count: int, rounding: str) -> Float[np.ndarray, " N"]:
    """What the network gets at N noise levels: the timestep, "round"-ed or cut off ("floor").

    The digits matter: whether the noisiest level gets 999 or 998 is decided by the last of float32.

    Args:
        path: from `reference_path`.
        grid: the rule of the levels.
        count: N.
        rounding: the name of a function of NumPy.
    """
    cumulative = np.cumprod(1 - np.asarray(path.betas)).astype(np.float32)
    sigmas = np.sqrt((1 - cumulative) / cumulative)
    logs = np.log(sigmas)
    rule = grid.levels
    first, last = grid.level_max or float(sigmas[-1]), grid.level_min or float(sigmas[0])
    if rule == "karras":
        noise = levels.karras_levels(first, last, count)
    elif rule == "beta":
        noise = levels.beta_levels(first, last, count)
    elif rule == "uniform_log_snr":
        noise = np.exp(np.linspace(float(logs[-1]), float(logs[0]), count))
    else:
        noise = np.exp(np.linspace(np.log(first), np.log(last), count))
    t = np.interp(np.log(noise), logs.astype(np.float64), np.arange(len(logs)))
    return getattr(np, rounding)(t)
