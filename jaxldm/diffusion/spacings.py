"""Spacings: which rows a grid has, one function each, and the table of them by name.

Every function takes a path and the number of steps N, and gives a `Grid` of N + 1 rows in float32 (float64
with x64), made in float64 on the host. Keywords of all of them:

    final: "clean" adds the row alpha = 1, sigma = 0 behind N rows; "sigma_min" ends at `path.t_min`, which is
        never repeated (a repeated row is a wasted step).
    shift: multiplies sigma / alpha, before levels are placed; on the flow path this is t' = shift t / (1 +
        (shift - 1) t) (SD3). None: `path.default_shift`. Only paths that end in pure noise can be shifted.

They raise `InvalidArgumentError` for fewer steps than 1 or more than the path has, a shift that the path
cannot have, and rows that do not fall strictly; `UnknownNameError` for another final.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float, Real

from jaxldm.arguments import array, checked, choice, count, function, number, optional, refuse, several
from jaxldm.diffusion import registry
from jaxldm.diffusion.distilled_times import lcm_times
from jaxldm.diffusion.grids import FINALS, Grid, check_count, grid_of_times
from jaxldm.diffusion.levels import (
    beta_levels,
    beta_quantiles,
    exponential_levels,
    karras_levels,
    respaced,
    shifted,
    stretched,
    times_of_levels,
)
from jaxldm.diffusion.paths import A_PATH, Path
from jaxldm.errors import InvalidArgumentError, Table, one_of, shown
from jaxldm.exact import LARGEST_FLOAT32, MAX_STEPS

# sigma / alpha at the rows of ten steps, and behind them where the run ends (Sabour et al. 2024, "Align Your
# Steps", quickstart guide). Made for the paths of Stable Diffusion 1.5, SDXL and Stable Video Diffusion.
ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


SHIFT, FINAL = optional(number(above=0)), choice("final", FINALS)


def A_BETA(name: str, value: Any) -> tuple[float, ...]:
    """(alpha, beta) of a beta distribution."""
    pair = several(number())(name, value)
    if len(pair) != 2 or min(pair) <= 0:
        raise refuse(name, "two positive numbers", value)
    return pair


class Span(NamedTuple):
    """The range of t that a spacing places its rows in.

    Attributes:
        total: T of a discrete path, whose t are 0 to T - 1; None of a continuous one.
        t_noisy: the noisiest t.
        t_min: the cleanest t that a network is trained on.
        t_clean: the data; on an interpolant it may lie a little below 0, and 0 is used.
    """

    total: int | None
    t_noisy: float
    t_min: float
    t_clean: float


def span_of(path: Path) -> Span:
    """The whole range of a path."""
    return Span(path.num_train_timesteps, path.t_noisy, path.t_min, max(path.t_clean, 0.0))


@checked(path=A_PATH, shift=SHIFT, final=FINAL, shift_terminal=optional(number()))
def trailing(
    path: Path,
    num_inference_steps: int,
    *,
    shift: float | None = None,
    shift_terminal: float | None = None,
    final: str = "clean",
) -> Grid:
    """T - k T/N - 1, rounded: starts at the noisiest t, right for few steps (Lin et al. 2023, table 2).

    On a continuous path N even values from `t_noisy` on, the clean end left out.

    Args:
        shift_terminal: stretch the shifted levels so that row N has this one (LTX-Video, Qwen-Image).

    >>> from jaxldm import diffusion as D
    >>> D.trailing(D.Flow(), 4).t
    array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    times = functools.partial(trailing_times, span_of(path))
    return make(path, num_inference_steps, times, shift, final, shift_terminal)


@checked(path=A_PATH, shift=SHIFT, final=FINAL, offset=count(0))
def leading(
    path: Path, num_inference_steps: int, *, offset: int = 0, shift: float | None = None, final: str = "clean"
) -> Grid:
    """k (T // N) + offset: does not start at the noisiest t (Lin et al. 2023, table 2).

    Args:
        offset: 1 in Stable Diffusion. Of a discrete path.
    """
    times = functools.partial(leading_times, span_of(path), offset=offset)
    return make(path, num_inference_steps, times, shift, final)


@checked(path=A_PATH, shift=SHIFT, final=FINAL, shift_terminal=optional(number()))
def linspace(
    path: Path,
    num_inference_steps: int,
    *,
    shift: float | None = None,
    shift_terminal: float | None = None,
    final: str = "clean",
) -> Grid:
    """N integers from T - 1 to 0 (for N = 1 that is 0, as `leading`); N values from t_noisy to t_min.

    Args:
        shift_terminal: see `trailing`.
    """
    times = functools.partial(linspace_times, span_of(path))
    return make(path, num_inference_steps, times, shift, final, shift_terminal)


@checked(path=A_PATH, shift=SHIFT, final=FINAL)
def linspace_fractional(
    path: Path, num_inference_steps: int, *, shift: float | None = None, final: str = "clean"
) -> Grid:
    """`linspace`, not rounded; sigma / alpha is linear between whole t (k-diffusion; diffusers' Euler)."""
    return make(path, num_inference_steps, functools.partial(fractional_times, path), shift, final)


@checked(path=A_PATH, shift=SHIFT, final=FINAL, shape=A_BETA)
def beta(
    path: Path,
    num_inference_steps: int,
    *,
    shape: tuple[float, float] = (0.6, 0.6),
    shift: float | None = None,
    final: str = "clean",
) -> Grid:
    """(T - 1) x the quantile 1 - k/N of a beta distribution, rounded: dense at both ends (Lee et al. 2024).

    Args:
        shape: (alpha, beta) of the distribution, both positive.
    """

    def times(count):
        return _of_fractions(span_of(path), beta_quantiles(1 - np.arange(count) / count, shape))

    return make(path, num_inference_steps, times, shift, final)


@checked(path=A_PATH, shift=SHIFT, final=FINAL)
def stage_c(
    path: Path, num_inference_steps: int, *, shift: float | None = None, final: str = "clean"
) -> Grid:
    """19/29 of the steps in the noisiest third of t, evenly, and the others evenly (Wuerstchen's prior)."""

    def times(count):
        noisy = max(round(count * 19 / 29), 1)
        first, rest = np.linspace(1, 2 / 3, noisy + 1), np.linspace(2 / 3, 0, count - noisy + 1)
        return _of_fractions(span_of(path), np.append(first[:-1], rest[:-1]))

    return make(path, num_inference_steps, times, shift, final)


@checked(path=A_PATH, original_steps=count(1, MAX_STEPS), final=FINAL)
def lcm(path: Path, num_inference_steps: int, *, original_steps: int = 50, final: str = "clean") -> Grid:
    """N of the `original_steps` times that a consistency model was distilled on, evenly (Luo et al. 2023).

    Args:
        path: a discrete one.
        original_steps: how many timesteps the distillation used.
    """
    times = functools.partial(lcm_times, path, original_steps=original_steps)
    return make(path, num_inference_steps, times, None, final)


@checked(path=A_PATH, shift=SHIFT, final=FINAL, rho=number(above=0))
def karras(
    path: Path,
    num_inference_steps: int,
    *,
    rho: float = 7.0,
    shift: float | None = None,
    final: str = "clean",
) -> Grid:
    """The noise level falls evenly in its 1/rho-th power (Karras et al. 2022, equation 5).

    The level is sigma / alpha, or sigma / (alpha + sigma) on continuous paths that end in pure noise.
    """
    levels = functools.partial(karras_levels, rho=rho)
    return make(path, num_inference_steps, _over_levels(path, levels, shift, "karras"), 1.0, final)


@checked(path=A_PATH, shift=SHIFT, final=FINAL)
def exponential(
    path: Path, num_inference_steps: int, *, shift: float | None = None, final: str = "clean"
) -> Grid:
    """The noise level (see `karras`) falls evenly in its logarithm: evenly in log-SNR."""
    times = _over_levels(path, exponential_levels, shift, "exponential")
    return make(path, num_inference_steps, times, 1.0, final)


@checked(path=A_PATH, shift=SHIFT, final=FINAL, shape=A_BETA)
def beta_sigmas(
    path: Path,
    num_inference_steps: int,
    *,
    shape: tuple[float, float] = (0.6, 0.6),
    shift: float | None = None,
    final: str = "clean",
) -> Grid:
    """The noise level (see `karras`) at the quantiles of a beta distribution, as diffusers reads Lee et al.

    Args:
        shape: (alpha, beta) of the distribution, both positive.
    """
    levels = functools.partial(beta_levels, shape=shape)
    return make(path, num_inference_steps, _over_levels(path, levels, shift, "beta_sigmas"), 1.0, final)


@checked(path=A_PATH, final=FINAL)
def align_your_steps(
    path: Path, num_inference_steps: int, *, table: str = "sd15", final: str = "clean"
) -> Grid:
    """Align Your Steps (Sabour et al. 2024), log-linear between the rows of its table for other N than ten.

    Args:
        table: "sd15", "sdxl" or "svd", the model that it was made for; "svd" needs D.EDM(sigma_max=700).

    Raises:
        UnknownNameError: another table.
        InvalidArgumentError: the table starts noisier than the path.
    """
    one_of("table", table, ALIGN_YOUR_STEPS)
    times = functools.partial(align_your_steps_times, path, table=table)
    return make(path, num_inference_steps, times, 1.0, final)


@checked(t=array("real", "[N]", axes=1), path=A_PATH, shift=SHIFT, final=FINAL)
def at_times(
    path: Path,
    t: Sequence[float] | Real[ArrayLike, " ..."],
    *,
    shift: float | None = None,
    final: str = "clean",
) -> Grid:
    """The rows at the values of t themselves, noisiest first.

    Args:
        shift: none unless given, whatever the path's own.

    >>> from jaxldm import diffusion as D
    >>> D.at_times(D.Flow(), [1.0, 0.6]).sigma
    array([1. , 0.6, 0. ], dtype=float32)
    """
    times = np.asarray(t, np.float64).reshape(-1)
    check_count(path, len(times))
    return grid_of_times(path, times if shift is None else shifted(path, times, shift), final)


@checked(sigmas=array("real", "[N]", axes=1), path=A_PATH, shift=SHIFT, final=FINAL)
def at_sigmas(
    path: Path,
    sigmas: Sequence[float] | Real[ArrayLike, " ..."],
    *,
    shift: float | None = None,
    final: str = "clean",
) -> Grid:
    """The rows at given noise levels, noisiest first: sigma / alpha, or sigma itself on a flow path.

    Args:
        sigmas: see `levels.noise_level`.
        shift: none unless given, whatever the path's own.

    Raises:
        InvalidArgumentError: a level noisier than the path.
    """
    noise_levels = np.asarray(sigmas, np.float64).reshape(-1)
    check_count(path, len(noise_levels))
    t = times_of_levels(path, noise_levels)
    return grid_of_times(path, t if shift is None else shifted(path, t, shift), final)


def _with_table(table: str) -> Callable[..., Grid]:
    made = functools.partial(align_your_steps, table=table)
    made.__doc__ = f"Align Your Steps, the table {table!r} (Sabour et al. 2024)."
    return made


# Name -> the function; those of Align Your Steps with their table.
SPACINGS: dict[str, Callable[..., Grid]] = Table("spacing")
SPACINGS |= {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "linspace_fractional": linspace_fractional,
    "beta": beta,
    "stage_c": stage_c,
    "lcm": lcm,
    "karras": karras,
    "exponential": exponential,
    "uniform_log_snr": exponential,  # its name in DPM-Solver (Lu et al. 2022)
    "beta_sigmas": beta_sigmas,
    "align_your_steps": align_your_steps,
    **{f"ays_{table}": _with_table(table) for table in ALIGN_YOUR_STEPS},
}
ENTRY_POINTS = "jaxldm.spacings"


def spacing_names() -> list[str]:
    """The names that `make_grid` takes: of this library, then of installed packages."""
    return registry.names(SPACINGS, ENTRY_POINTS)


@checked(path=A_PATH)
def make_grid(path: Path, num_inference_steps: int, spacing: str | None = None, **options: Any) -> Grid:
    """The grid of a spacing by name, with options such as rho=5.0.

    Args:
        path: any.
        num_inference_steps: N.
        spacing: a name of `SPACINGS`, one that an installed package adds (entry-point group
            "jaxldm.spacings"), or "package.module:function" for a function (path, N, **options) -> Grid.
            None: `path.default_spacing`, "karras" on an EDM path and "trailing" on others.
        **options: of the spacing's function.

    Raises:
        UnknownNameError: no such spacing.
        InvalidArgumentError: an option that the spacing does not have, or what the spacing refuses.

    >>> from jaxldm import diffusion as D
    >>> D.make_grid(D.Flow(), 4).t
    array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    for old, new in (("sigmas", "at_sigmas"), ("timesteps", "at_times")):
        value = options.get(old)
        if isinstance(value, str):
            raise InvalidArgumentError(f"make_grid has no option {old!r}: write spacing={value!r}")
        if value is not None:
            raise InvalidArgumentError(f"make_grid has no option {old!r}: write D.{new}(path, [...])")
    name = path.default_spacing if spacing is None else spacing
    function = registry.find("spacing", name, SPACINGS, ENTRY_POINTS)
    grid = registry.call("spacing", name, function, path, num_inference_steps, **options)
    if not isinstance(grid, Grid):
        raise InvalidArgumentError(f"spacing {name!r} must return a Grid, got {shown(grid)}")
    return grid


@checked(
    path=A_PATH, times=function("N -> t [N]"), shift=SHIFT, final=FINAL, shift_terminal=optional(number())
)
def make(
    path: Path,
    count: int,
    times: Callable[[int], Float[np.ndarray, " N"]],
    shift: float | None = None,
    final: str = "clean",
    shift_terminal: float | None = None,
) -> Grid:
    """The grid of times(N), shifted: for a spacing of one's own.

    Args:
        path: any.
        count: N.
        times: N -> N values of t, noisiest first, float64.
        shift: a factor on sigma / alpha; None: the path's own.
        final: "clean" or "sigma_min".
        shift_terminal: see `trailing`.
    """
    check_count(path, count)
    factor = path.default_shift if shift is None else shift

    def moved(count):
        t = times(count)
        t = t if factor == 1 else shifted(path, t, factor)
        return t if shift_terminal is None else stretched(path, t, shift_terminal)

    t = moved(count)
    # A grid that stops at t_min takes it as row N + 1, rather than visiting it twice.
    t = moved(count + 1) if final == "sigma_min" and t[-1] == path.t_min else t
    return grid_of_times(path, t, final)


def trailing_times(span: Span, count: int) -> Float[np.ndarray, " N"]:
    """N values of t, see `trailing`."""
    if span.total is None:
        return np.linspace(span.t_noisy, span.t_clean, count, endpoint=False)
    return np.round(span.total - span.total / count * np.arange(count)) - 1


def leading_times(span: Span, count: int, offset: int = 0) -> Float[np.ndarray, " N"]:
    """N values of t, see `leading`."""
    if span.total is None:
        if offset:
            raise InvalidArgumentError(f"offset={offset} counts timesteps, and a continuous path has none")
        return np.linspace(span.t_min, span.t_noisy, count, endpoint=False)[::-1]
    times = (np.arange(count) * (span.total // count))[::-1].astype(np.float64) + offset
    if times[0] > span.total - 1:
        fit = [n for n in range(1, count) if (n - 1) * (span.total // n) + offset < span.total]
        advice = f"ask for {fit[-1]} or fewer" if fit else "take a smaller offset"
        raise InvalidArgumentError(
            f"num_inference_steps={count} with offset {offset} needs more than {span.total} timesteps: "
            f"{advice}, or take spacing='trailing'"
        )
    return times


def linspace_times(span: Span, count: int) -> Float[np.ndarray, " N"]:
    """N values of t, see `linspace`."""
    if span.total is None:
        return np.linspace(span.t_noisy, span.t_min, count)
    return np.round(np.linspace(0, span.total - 1, count)[::-1])


def fractional_times(path: Path, count: int) -> Float[np.ndarray, " N"]:
    """N values of t, see `linspace_fractional`."""
    if path.num_train_timesteps is None:
        return linspace_times(span_of(path), count)
    t = np.linspace(0, path.num_train_timesteps - 1, count)[::-1]
    whole = np.arange(path.num_train_timesteps, dtype=np.float64)
    with np.errstate(divide="ignore"):
        ratio = np.minimum(path.sigma(whole) / path.alpha(whole), LARGEST_FLOAT32)
        between = path.time(np.interp(t, whole, ratio))
    return np.where(t == np.round(t), t, between)


def align_your_steps_times(path: Path, count: int, table: str) -> Float[np.ndarray, " N"]:
    """N values of t, see `align_your_steps`."""
    logs = np.log(ALIGN_YOUR_STEPS[table])
    ratio = np.exp(np.interp(np.linspace(0, len(logs) - 1, count + 1), np.arange(len(logs)), logs))[:-1]
    with np.errstate(divide="ignore"):
        most = path.sigma(path.t_noisy) / path.alpha(path.t_noisy)
    if ratio[0] > most * 1.001:  # the tables have three decimals
        raise InvalidArgumentError(
            f"the table {table!r} starts at sigma / alpha = {ratio[0]:g}, but this {path.name} path ends at "
            f"{most:g}: use the path that the table was made for, or spacing='karras'"
        )
    return path.time(np.minimum(ratio, most))


def _of_fractions(span: Span, fractions: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The t at parts of the range, 1 the noisiest; whole on a discrete path."""
    if span.total is None:
        return span.t_clean + (span.t_noisy - span.t_clean) * fractions
    return np.round((span.total - 1) * fractions)


def _over_levels(
    path: Path, levels: Callable[..., Any], shift: float | None, name: str
) -> Callable[[int], Float[np.ndarray, " N"]]:
    """N -> N values of t from the noisiest to `t_min`, shifted both, with levels(first, last, N) between."""
    factor = path.default_shift if shift is None else shift
    ends = np.array([path.t_noisy, path.t_min])
    ends = ends if factor == 1 else shifted(path, ends, factor)
    return lambda count: respaced(path, count, levels, ends, name)
