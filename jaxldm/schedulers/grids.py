"""Grids as schedulers of diffusers space them, with the conventions that exist only in diffusers.

- Rows in two stages: timesteps by a spacing, then noise levels between the ends of those timesteps.
- Open ends: some schedulers space N + 1 timesteps and leave out the cleanest.
- `lambda_min`: the timesteps of the least log(alpha / sigma) are left out.
- The last t of a flow grid may be shifted twice.
- Levels of consistency models: N of the T that they were trained on. `sine_squared`: Dance Diffusion's.

A grid of one's own needs none of that: see `jaxldm.diffusion.spacings`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from jaxldm import diffusion as D
from jaxldm.arguments import check_fields, count, flag, number, optional, text
from jaxldm.diffusion import distilled_times, levels, registry, spacings
from jaxldm.errors import InvalidArgumentError, one_of, shown
from jaxldm.exact import MAX_STEPS

# Names of timesteps -> (path, span, N, rule) -> N values of t.
TIMES: dict[str, Callable[..., Float[np.ndarray, " N"]]] = {
    "trailing": lambda path, span, count, rule: spacings.trailing_times(span, count),
    "leading": lambda path, span, count, rule: spacings.leading_times(span, count, rule.steps_offset),
    "linspace": lambda path, span, count, rule: spacings.linspace_times(span, count),
    "linspace_fractional": lambda path, span, count, rule: (
        spacings.linspace_times(span, count) if span.total is None else spacings.fractional_times(path, count)
    ),
    # N + 1 of them, less the cleanest: DPM-Solver++, DEIS and UniPC of diffusers.
    "leading_open": lambda path, span, count, rule: spacings.leading_times(
        span, count + 1, rule.steps_offset
    )[:-1],
    "linspace_open": lambda path, span, count, rule: spacings.linspace_times(span, count + 1)[:-1],
    "lcm": lambda path, span, count, rule: distilled_times.lcm_times(path, count, rule.original_steps),
    "sine_squared": lambda path, span, count, rule: sine_squared_times(path, count),
    "consistency": lambda path, span, count, rule: consistency_times(
        path, count, rule.original_steps, rule.rho
    ),
}
# Names of noise levels -> (first, last, N, rule) -> N levels.
LEVELS: dict[str, Callable[..., Float[np.ndarray, " N"]]] = {
    "karras": lambda first, last, count, rule: levels.karras_levels(first, last, count, rule.rho),
    "exponential": lambda first, last, count, rule: levels.exponential_levels(first, last, count),
    "uniform_log_snr": lambda first, last, count, rule: levels.exponential_levels(first, last, count),
    "beta": lambda first, last, count, rule: levels.beta_levels(first, last, count),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridRule:
    """How the rows of a run are spaced, whatever their number.

    Attributes:
        spacing: a name of `TIMES`, or without `levels` of `D.SPACINGS`; None is the path's own: "trailing",
            or with `levels` the whole path.
        levels: None, or a name of `LEVELS`: the noise level falls by this rule between the ends of `spacing`.
        final: "clean" or "sigma_min", as for every spacing.
        steps_offset: of "leading".
        original_steps: of "lcm" and "consistency".
        rho: of "karras" and "consistency".
        level_min, level_max: of `levels`, the last and the first sigma / alpha; None: those of the rows.
        lambda_min: leave out timesteps of a lower log(alpha / sigma).
        shift_terminal: stretch the shifted levels so that row N has this one (LTX-Video, Qwen-Image).
        shift_t_min_twice: shift the last row of "linspace" on a flow path a second time, as diffusers and
            Stability's code do.
    """

    spacing: str | None = None
    levels: str | None = None
    final: str = "clean"
    steps_offset: int = 0
    original_steps: int = 50
    rho: float = 7.0
    level_min: float | None = None
    level_max: float | None = None
    lambda_min: float | None = None
    shift_terminal: float | None = None
    shift_t_min_twice: bool = False

    def __post_init__(self):
        check_fields(
            self,
            spacing=optional(text),
            levels=optional(text),
            final=text,
            steps_offset=count(0),
            original_steps=count(1, MAX_STEPS),
            rho=number(above=0),
            level_min=optional(number(above=0)),
            level_max=optional(number(above=0)),
            lambda_min=optional(number(infinite=True)),
            shift_terminal=optional(number()),
            shift_t_min_twice=flag,
        )

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def respaced(self, spacing: str | None = None, levels: str | None = None) -> GridRule:
        """The rule of a call that names another spacing or levels: it ends as this one, where it can.

        Args:
            spacing, levels: as above; `levels` alone may be any name of `D.SPACINGS`.

        Raises:
            UnknownNameError: no such spacing.

        >>> GridRule(final="sigma_min").respaced("linspace", "karras").options()
        {'spacing': 'linspace', 'levels': 'karras', 'final': 'sigma_min'}
        """
        if spacing is None and levels in D.SPACINGS and levels not in LEVELS:
            spacing, levels = levels, None
        return GridRule(spacing=spacing, levels=levels, final=self.final if _has_final(spacing) else "clean")

    def make(self, path: D.Path, num_inference_steps: int, shift: float | None = None) -> D.Grid:
        """The rows of a run of N steps along a path.

        Args:
            path: any.
            num_inference_steps: N.
            shift: a factor on sigma / alpha, before the levels; None: the path's own.

        Raises:
            InvalidArgumentError: fewer than one step, more than the path has, rows that coincide, or a rule
                that the path cannot follow.
            UnknownNameError: a spacing, levels or final that does not exist.
        """
        if self.spacing is None and self.levels is None:
            return dataclasses.replace(self, spacing=path.default_spacing).make(
                path, num_inference_steps, shift
            )
        if self.levels is None and self.spacing not in TIMES:
            return D.make_grid(path, num_inference_steps, **self._options_of_a_spacing(shift))
        self._check()
        times = functools.partial(self.times, path, shift=shift)
        return spacings.make(path, num_inference_steps, times, 1.0, self.final)

    def _options_of_a_spacing(self, shift: float | None) -> dict[str, Any]:
        options = self.options() | ({} if shift is None else {"shift": shift})
        return {{"steps_offset": "offset"}.get(name, name): value for name, value in options.items()}

    def _check(self) -> None:
        # Looking up what is installed takes milliseconds: not for a name that is known.
        if self.spacing not in (None, *TIMES, *D.SPACINGS) and ":" not in self.spacing:
            one_of("spacing", self.spacing, dict.fromkeys((*TIMES, *D.spacing_names())))
        if self.levels is not None:
            one_of("sigmas", self.levels, LEVELS | D.SPACINGS)
        if (self.spacing or "trailing") not in TIMES or (self.levels or "karras") not in LEVELS:
            raise InvalidArgumentError(
                f"spacing={self.spacing!r} cannot be combined with sigmas={self.levels!r}: leave one out"
            )
        if self.lambda_min is not None and self.spacing in ("linspace_fractional", "lcm"):
            raise InvalidArgumentError(
                f"spacing={self.spacing!r} cannot be combined with lambda_min: leave one of them out"
            )

    def times(self, path: D.Path, count: int, shift: float | None = None) -> Float[np.ndarray, " N"]:
        """N values of t, noisiest first, float64, without the last row: of spacings in `TIMES`."""
        span, shift = spacings.span_of(path), path.default_shift if shift is None else shift
        if self.shift_t_min_twice:
            span = span._replace(t_min=float(levels.shifted(path, cast(Any, np.float64(path.t_min)), shift)))
        if self.lambda_min is not None:
            span = without_noisiest(path, span, self.lambda_min)
        if self.spacing is None and self.levels is not None:
            t = np.array([span.t_noisy, span.t_min])
        elif self.lambda_min is not None and self.spacing in ("trailing", None):
            # Steps as long as on the whole path, so that there may be one or two fewer.
            total, num_train_timesteps = cast(Any, (span.total, path.num_train_timesteps))
            t = np.round(total - num_train_timesteps / count * np.arange(count))
            t = t[t >= 1] - 1
        else:
            t = TIMES[self.spacing or "trailing"](path, span, count, self)
        t = t if shift == 1 else levels.shifted(path, t, shift)
        t = t if self.shift_terminal is None else levels.stretched(path, t, self.shift_terminal)
        if self.levels is None:
            return t
        rule = functools.partial(LEVELS[self.levels], rule=self)
        return levels.respaced(path, count, rule, self._ends(path, t), self.levels)

    def _ends(self, path: D.Path, t: Float[np.ndarray, " N"]) -> Float[np.ndarray, " 2"]:
        """Where the levels begin and end."""
        given = [self.level_max, self.level_min]
        most = float(levels.noise_level(path, path.t_noisy))
        if max(level or 0 for level in given) > most * (1 + 1e-6):
            raise InvalidArgumentError(
                f"level_max={max(level or 0 for level in given):g} is noisier than this {path.name} path: it "
                f"ends at {most:g}"
            )
        ends = zip((t[0], t[-1]), given, strict=True)
        return np.array([own if level is None else levels.time_of_level(path, level) for own, level in ends])


def _has_final(spacing: str | None) -> bool:
    """Whether a spacing can end as a file says: those of another package need not."""
    if spacing is None or spacing in TIMES or spacing in D.SPACINGS:
        return True
    return registry.has_option(registry.find("spacing", spacing, D.SPACINGS, spacings.ENTRY_POINTS), "final")


def consistency_times(path: D.Path, count: int, total: int, rho: float) -> Float[np.ndarray, " N"]:
    """N values of t: every (T // N)-th of T levels that are even in their 1/rho-th power, from the noisiest.

    Args:
        path: any, to `t_min`.
        count: N; T + 1 for T steps that end at `t_min`, which then are even themselves.
        total: T.
        rho: see `D.karras`.

    Raises:
        InvalidArgumentError: more steps than T.
    """
    if count > total + 1:
        raise InvalidArgumentError(
            f"num_inference_steps must be <= num_train_timesteps={total}, the noise levels that this "
            f"consistency model knows: ask for {total} or fewer"
        )
    return _times_on_ramp(path, np.arange(count) * max(total // count, 1) / max(total - 1, count - 1, 1), rho)


def times_of_numbers(path: D.Path, numbers: Any, total: int, rho: float) -> Float[np.ndarray, " N"]:
    """N values of t of levels of a consistency model by their numbers: 0 is the noisiest.

    Args:
        path: as above.
        numbers: N different whole numbers from 0 to T - 1, largest first, as `ConsistencyModelPipeline` of
            diffusers takes them: [22, 0] are two steps, at the noisiest level and then at number 22.
        total, rho: as above.

    Raises:
        InvalidArgumentError: other numbers.
    """
    values = np.asarray(numbers, np.float64).reshape(-1)
    whole = (values == np.round(values)).all() and (np.diff(values) < 0).all()
    if not (len(values) and whole and values[-1] >= 0 and values[0] < total):
        raise InvalidArgumentError(
            f"timesteps of a consistency model must be different whole numbers from {total - 1} to 0, the "
            f"largest first (0 is the noisiest of its levels), got {shown(values.tolist())}"
        )
    return _times_on_ramp(path, values[::-1] / max(total - 1, 1), rho)


def _times_on_ramp(path: D.Path, ramp: Float[np.ndarray, " N"], rho: float) -> Float[np.ndarray, " N"]:
    """t where the 1/rho-th power of the level is that part of the way from the noisiest to the cleanest."""
    first, last = levels.noise_level(path, np.array([path.t_noisy, path.t_min]))
    level = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    t = levels.time_of_level(path, level)
    return np.where(ramp == 1, path.t_min, np.where(ramp == 0, path.t_noisy, t))


def sine_squared_times(path: D.Path, count: int) -> Float[np.ndarray, " N"]:
    """N values of t where sigma / sqrt(alpha^2 + sigma^2) = sin^2(pi u / 2), u even from 1 to 1 / N."""
    part = np.sin(np.linspace(1, 0, count, endpoint=False) * np.pi / 2) ** 2
    with np.errstate(divide="ignore"):
        t = path.time(part / np.sqrt(1 - part**2))
    return np.minimum(t, path.t_noisy)


def without_noisiest(path: D.Path, span: spacings.Span, lambda_min: float) -> spacings.Span:
    """The range of the timesteps whose log(alpha / sigma) is at least `lambda_min`.

    Raises:
        InvalidArgumentError: a continuous path, or no timestep that is left.
    """
    if path.num_train_timesteps is None:
        raise InvalidArgumentError(f"lambda_min counts timesteps, but this {path.name} path is continuous")
    t = np.arange(path.num_train_timesteps, dtype=np.float64)
    with np.errstate(divide="ignore"):
        kept = int((np.log(path.alpha(t) / path.sigma(t)) >= lambda_min).sum())
    if kept < 1:
        raise InvalidArgumentError(f"lambda_min={lambda_min} leaves no timestep of this {path.name} path")
    return span._replace(total=kept, t_noisy=float(kept - 1))
