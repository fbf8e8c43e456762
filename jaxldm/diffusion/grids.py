"""Grids: where a sampler stops, as plain arrays, noisiest row first.

A grid is data: cut it (image-to-image, hand-over between models), reverse it (inversion), pad it (another
number of steps without compiling again), or edit a column with `grid._replace(...)`; no solver needs to know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxldm.diffusion.paths import VP, Path
from jaxldm.diffusion.spacings import (
    ALIGN_YOUR_STEPS,
    SIGMAS,
    SPACINGS,
    align_your_steps,
    respaced,
    shifted,
    spaced,
    stretched,
    times_of_levels,
)
from jaxldm.errors import InvalidArgumentError, one_of

FINALS = ("clean", "sigma_min")


class Grid(NamedTuple):
    """Rows (t, alpha, sigma), noisiest first; N + 1 rows make N steps.

    Attributes:
        t: [N + 1], the time that the network is told.
        alpha: [N + 1].
        sigma: [N + 1]; the last row is (t_clean, 1, 0) unless the grid was made with `final="sigma_min"` or
            cut.
        num_steps: None, or in a padded grid the number of steps that count (the rows behind them are
            skipped).
        start: the number of this grid's first row in the grid it was cut from. Noise depends on it, so that
            the second part of a cut run draws the numbers that the whole run would have drawn.
    """

    t: Float[np.ndarray, " rows"]
    alpha: Float[np.ndarray, " rows"]
    sigma: Float[np.ndarray, " rows"]
    num_steps: Any = None
    start: Any = 0


def make_grid(
    path: Path,
    num_inference_steps: int | None = None,
    *,
    spacing: str | None = None,
    sigmas: str | Sequence[float] | None = None,
    final: str = "clean",
    steps_offset: int = 0,
    lambda_min: float | None = None,
    shift: float | None = None,
    timesteps: Sequence[float] | None = None,
    max_steps: int | None = None,
    rho: float = 7.0,
    beta_shape: tuple[float, float] = (0.6, 0.6),
    original_steps: int = 50,
    shift_terminal: float | None = None,
    shift_t_min_twice: bool = False,
) -> Grid:
    """The rows of a run of N steps along a path; float32 (float64 with x64), made in float64 on the host.

    Args:
        path: from `vp_path`, `edm_path`, `flow_path` and kin.
        num_inference_steps: N. May be left out where `timesteps` or a list of `sigmas` is given.
        spacing: which t, a name of `SPACINGS`, which says what each does: "trailing" (the default),
            "leading",
            "linspace", "linspace_fractional", "leading_open", "linspace_open", "beta", "stage_c", "lcm".
        sigmas: a name of `SIGMAS`, which respaces the noise level between the ends of `spacing` (the whole
            path when none is named): "karras" (the default on an EDM path), "exponential", "uniform_log_snr",
            "beta"; a table, "ays_sd15", "ays_sdxl", "ays_svd"; or the levels themselves, noisiest first. The
            level is sigma / alpha, or sigma itself on a flow path: see `spacings.noise_level`.
        final: "clean" adds the row alpha = 1, sigma = 0 behind N rows; "sigma_min" ends at `path.t_min`,
            which is never repeated (a repeated row is a wasted step).
        steps_offset: added to "leading" timesteps (1 in Stable Diffusion).
        lambda_min: `spacing` spreads over the t whose log(alpha / sigma) is at least this, on a discrete
            path: cosine betas end in noise that fast solvers should not start from (diffusers' DPM-Solver++).
        shift: multiplies sigma / alpha, before `sigmas` respaces; on the flow path this is t' = shift t / (1
            + (shift - 1) t) (SD3). None: `path.default_shift`, and no shift where the rows are given.
        timesteps: the values of t themselves, noisiest first, N of them.
        max_steps: pad to this many steps, so that any N up to it runs in one compiled `sample`.
        rho: of "karras".
        beta_shape: (alpha, beta) of the beta distribution.
        original_steps: of "lcm".
        shift_terminal: stretch the shifted levels so that row N has this one (LTX-Video, Qwen-Image).
        shift_t_min_twice: as diffusers' flow schedulers and Stability's SD3.5 code do with the last row of
            "linspace": for parity alone.

    Raises:
        InvalidArgumentError: 0 steps, more steps than the path has, rows that are not finite or not strictly
            falling in noise, options that exclude each other.
        UnknownNameError: a spacing, sigmas or final that does not exist.

    >>> from jaxldm import diffusion as D
    >>> D.make_grid(D.flow_path(), 4).t
    array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    one_of("final", final, FINALS)
    t = _given_rows(path, num_inference_steps, spacing, sigmas, timesteps)
    if t is not None:
        t = t if shift is None else shifted(path, t, shift)
    else:
        sigmas = path.default_sigmas if sigmas is None and spacing is None else sigmas
        _check_names(path, num_inference_steps, spacing, sigmas, shift)
        factor = path.default_shift if shift is None else shift
        start = _with_shifted_t_min(path, factor) if shift_t_min_twice else path
        start = start if lambda_min is None else _without_noisiest(start, lambda_min)

        def times(count):
            if sigmas in ALIGN_YOUR_STEPS:
                return align_your_steps(path, count, sigmas)
            if spacing is None and sigmas is not None:
                t = np.array([start.t_noisy, start.t_min])
            elif lambda_min is not None and spacing in ("trailing", None):
                # Steps as long as on the whole path, so that it may be one or two fewer.
                t = np.round(start.num_train_timesteps - path.num_train_timesteps / count * np.arange(count))
                t = t[t >= 1] - 1
            else:
                t = spaced(start, count, spacing or "trailing", steps_offset, beta_shape, original_steps)
            t = t if shift is None and factor == 1 else shifted(path, t, factor)
            t = t if shift_terminal is None else stretched(path, t, shift_terminal)
            return t if sigmas is None else respaced(path, count, sigmas, t[0], t[-1], rho, beta_shape)

        t = times(num_inference_steps)
        # A grid that stops at t_min takes it as row N + 1, rather than visiting it twice.
        t = times(num_inference_steps + 1) if final == "sigma_min" and t[-1] == path.t_min else t
    if final == "clean":
        t = np.append(t, path.t_clean)
    elif t[-1] != path.t_min:
        t = np.append(t, path.t_min)
    _check_times(path, t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    grid = Grid(t.astype(dtype), alpha.astype(dtype), sigma.astype(dtype))
    return grid if max_steps is None else pad(grid, max_steps)


def _given_rows(path, count, spacing, sigmas, timesteps) -> np.ndarray | None:
    """The t of rows that the caller wrote down, float64, or None."""
    given = sigmas if sigmas is not None and not isinstance(sigmas, str) else None
    if timesteps is not None and (sigmas is not None or spacing is not None):
        raise InvalidArgumentError("timesteps=[...] says everything: leave out spacing and sigmas")
    if given is not None and spacing is not None:
        raise InvalidArgumentError("sigmas=[...] says everything: leave out spacing, or name 'karras'")
    values = timesteps if timesteps is not None else given
    if values is None:
        return None
    values = np.asarray(values, np.float64).reshape(-1)
    if count not in (None, len(values)):
        raise InvalidArgumentError(f"num_inference_steps={count}, but {len(values)} values were given")
    _check_count(path, len(values))
    return values if timesteps is not None else times_of_levels(path, values)


def _check_names(path, count, spacing, sigmas, shift) -> None:
    if count is None:
        raise InvalidArgumentError("give num_inference_steps, timesteps=[...] or sigmas=[...]")
    if spacing is not None:
        one_of("spacing", spacing, SPACINGS)
    if sigmas is not None:
        one_of("sigmas", sigmas, SIGMAS)
    _check_count(path, count)
    if sigmas in ALIGN_YOUR_STEPS and (spacing is not None or shift is not None):
        raise InvalidArgumentError(f"{sigmas} is a whole table: leave out spacing and shift")


def _check_count(path: Path, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise InvalidArgumentError(f"num_inference_steps must be a whole number of at least 1, not {count!r}")
    if path.num_train_timesteps is not None and count > path.num_train_timesteps:
        raise InvalidArgumentError(
            f"num_inference_steps={count} is more than the {path.num_train_timesteps} "
            "timesteps of this path: ask for that many or fewer"
        )


def _with_shifted_t_min(path: Path, shift: float) -> Path:
    return dataclasses.replace(path, t_min=float(shifted(path, np.float64(path.t_min), shift)))


def _without_noisiest(path: Path, lambda_min: float) -> Path:
    if path.num_train_timesteps is None:
        raise InvalidArgumentError(f"lambda_min counts timesteps, and this {path.name} path has none")
    t = np.arange(path.num_train_timesteps, dtype=np.float64)
    with np.errstate(divide="ignore"):
        kept = int((np.log(path.alpha(t) / path.sigma(t)) >= lambda_min).sum())
    if kept < 1:
        raise InvalidArgumentError(f"lambda_min {lambda_min} leaves no timestep of this {path.name} path")
    return VP(path.betas[:kept])


def _check_times(path: Path, t: np.ndarray) -> None:
    if not np.isfinite(t).all():
        raise InvalidArgumentError("the grid holds times that are not finite (NaN or infinity)")
    if t.max() > path.t_noisy or t.min() < path.t_clean:
        raise InvalidArgumentError(
            f"the grid leaves the {path.name} path: its times run from {t.max():g} to "
            f"{t.min():g}, the path's from {path.t_noisy:g} to {path.t_clean:g}"
        )
    if not (np.diff(t) < 0).all():
        raise InvalidArgumentError(
            "the grid must fall strictly, from the noisiest row to the cleanest, with "
            f"no row twice; its times: {np.array2string(t, precision=4, threshold=9)}. Fewer steps, "
            "or another spacing, keep the rows apart"
        )


def pad(grid: Grid, max_steps: int) -> Grid:
    """Repeats the last row until the grid has `max_steps` steps; `sample` skips the repeated rows.

    Grids padded to one length have one shape, so that a compiled `sample` serves every number of steps.

    Raises:
        InvalidArgumentError: the grid has more steps already, or is padded already.
    """
    steps = len(grid.t) - 1
    if grid.num_steps is not None:
        raise InvalidArgumentError("this grid is padded already: pad once, after cutting")
    if steps > max_steps:
        raise InvalidArgumentError(f"a grid of {steps} steps does not fit into max_steps={max_steps}")
    columns = [np.pad(column, (0, max_steps - steps), mode="edge") for column in grid[:3]]
    return Grid(*columns, num_steps=np.int32(steps), start=grid.start)


def cut(grid: Grid, first: int = 0, last: int | None = None) -> Grid:
    """Rows `first` to `last`, both included. Sampling one part and then the next equals sampling the whole.

    `cut(grid, 0, k)` stops early, `cut(grid, k)` goes on from there or starts image-to-image at row k.

    Raises:
        InvalidArgumentError: fewer than two rows are left, rows that are not there, or a padded grid.
    """
    if grid.num_steps is not None:
        raise InvalidArgumentError("cut the grid before padding it")
    last = len(grid.t) - 1 if last is None else last
    if not 0 <= first < last < len(grid.t):
        raise InvalidArgumentError(f"cannot cut rows {first} to {last} out of rows 0 to {len(grid.t) - 1}")
    return Grid(*(column[first : last + 1] for column in grid[:3]), start=grid.start + first)


def reverse(grid: Grid) -> Grid:
    """The grid from its cleanest row to its noisiest: DDIM inversion. Make it with `final="sigma_min"`.

    At the clean row the noise in an image cannot be seen, so inversion should start at `sigma_min`.
    """
    if grid.num_steps is not None:
        raise InvalidArgumentError("reverse the grid before padding it")
    return Grid(*(column[::-1] for column in grid[:3]))


def steps_in(grid: Grid) -> Any:
    """The number of steps that count, N: an int, or an int32 scalar of a padded grid."""
    return grid.t.shape[0] - 1 if grid.num_steps is None else grid.num_steps
