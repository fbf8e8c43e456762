"""Grids as schedulers of diffusers space them, with the conventions that exist only in diffusers.

- Rows in two stages: timesteps by a spacing, then noise levels between the ends of those timesteps.
- Open ends: some schedulers space N + 1 timesteps and leave out the cleanest.
- `lambda_min`: the timesteps of the least log(alpha / sigma) are left out.
- The last t of a flow grid may be shifted twice.

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
from jaxldm.diffusion import levels, registry, spacings
from jaxldm.errors import InvalidArgumentError, one_of

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
    "lcm": lambda path, span, count, rule: spacings.lcm_times(path, count, rule.original_steps),
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
        original_steps: of "lcm".
        rho: of "karras".
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
    lambda_min: float | None = None
    shift_terminal: float | None = None
    shift_t_min_twice: bool = False

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

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
        times = functools.partial(self._times, path, path.default_shift if shift is None else shift)
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
            raise InvalidArgumentError(f"spacing={self.spacing!r} cannot be combined with lambda_min")

    def _times(self, path: D.Path, shift: float, count: int) -> Float[np.ndarray, " N"]:
        """N values of t, noisiest first, float64."""
        span = spacings.span_of(path)
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
        return levels.respaced(path, count, rule, np.array([t[0], t[-1]]), self.levels)


def scheduler_grid(path: D.Path, num_inference_steps: int | None = None, **options: Any) -> D.Grid:
    """The grid of the options of a `GridRule`, under the names of 0.1.

    Args:
        path: any.
        num_inference_steps: N. May be left out with values of `timesteps` or `sigmas`.
        **options: fields of `GridRule`, where `sigmas` is `levels`; `shift`; `spacing` or `sigmas` alone may
            be any name of `jaxldm.diffusion.SPACINGS`; `timesteps` or `sigmas` the values themselves.

    Raises:
        InvalidArgumentError: what a spacing refuses, and options that exclude each other.
        UnknownNameError: no such spacing, sigmas or final.

    >>> from jaxldm import diffusion as D
    >>> path = D.VP.named("linear")
    >>> scheduler_grid(path, 4, spacing="leading_open", sigmas="karras").t.round(1)
    array([800. , 665.6, 470.9, 200. ,  -1. ], dtype=float32)
    """
    options = {name: value for name, value in options.items() if value is not None}
    spacing, sigmas, timesteps = (options.get(name) for name in ("spacing", "sigmas", "timesteps"))
    if timesteps is not None and (sigmas is not None or spacing is not None):
        raise InvalidArgumentError("timesteps=[...] cannot be combined with spacing or sigmas")
    if sigmas is not None and not isinstance(sigmas, str) and spacing is not None:
        raise InvalidArgumentError("sigmas=[...] cannot be combined with spacing; or name 'karras'")
    if timesteps is not None or not isinstance(sigmas, str | None):
        return _given_rows(path, num_inference_steps, options)
    if num_inference_steps is None:
        raise InvalidArgumentError("give num_inference_steps, timesteps=[...] or sigmas=[...]")
    if sigmas in D.SPACINGS and sigmas not in LEVELS and spacing is None:
        options |= {"spacing": options.pop("sigmas")}
    if "sigmas" in options:
        options |= {"levels": options.pop("sigmas")}
    if options.get("levels") is None and spacing not in (None, *TIMES) and spacing is not None:
        return D.make_grid(path, num_inference_steps, **options)
    shift = options.pop("shift", None)
    registry.check_options("scheduler", "grid", GridRule, options)
    return GridRule(**options).make(path, num_inference_steps, shift)


def ending(rule: GridRule, spacing: str | None) -> dict[str, str]:
    """`final` of a folder's rule, for a call that names another spacing.

    Empty for a spacing of another package without this option, which ends as it likes.
    """
    if spacing is not None and spacing not in TIMES and spacing not in D.SPACINGS:
        function = registry.find("spacing", spacing, D.SPACINGS, spacings.ENTRY_POINTS)
        if not registry.has_option(function, "final"):
            return {}
    return {"final": rule.final}


def _given_rows(path: D.Path, count: int | None, options: dict[str, Any]) -> D.Grid:
    """The grid of rows that the caller wrote down."""
    make, name = (D.at_times, "timesteps") if "timesteps" in options else (D.at_sigmas, "sigmas")
    values = np.asarray(options[name], np.float64).reshape(-1)
    if count not in (None, len(values)):
        raise InvalidArgumentError(f"num_inference_steps={count}, but {len(values)} values were given")
    return make(path, values, **{name: options[name] for name in ("shift", "final") if name in options})


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
