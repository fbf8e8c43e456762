"""Paths: how data turns into noise, x_t = alpha(t) x_0 + sigma(t) eps with eps ~ N(0, I).

A path is a frozen value. On every path `alpha(t_clean) = 1`, `sigma(t_clean) = 0`, and sigma / alpha grows
with t. NumPy numbers in give float64 NumPy numbers out (schedules are made on the host); JAX arrays in give
JAX arrays of their own float type out, never less than float32 (a bfloat16 schedule ruins the last steps).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.diffusion.betas import checked_betas
from jaxldm.errors import InvalidArgumentError


def at_least_float32(x: Array) -> Array:
    """x as it is in float32 or float64, and as float32 in anything less: schedules never run in bfloat16."""
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if wide else x.astype(jnp.float32)


def host_or_device(t: Any) -> tuple[Any, Any]:
    """(numpy, float64 t) for host numbers, (jax.numpy, float32 or wider t) for JAX arrays and tracers."""
    if isinstance(t, jax.Array):
        return jnp, at_least_float32(t)
    return np, np.asarray(t, np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """x_t = alpha(t) x_0 + sigma(t) eps, and the range of t; made by `vp_path`, `flow_path` and kin.

    Attributes:
        name: "vp", "continuous_vp", "edm", "flow", or "linear_interpolant" and the like.
        t_clean: where alpha = 1 and sigma = 0: the data.
        t_min: the cleanest t that a network is trained on, where a grid with `final="sigma_min"` stops.
        t_noisy: the noisiest t.
        num_train_timesteps: T for discrete paths, None for continuous ones.
        default_sigmas: how `make_grid` spaces sigma / alpha when nothing is asked; None is "evenly in t".
        coefficients: t -> (alpha, sigma), for NumPy or JAX.
        time_of: sigma / alpha -> t, the inverse, for NumPy or JAX.
        draw: (key, shape) -> t, the training distribution.
        default_shift: the factor on sigma / alpha that `make_grid` uses when no shift is asked.
    """

    name: str
    t_clean: float
    t_min: float
    t_noisy: float
    num_train_timesteps: int | None
    default_sigmas: str | None
    coefficients: Callable[[Any, Any], tuple[Any, Any]]
    time_of: Callable[[Any, Any], Any]
    draw: Callable[[Any, Any], Any]
    default_shift: float = 1.0

    def alpha(self, t: Any) -> Any:
        """alpha(t), of t's shape."""
        xp, t = host_or_device(t)
        return self.coefficients(xp, t)[0]

    def sigma(self, t: Any) -> Any:
        """sigma(t), of t's shape."""
        xp, t = host_or_device(t)
        return self.coefficients(xp, t)[1]

    def time(self, sigma_over_alpha: Any) -> Any:
        """The t of that sigma / alpha; 0 gives `t_clean`. Discrete paths clamp at T - 1."""
        xp, ratio = host_or_device(sigma_over_alpha)
        return self.time_of(xp, ratio)

    def derivatives(self, t: Any) -> tuple[Any, Any]:
        """(d alpha/dt, d sigma/dt) at t, of t's shape, by automatic differentiation.

        The velocity of the path is alpha' x_0 + sigma' eps. On a discrete path these are the slopes of the
        interpolation between timesteps.

        >>> from jaxldm import diffusion as D
        >>> [round(float(slope), 3) for slope in D.edm_path().derivatives(3.0)]
        [0.0, 1.0]
        """

        def slopes(t):
            return jax.jvp(lambda t: self.coefficients(jnp, t), (t,), (jnp.ones_like(t),))[1]

        if isinstance(t, jax.Array):
            return slopes(at_least_float32(t))
        with jax.enable_x64(True):
            alpha, sigma = slopes(jnp.asarray(np.asarray(t, np.float64)))
            return np.asarray(alpha), np.asarray(sigma)

    def sample_time(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        """Draws t for training, one per example, float32; log-normal on EDM, else uniform unless asked."""
        return self.draw(key, shape)

    @property
    def zero_terminal_snr(self) -> bool:
        """True where the noisy end is pure noise: epsilon prediction is undefined there."""
        return bool(self.alpha(self.t_noisy) == 0)


def vp_path(betas: np.ndarray) -> Path:
    """DDPM's variance-preserving path: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), t in [0, T - 1].

    abar is the running product of 1 - beta (Ho et al. 2020, equation 4). Between two integers log(sigma /
    alpha) is linear in t, as in k-diffusion; below t = 0, sigma / alpha falls linearly to the clean image at
    t = -1, and with zero terminal SNR alpha / sigma falls linearly to 0 over the last step.

    Args:
        betas: [T], from `linear_betas` and kin or from a checkpoint.

    Raises:
        InvalidArgumentError: betas outside (0, 1).
    """
    alphas_cumprod = np.cumprod(1 - checked_betas(betas))
    last = len(alphas_cumprod) - 1
    ends_in_noise = bool(alphas_cumprod[-1] == 0)
    log_ratio = np.zeros(last + 1)
    finite = slice(0, last if ends_in_noise else last + 1)
    log_ratio[finite] = 0.5 * (np.log1p(-alphas_cumprod[finite]) - np.log(alphas_cumprod[finite]))
    log_ratio[-1] = log_ratio[-2] if ends_in_noise else log_ratio[-1]

    def coefficients(xp, t):
        table = xp.asarray(log_ratio, t.dtype)
        low = xp.clip(xp.floor(t), 0, last - 1).astype(np.int32)
        value = table[low] + (t - low.astype(t.dtype)) * (table[low + 1] - table[low])
        with np.errstate(divide="ignore", over="ignore"):
            value = xp.where(t < 0, table[0] + xp.log(xp.clip(t + 1, 0, 1)), value)
            if ends_in_noise:
                value = xp.where(t > last - 1, table[-1] - xp.log(xp.clip(last - t, 0, 1)), value)
            # 1 / sqrt(1 + e^{2 l}) is finite at both ends, l = -inf and l = +inf.
            return 1 / xp.sqrt(1 + xp.exp(2 * value)), 1 / xp.sqrt(1 + xp.exp(-2 * value))

    def time_of(xp, ratio):
        table = xp.asarray(log_ratio[finite], ratio.dtype)
        steps = xp.arange(len(table), dtype=ratio.dtype)
        with np.errstate(divide="ignore"):
            t = xp.interp(xp.log(ratio), table, steps)
            t = xp.where(ratio < xp.exp(table[0]), ratio / xp.exp(table[0]) - 1, t)
            if ends_in_noise:
                t = xp.where(ratio > xp.exp(table[-1]), last - xp.exp(table[-1]) / ratio, t)
        return t

    def draw(key, shape):
        return jax.random.randint(key, shape, 0, last + 1).astype(jnp.float32)

    return Path("vp", -1.0, 0.0, float(last), last + 1, None, coefficients, time_of, draw)


def vp_sde_coefficients(xp: Any, t: Any, beta_min: float, beta_max: float) -> tuple[Any, Any]:
    """exp(-B/2) and sqrt(1 - exp(-B)), B the integral of beta from 0 to t; see `continuous_vp_path`."""
    integral = t * (beta_min + t * ((beta_max - beta_min) / 2))
    return xp.exp(-integral / 2), safe_sqrt(xp, -xp.expm1(-integral))


def vp_sde_time(xp: Any, ratio: Any, beta_min: float, beta_max: float) -> Any:
    """The t in [0, 1] of a sigma / alpha: B(t) = log(1 + ratio^2), a quadratic in t."""
    most = np.sqrt(np.expm1((beta_min + beta_max) / 2))
    integral = xp.log1p(xp.minimum(ratio, float(most)) ** 2)
    root = xp.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * integral)
    return xp.minimum(2 * integral / (beta_min + root), 1.0)


def safe_sqrt(xp: Any, x: Any) -> Any:
    """sqrt(x), 0 at and below 0, with a gradient of 0 there instead of infinity."""
    positive = x > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, x, 1.0)), 0.0)


def continuous_vp_path(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Path:
    """The VP-SDE: alpha = exp(-B(t)/2), sigma = sqrt(1 - exp(-B(t))), t in [t_min, 1].

    Song et al. 2021, equation 33. B(t) = beta_min t + (beta_max - beta_min) t^2 / 2 is the integral of
    beta. It is the limit of `vp_path` of T betas from beta_min / T to beta_max / T, at t = (timestep + 1) /
    T. The network is told t in [0, 1].

    Raises:
        InvalidArgumentError: unless 0 < beta_min <= beta_max and 0 < t_min < 1.
    """
    if not (0 < beta_min <= beta_max < np.inf and 0 < t_min < 1):
        raise InvalidArgumentError(
            f"continuous_vp_path needs 0 < beta_min <= beta_max and 0 < t_min < 1, not "
            f"beta_min={beta_min}, beta_max={beta_max}, t_min={t_min}"
        )

    def coefficients(xp, t):
        return vp_sde_coefficients(xp, t, beta_min, beta_max)

    def time_of(xp, ratio):
        return vp_sde_time(xp, ratio, beta_min, beta_max)

    def draw(key, shape):
        return jax.random.uniform(key, shape, jnp.float32, t_min, 1.0)

    return Path("continuous_vp", 0.0, float(t_min), 1.0, None, None, coefficients, time_of, draw)


def edm_path(
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    log_sigma_mean: float = -1.2,
    log_sigma_std: float = 1.2,
) -> Path:
    """EDM's variance-exploding path: alpha = 1, sigma = t, t in [sigma_min, sigma_max] (Karras et al. 2022).

    Training draws ln sigma ~ N(log_sigma_mean, log_sigma_std^2) (table 1). Grids are Karras grids unless
    another spacing is asked. `sigma_data`, the standard deviation of the data, belongs to
    `edm_preconditioned`; it is checked here so that both can be given the same settings.

    Raises:
        InvalidArgumentError: unless 0 < sigma_min < sigma_max and sigma_data > 0.
    """
    if not (0 < sigma_min < sigma_max < np.inf and sigma_data > 0):
        raise InvalidArgumentError(
            f"edm_path needs 0 < sigma_min < sigma_max and sigma_data > 0, not "
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, sigma_data={sigma_data}"
        )

    def coefficients(xp, t):
        return xp.ones_like(t), t

    def time_of(xp, ratio):
        return ratio

    def draw(key, shape):
        return jnp.exp(log_sigma_mean + log_sigma_std * jax.random.normal(key, shape, jnp.float32))

    return Path("edm", 0.0, float(sigma_min), float(sigma_max), None, "karras", coefficients, time_of, draw)


def per_image(values: Any, x: Any) -> Any:
    """Numbers per image [B] as [B, 1, 1, 1] beside x [B, H, W, C]; scalars pass unchanged."""
    if np.ndim(values) == 0:
        return values
    chex.assert_shape(values, np.shape(x)[:1])
    return values.reshape(values.shape + (1,) * (np.ndim(x) - 1))
