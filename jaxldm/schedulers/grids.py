"""Grids as schedulers of diffusers space them, with the conventions that exist only in diffusers.

- Open ends: some schedulers space N + 1 timesteps and leave out the cleanest.
- Noise levels between the ends of another spacing (`levels`): Karras, exponential or beta.
- `lambda_min`: the timesteps of the least log(alpha / sigma) are left out.
- The last t of a flow grid may be shifted twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxldm import diffusion as D
from jaxldm.diffusion.spacings import respaced, shifted, spaced, stretched
from jaxldm.errors import InvalidArgumentError

# Spacings of this file, in addition to those of `D.SPACINGS`: N + 1 rows without the cleanest.
OPEN_SPACINGS = {"leading_open": "leading", "linspace_open": "linspace"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridRule:
    """How the rows of a run are spaced, whatever their number.

    Attributes:
        spacing: a name of `D.SPACINGS` or `OPEN_SPACINGS`; None is the path's own: "trailing", or with
            `levels` the whole path.
        levels: None, or a name of `D.SIGMAS`: the noise level falls by this rule between the ends of
            `spacing`.
        final: "clean" or "sigma_min", as in `D.make_grid`.
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

    def make(self, path: D.Path, num_inference_steps: int) -> D.Grid:
        """The rows of a run of N steps along a path, shifted by its `default_shift`.

        Raises:
            InvalidArgumentError: fewer than one step, more than the path has, rows that coincide, or a rule
                that the path cannot follow.
            UnknownNameError: a spacing, levels or final that does not exist.
        """
        if self.spacing not in OPEN_SPACINGS and not self._has_conventions:
            own = {"sigmas" if name == "levels" else name: value for name, value in self.options().items()}
            return D.make_grid(path, num_inference_steps, **own)
        D.make_grid(path, num_inference_steps, spacing="trailing")  # refuses what is no number of steps
        t = self._times(path, num_inference_steps)
        if self.final == "sigma_min" and t[-1] == path.t_min:  # t_min is row N + 1, and no row twice
            t = self._times(path, num_inference_steps + 1)
        return D.make_grid(path, timesteps=t, final=self.final)

    @property
    def _has_conventions(self) -> bool:
        between_ends = self.spacing is not None and self.levels is not None
        return (
            between_ends
            or self.lambda_min is not None
            or self.shift_terminal is not None
            or self.shift_t_min_twice
        )

    def _times(self, path: D.Path, count: int) -> np.ndarray:
        """N values of t, noisiest first, float64."""
        start = path if self.lambda_min is None else without_noisiest(path, self.lambda_min)
        if self.shift_t_min_twice:
            start = dataclasses.replace(start, t_min=float(_shifted(path, np.float64(path.t_min))))
        if self.spacing is None and self.levels is not None:
            t = np.array([start.t_noisy, start.t_min])
        elif self.spacing in OPEN_SPACINGS:
            t = spaced(start, count + 1, OPEN_SPACINGS[self.spacing], self.steps_offset)[:-1]
        elif self.lambda_min is not None and self.spacing in ("trailing", None):
            # Steps as long as on the whole path, so that there may be one or two fewer.
            t = np.round(start.num_train_timesteps - path.num_train_timesteps / count * np.arange(count))
            t = t[t >= 1] - 1
        else:
            options = {"steps_offset": self.steps_offset, "original_steps": self.original_steps}
            t = spaced(start, count, self.spacing or "trailing", **options)
        t = _shifted(path, t)
        t = t if self.shift_terminal is None else stretched(path, t, self.shift_terminal)
        return t if self.levels is None else respaced(path, count, self.levels, t[0], t[-1], self.rho)


def without_noisiest(path: D.Path, lambda_min: float) -> D.VP:
    """The part of a discrete path whose log(alpha / sigma) is at least `lambda_min`.

    Raises:
        InvalidArgumentError: a continuous path, or no timestep that is left.
    """
    if not isinstance(path, D.VP):
        raise InvalidArgumentError(f"lambda_min counts timesteps, but this {path.name} path is continuous")
    t = np.arange(path.num_train_timesteps, dtype=np.float64)
    with np.errstate(divide="ignore"):
        kept = int((np.log(path.alpha(t) / path.sigma(t)) >= lambda_min).sum())
    if kept < 2:
        raise InvalidArgumentError(f"lambda_min={lambda_min} leaves no timestep of this {path.name} path")
    return D.VP(path.betas[:kept])


def _shifted(path: D.Path, t: np.ndarray) -> np.ndarray:
    return t if path.default_shift == 1 else shifted(path, t, path.default_shift)
