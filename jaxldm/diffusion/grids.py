"""Grids: where a sampler stops, as plain arrays, noisiest row first.

A grid is data: cut it (image-to-image, hand-over between models), reverse it (inversion), pad it (another
number of steps without compiling again), or edit a column with `grid._replace(...)`; no solver needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError, one_of

SPACINGS = ("leading", "trailing", "linspace", "linspace_fractional", "leading_open", "linspace_open")
SIGMAS = ("karras", "exponential")
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
    shift: float | None = None,
    timesteps: Sequence[float] | None = None,
    rho: float = 7.0,
    max_steps: int | None = None,
) -> Grid:
    """The rows of a run of N steps along a path; float32 (float64 with x64), made in float64 on the host.

    Args:
        path: from `vp_path`, `edm_path` or `flow_path`.
        num_inference_steps: N. May be left out where `timesteps` or a list of `sigmas` is given.
        spacing: which t, after Lin et al. 2023, table 2. On a discrete path of T timesteps:
            "trailing" (the default): T - k T/N - 1, rounded. Starts at the noisiest t: right for few steps.
            "leading": k (T // N) + steps_offset. Does not start at the noisiest t.
            "linspace": N integers from T - 1 to 0. Beware: for N = 1 it is t = 0, like "leading".
            "linspace_fractional": not rounded; sigma / alpha linear between whole t (diffusers' Euler, Heun).
            "leading_open", "linspace_open": N + 1 of them, less the cleanest (diffusers' DPM-Solver++).
            On a continuous path the same, not rounded, from `path.t_noisy` to `path.t_min`.
        sigmas: how to respace sigma / alpha between the ends that `spacing` names (the whole path when it
            names none): "karras" (Karras et al. 2022, equation 5, with `rho`), "exponential" (evenly in log),
            or the values themselves, noisiest first. None: evenly in t, but Karras on an EDM path.
        final: "clean" adds the row alpha = 1, sigma = 0 behind N rows; "sigma_min" ends at `path.t_min`,
            which is never repeated (a repeated row is a wasted step).
        steps_offset: added to "leading" timesteps (1 in Stable Diffusion).
        shift: multiplies sigma / alpha; on the flow path this is t' = shift t / (1 + (shift - 1) t) (SD3).
        timesteps: the values of t themselves, noisiest first, N of them.
        max_steps: pad to this many steps, so that any N up to it runs in one compiled `sample`.

    Raises:
        InvalidArgumentError: 0 steps, more steps than the path has, rows that are not finite or not strictly
            falling in noise, options that exclude each other.
        UnknownNameError: a spacing, sigmas or final that does not exist.

    >>> from jaxldm import diffusion as D
    >>> D.make_grid(D.flow_path(), 4).t
    array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    one_of("final", final, FINALS)
    t = _choose_times(path, num_inference_steps, spacing, sigmas, final, steps_offset, timesteps, rho)
    if shift is not None:
        t = _shifted(path, t, shift)
    if final == "clean":
        t = np.append(t, path.t_clean)
    elif t[-1] != path.t_min:
        t = np.append(t, path.t_min)
    _check_times(path, t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    grid = Grid(t.astype(dtype), alpha.astype(dtype), sigma.astype(dtype))
    return grid if max_steps is None else pad(grid, max_steps)


def _choose_times(path, count, spacing, sigmas, final, steps_offset, timesteps, rho) -> np.ndarray:
    """The rows' t, float64, noisiest first, without the row that `final` adds."""
    given = sigmas if sigmas is not None and not isinstance(sigmas, str) else None
    if timesteps is not None and (sigmas is not None or spacing is not None):
        raise InvalidArgumentError("timesteps=[...] says everything: leave out spacing and sigmas")
    if given is not None and spacing is not None:
        raise InvalidArgumentError("sigmas=[...] says everything: leave out spacing, or name 'karras'")
    values = timesteps if timesteps is not None else given
    if values is not None:
        values = np.asarray(values, np.float64).reshape(-1)
        count = len(values) if count is None else count
        if count != len(values):
            raise InvalidArgumentError(f"num_inference_steps={count}, but {len(values)} values were given")
        _check_count(path, count)
        return values if timesteps is not None else _times_of_sigmas(path, values)
    if count is None:
        raise InvalidArgumentError("give num_inference_steps, timesteps=[...] or sigmas=[...]")
    if spacing is not None:
        one_of("spacing", spacing, SPACINGS)
    if isinstance(sigmas, str):
        one_of("sigmas", sigmas, SIGMAS)
    _check_count(path, count)
    respaced = sigmas if spacing is not None else sigmas or path.default_sigmas

    def times(count):
        if respaced is None:
            return _spaced(path, count, spacing or "trailing", steps_offset)
        ends = _spaced(path, count, spacing, steps_offset) if spacing else (path.t_noisy, path.t_min)
        return _respaced(path, count, respaced, ends[0], ends[-1], rho)

    t = times(count)
    # A grid that stops at t_min takes it as row N + 1, rather than visiting it twice.
    return times(count + 1) if final == "sigma_min" and t[-1] == path.t_min else t


def _times_of_sigmas(path: Path, sigmas: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        most = path.sigma(path.t_noisy) / path.alpha(path.t_noisy)
    if sigmas.max() > most * (1 + 1e-6):
        raise InvalidArgumentError(
            f"sigmas up to {sigmas.max():g} are noisier than this {path.name} path, which ends at {most:g}"
        )
    return path.time(sigmas)


def _check_count(path: Path, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise InvalidArgumentError(f"num_inference_steps must be a whole number of at least 1, not {count!r}")
    if path.num_train_timesteps is not None and count > path.num_train_timesteps:
        raise InvalidArgumentError(
            f"num_inference_steps={count} is more than the {path.num_train_timesteps} "
            "timesteps of this path: ask for that many or fewer"
        )


def _spaced(path: Path, count: int, spacing: str, steps_offset: int) -> np.ndarray:
    """N values of t, float64, noisiest first, by the named convention."""
    if spacing.endswith("_open"):
        return _spaced(path, count + 1, spacing.removesuffix("_open"), steps_offset)[:-1]
    if path.num_train_timesteps is None:
        if spacing == "leading":
            return np.linspace(path.t_min, path.t_noisy, count, endpoint=False)[::-1]
        if spacing == "trailing":
            return np.linspace(path.t_noisy, path.t_clean, count, endpoint=False)
        return np.linspace(path.t_noisy, path.t_min, count)
    total = path.num_train_timesteps
    if spacing == "leading":
        return (np.arange(count) * (total // count))[::-1].astype(np.float64) + steps_offset
    if spacing == "trailing":
        return np.round(total - total / count * np.arange(count)) - 1
    t = np.linspace(0, total - 1, count)[::-1]
    if spacing == "linspace":
        return np.round(t)
    whole = np.arange(total, dtype=np.float64)
    with np.errstate(divide="ignore"):
        between = path.time(np.interp(t, whole, path.sigma(whole) / path.alpha(whole)))
    return np.where(t == np.round(t), t, between)


def _respaced(path: Path, count: int, sigmas: str, t_first: float, t_last: float, rho: float) -> np.ndarray:
    """N values of t whose sigma / alpha falls evenly, in its 1/rho-th power or its log, between two t."""
    ends = np.array([t_first, t_last])
    with np.errstate(divide="ignore"):
        first, last = path.sigma(ends) / path.alpha(ends)
    if not np.isfinite(first):
        raise InvalidArgumentError(
            f"{sigmas} sigmas need a finite sigma / alpha, but this {path.name} path "
            "ends in pure noise (alpha = 0): use spacing='trailing' or 'linspace'"
        )
    ramp = np.linspace(0, 1, count)
    if sigmas == "karras":
        ratio = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    else:
        ratio = np.exp(np.log(first) + ramp * (np.log(last) - np.log(first)))
    t = path.time(ratio)
    t[-1], t[0] = t_last, t_first  # powers and logarithms are off by one rounding
    return t


def _shifted(path: Path, t: np.ndarray, shift: float) -> np.ndarray:
    if not path.zero_terminal_snr:
        raise InvalidArgumentError(
            f"shift moves sigma / alpha beyond the noisy end of this {path.name} "
            "path: it needs a path that ends in pure noise, such as flow_path()"
        )
    if not (np.isfinite(shift) and shift > 0):
        raise InvalidArgumentError(f"shift must be a positive number, not {shift}")
    with np.errstate(divide="ignore"):
        return path.time(shift * path.sigma(t) / path.alpha(t))


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
            f"no row twice; its times: {np.array2string(t, precision=4, threshold=9)}"
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
