"""Paths: how data turns into noise, x_t = alpha(t) x_0 + sigma(t) eps with eps ~ N(0, I).

A path is a small frozen value: hashable, and equal to another with equal fields. On every path
`alpha(t_clean) = 1`, `sigma(t_clean) = 0`, and sigma / alpha grows with t. NumPy numbers in give float64
NumPy numbers out (schedules are made on the host); JAX arrays in give JAX arrays of their own float type out,
never less than float32 (a bfloat16 schedule ruins the last steps).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Real

from jaxldm.arguments import array, check_fields, checked, count, flag, instance, number, optional
from jaxldm.diffusion.betas import BetaSchedule, checked_betas
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.exact import MAX_TIMESTEPS
from jaxldm.functions import NamedFields


def wide_type(x: Any) -> Any:
    """The type of what is computed next to x: its own, or float32 where that is less."""
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x.dtype if wide else jnp.dtype(jnp.float32)


def at_least_float32(x: Num[Array, " *shape"]) -> Float[Array, " *shape"]:
    """x as it is in float32 or float64, and as float32 in anything less: schedules never run in bfloat16."""
    wide = wide_type(x)
    return x if x.dtype == wide else x.astype(wide)


A_TIME = array("real")


def host_or_device(t: Real[Any, " *shape"] | float) -> tuple[Any, Float[Any, " *shape"]]:
    """(numpy, float64 t) for host numbers, (jax.numpy, float32 or wider t) for JAX arrays and tracers."""
    if isinstance(t, jax.Array):
        return jnp, at_least_float32(t)
    numbers = A_TIME("t", t)
    if np.isnan(numbers).any():
        raise InvalidArgumentError("t must be a number or an array of numbers, got NaN")
    return np, np.asarray(numbers, np.float64)


class Path(NamedFields, abc.ABC):
    """x_t = alpha(t) x_0 + sigma(t) eps, and the range of t.

    Subclass it for a path of your own, as a frozen dataclass with two methods, for NumPy and JAX alike:

        @dataclasses.dataclass(frozen=True)
        class Quadratic(D.Path):  # alpha = 1 - t^2, sigma = t
            name = "quadratic"
            t_min: float = 1e-3

            def coefficients(self, xp, t):
                return 1 - t**2, t

            def time_of(self, xp, ratio):  # the positive root of ratio t^2 + t = ratio
                ratio = xp.minimum(ratio, 1e12)
                return 2 * ratio / (1 + xp.sqrt(1 + 4 * ratio**2))

    Attributes:
        name: for messages.
        t_clean: where alpha = 1 and sigma = 0: the data.
        t_min: the cleanest t that a grid with `final="sigma_min"` stops at, above `t_clean`.
        t_noisy: the noisiest t.
        t_train_min: the cleanest t that training draws; `t_min` unless the path says otherwise.
        num_train_timesteps: T for discrete paths, None for continuous ones.
        default_shift: the factor on sigma / alpha of training's draws and, by default, of grids.
        default_spacing: of grids, a name that `make_grid` takes.
    """

    name: str = "path"
    t_clean: float = 0.0
    t_min: float = 1e-3
    t_noisy: float = 1.0
    num_train_timesteps: int | None = None
    default_shift: float = 1.0
    default_spacing: str = "trailing"

    @abc.abstractmethod
    def coefficients(
        self, xp: Any, t: Float[Any, " *shape"]
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """(alpha, sigma) at t, each of t's shape and type; `xp` is numpy or jax.numpy."""

    @abc.abstractmethod
    def time_of(self, xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
        """The t of a sigma / alpha in [0, inf], of its shape and type: the inverse of `coefficients`."""

    @property
    def t_train_min(self) -> float:
        """The cleanest t that training draws."""
        return self.t_min

    def alpha(self, t: Real[Any, " *shape"] | float) -> Float[Any, " *shape"]:
        """alpha(t), of t's shape."""
        xp, t = host_or_device(t)
        return self.coefficients(xp, t)[0]

    def sigma(self, t: Real[Any, " *shape"] | float) -> Float[Any, " *shape"]:
        """sigma(t), of t's shape."""
        xp, t = host_or_device(t)
        return self.coefficients(xp, t)[1]

    def time(self, sigma_over_alpha: Real[Any, " *shape"] | float) -> Float[Any, " *shape"]:
        """The t of that sigma / alpha; 0 gives `t_clean`. Discrete paths clamp at T - 1."""
        xp, ratio = host_or_device(sigma_over_alpha)
        return self.time_of(xp, ratio)

    def derivatives(
        self, t: Real[Any, " *shape"] | float
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """(d alpha/dt, d sigma/dt) at t, of t's shape, by automatic differentiation.

        The velocity of the path is alpha' x_0 + sigma' eps. On a discrete path these are the slopes of the
        interpolation between timesteps.

        >>> from jaxldm import diffusion as D
        >>> [round(float(slope), 3) for slope in D.EDM().derivatives(3.0)]
        [0.0, 1.0]
        """

        def slopes(t):
            return jax.jvp(lambda t: self.coefficients(jnp, t), (t,), (jnp.ones_like(t),))[1]

        xp, t = host_or_device(t)
        if xp is jnp:
            return slopes(t)
        with jax.enable_x64(True), jax.ensure_compile_time_eval():  # also where a trace makes a prediction
            alpha, sigma = slopes(jnp.asarray(t))
            return np.asarray(alpha), np.asarray(sigma)

    @property
    def zero_terminal_snr(self) -> bool:
        """True where the noisy end is pure noise: epsilon prediction is undefined there."""
        return bool(self.alpha(self.t_noisy) == 0)


def A_PATH(name: str, value: Any) -> Any:
    """A path, or what has its functions of t."""
    is_like = callable(getattr(value, "alpha", None)) and callable(getattr(value, "sigma", None))
    if is_like and not isinstance(value, type):
        return value
    return instance(Path, "a path such as D.VP.named('linear') or D.Flow()")(name, value)


@dataclasses.dataclass(frozen=True)
class VP(Path):
    """DDPM's variance-preserving path: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), t in [0, T - 1].

    abar is the running product of 1 - beta (Ho et al. 2020, equation 4). Between two integers log(sigma /
    alpha) is linear in t, as in k-diffusion; below t = 0, sigma / alpha falls linearly to the clean image at
    t = -1, and with zero terminal SNR alpha / sigma falls linearly to 0 over the last step.

    Attributes:
        betas: [T], from `linear_betas` and related functions or from a checkpoint; kept as a tuple.
        schedule: the names that the betas were made from, where they are known (see `named`); it takes no
            part in comparison.

    Raises:
        InvalidArgumentError: betas outside (0, 1).
    """

    betas: tuple[float, ...]
    schedule: BetaSchedule | None = dataclasses.field(default=None, compare=False, kw_only=True)
    name = "vp"
    t_clean = -1.0
    t_min = 0.0

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(checked_betas(self.betas).tolist()))

    @classmethod
    @checked(
        num_train_timesteps=count(2, MAX_TIMESTEPS),
        beta_start=optional(number()),
        beta_end=optional(number()),
        zero_terminal_snr=flag,
    )
    def named(
        cls,
        betas: str,
        num_train_timesteps: int = 1000,
        *,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
    ) -> VP:
        """The path of a published beta schedule, which remembers its name for files.

        Args:
            betas: a name of `jaxldm.diffusion.betas.BETAS`: "linear", "scaled_linear", "cosine", ...
            num_train_timesteps: T.
            beta_start: None is the published one.
            beta_end: None is the published one.
            zero_terminal_snr: rescale the betas so that alpha is 0 at T - 1 (`rescale_zero_terminal_snr`).

        Raises:
            UnknownNameError: no schedule of that name.
            InvalidArgumentError: fewer than two timesteps, or betas outside (0, 1).

        >>> VP.named("scaled_linear").num_train_timesteps
        1000
        """
        schedule = BetaSchedule(betas, num_train_timesteps, beta_start, beta_end, zero_terminal_snr)
        return cls(cast(Any, schedule.make()), schedule=schedule)

    def __repr__(self):
        return f"VP({self.schedule or f'<{len(self.betas)} betas>'})"

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def t_noisy(self) -> float:
        """T - 1."""
        return float(len(self.betas) - 1)

    @functools.cached_property
    def _log_ratio(self) -> Float[np.ndarray, " T"]:
        """log(sigma / alpha) at t = 0 ... T - 1; at pure noise the value before it stands in for infinity."""
        alphas_cumprod = np.cumprod(1 - np.asarray(self.betas))
        finite = alphas_cumprod[:-1] if self._ends_in_noise else alphas_cumprod
        log_ratio = 0.5 * (np.log1p(-finite) - np.log(finite))
        return np.append(log_ratio, log_ratio[-1]) if self._ends_in_noise else log_ratio

    @property
    def _ends_in_noise(self) -> bool:
        return self.betas[-1] == 1

    def coefficients(
        self, xp: Any, t: Float[Any, " *shape"]
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """sqrt(abar_t) and sqrt(1 - abar_t)."""
        table, last = xp.asarray(self._log_ratio, t.dtype), len(self.betas) - 1
        low = xp.clip(xp.floor(t), 0, last - 1).astype(np.int32)
        value = table[low] + (t - low.astype(t.dtype)) * (table[low + 1] - table[low])
        with np.errstate(divide="ignore", over="ignore"):
            value = xp.where(t < 0, table[0] + xp.log(xp.clip(t + 1, 0, 1)), value)
            if self._ends_in_noise:
                value = xp.where(t > last - 1, table[-1] - xp.log(xp.clip(last - t, 0, 1)), value)
            # 1 / sqrt(1 + e^{2 l}) is finite at both ends, l = -inf and l = +inf.
            return 1 / xp.sqrt(1 + xp.exp(2 * value)), 1 / xp.sqrt(1 + xp.exp(-2 * value))

    def time_of(self, xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
        """The timestep, between two of them interpolated in log(sigma / alpha)."""
        last = len(self.betas) - 1
        table = xp.asarray(self._log_ratio[: last if self._ends_in_noise else last + 1], ratio.dtype)
        steps = xp.arange(len(table), dtype=ratio.dtype)
        with np.errstate(divide="ignore"):
            t = xp.interp(xp.log(ratio), table, steps)
            t = xp.where(ratio < xp.exp(table[0]), ratio / xp.exp(table[0]) - 1, t)
            if self._ends_in_noise:
                t = xp.where(ratio > xp.exp(table[-1]), last - xp.exp(table[-1]) / ratio, t)
        return t


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousVP(Path):
    """The VP-SDE: alpha = exp(-B(t)/2), sigma = sqrt(1 - exp(-B(t))), t in [t_min, 1].

    Song et al. 2021, equation 33. B(t) = beta_min t + (beta_max - beta_min) t^2 / 2 is the integral of
    beta. It is the limit of `VP` of T betas from beta_min / T to beta_max / T, at t = (timestep + 1) / T. The
    network's t lies in [0, 1].

    Raises:
        InvalidArgumentError: unless 0 < beta_min <= beta_max and 0 < t_min < 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    name = "continuous_vp"

    def __post_init__(self):
        check_fields(self, beta_min=number(above=0), beta_max=number(above=0), t_min=number(above=0, below=1))
        if self.beta_min > self.beta_max:
            raise InvalidArgumentError(
                f"ContinuousVP needs beta_min <= beta_max, got {self.beta_min} and {self.beta_max}"
            )

    def coefficients(
        self, xp: Any, t: Float[Any, " *shape"]
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """exp(-B/2) and sqrt(1 - exp(-B))."""
        return vp_sde_coefficients(xp, t, self.beta_min, self.beta_max)

    def time_of(self, xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
        """The root of a quadratic in t."""
        return vp_sde_time(xp, ratio, self.beta_min, self.beta_max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(Path):
    """EDM's variance-exploding path: alpha = 1, sigma = t, t in [sigma_min, sigma_max] (Karras et al. 2022).

    Grids are Karras grids by default. The standard deviation of the data belongs to the
    prediction, `edm(path, sigma_data)`.

    Raises:
        InvalidArgumentError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name = "edm"
    default_spacing = "karras"

    def __post_init__(self):
        check_fields(self, sigma_min=number(above=0), sigma_max=number(above=0))
        if self.sigma_min >= self.sigma_max:
            raise InvalidArgumentError(
                f"EDM needs sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def t_min(self) -> float:
        """sigma_min."""
        return self.sigma_min

    @property
    def t_noisy(self) -> float:
        """sigma_max."""
        return self.sigma_max

    def coefficients(
        self, xp: Any, t: Float[Any, " *shape"]
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """1 and t."""
        return xp.ones_like(t), t

    def time_of(self, xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
        """The ratio itself."""
        return ratio


def vp_sde_coefficients(
    xp: Any, t: Float[Any, " *shape"], beta_min: float, beta_max: float
) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
    """exp(-B/2) and sqrt(1 - exp(-B)), B the integral of beta from 0 to t; see `ContinuousVP`."""
    integral = t * (beta_min + t * ((beta_max - beta_min) / 2))
    return xp.exp(-integral / 2), safe_sqrt(xp, -xp.expm1(-integral))


def vp_sde_time(
    xp: Any, ratio: Float[Any, " *shape"], beta_min: float, beta_max: float
) -> Float[Any, " *shape"]:
    """The t in [0, 1] of a sigma / alpha: B(t) = log(1 + ratio^2), a quadratic in t."""
    most = np.sqrt(np.expm1((beta_min + beta_max) / 2))
    integral = xp.log1p(xp.minimum(ratio, float(most)) ** 2)
    root = xp.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * integral)
    return xp.minimum(2 * integral / (beta_min + root), 1.0)


def safe_sqrt(xp: Any, x: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
    """sqrt(x), 0 at and below 0, with a gradient of 0 there instead of infinity."""
    positive = x > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, x, 1.0)), 0.0)


def per_image(values: Any, x: Any) -> Any:
    """Numbers per image [B] as [B, 1, 1, 1] next to x [B, H, W, C]; scalars pass unchanged."""
    if np.ndim(values) == 0:
        return values
    if np.shape(values) != np.shape(x)[:1]:
        raise InvalidArgumentError(
            f"one number for all images or one for each is needed, got {shown(values)} for x of shape "
            f"{list(np.shape(x))}"
        )
    return values.reshape(values.shape + (1,) * (np.ndim(x) - 1))
