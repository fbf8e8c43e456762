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

from jaxldm.errors import InvalidArgumentError, one_of

TIME_DISTRIBUTIONS = ("uniform", "logit_normal")


def linear_betas(
    num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> np.ndarray:
    """Betas that rise linearly, float64 [T] (Ho et al. 2020, section 4).

    Raises:
        InvalidArgumentError: fewer than two timesteps, or betas outside (0, 1).
    """
    return _checked_betas(np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64))


def scaled_linear_betas(
    num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> np.ndarray:
    """Betas whose square roots rise linearly, float64 [T] (latent diffusion, Rombach et al. 2022)."""
    roots = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64)
    return _checked_betas(roots**2)


def cosine_betas(num_train_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """beta_t = min(1 - f(t+1)/f(t), max_beta), f(t) = cos^2(pi/2 (t/T + s)/(1 + s)), float64 [T].

    Nichol and Dhariwal 2021, equation 17. The clip keeps the last beta below 1.
    """
    t = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    f = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2
    return _checked_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(alphas_cumprod) so that its last value is 0 and its first is kept, float64 [T].

    The last beta becomes exactly 1. A network that predicts epsilon tells nothing about x_0 there: train with
    `v_prediction` and sample with `trailing` spacing (Lin et al. 2023, Algorithm 1).

    >>> rescale_zero_terminal_snr(linear_betas())[-1]
    np.float64(1.0)
    """
    root = np.sqrt(np.cumprod(1 - _checked_betas(betas)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def _checked_betas(betas: Any) -> np.ndarray:
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size < 2:
        raise InvalidArgumentError(f"betas must be a list of at least 2 numbers, not of shape {betas.shape}")
    if not np.all((betas > 0) & (betas[-1] <= 1)) or not np.all(betas[:-1] < 1):
        raise InvalidArgumentError("every beta must lie in (0, 1); the last may be 1 (zero terminal SNR)")
    return betas


def at_least_float32(x: Array) -> Array:
    """x as it is in float32 or float64, and as float32 in anything less: schedules never run in bfloat16."""
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if wide else x.astype(jnp.float32)


def _host_or_device(t: Any) -> tuple[Any, Any]:
    """(numpy, float64 t) for host numbers, (jax.numpy, float32 or wider t) for JAX arrays and tracers."""
    if isinstance(t, jax.Array):
        return jnp, at_least_float32(t)
    return np, np.asarray(t, np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """x_t = alpha(t) x_0 + sigma(t) eps, and the range of t; made by `vp_path`, `edm_path`, `flow_path`.

    Attributes:
        name: "vp", "edm" or "flow".
        t_clean: where alpha = 1 and sigma = 0: the data.
        t_min: the cleanest t that a network is trained on, where a grid with `final="sigma_min"` stops.
        t_noisy: the noisiest t.
        num_train_timesteps: T for discrete paths, None for continuous ones.
        default_sigmas: how `make_grid` spaces sigma / alpha when nothing is asked; None is "evenly in t".
        coefficients: t -> (alpha, sigma), for NumPy or JAX.
        time_of: sigma / alpha -> t, the inverse, for NumPy or JAX.
        draw: (key, shape) -> t, the training distribution.
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

    def alpha(self, t: Any) -> Any:
        """alpha(t), of t's shape."""
        xp, t = _host_or_device(t)
        return self.coefficients(xp, t)[0]

    def sigma(self, t: Any) -> Any:
        """sigma(t), of t's shape."""
        xp, t = _host_or_device(t)
        return self.coefficients(xp, t)[1]

    def time(self, sigma_over_alpha: Any) -> Any:
        """The t of that sigma / alpha; 0 gives `t_clean`. Discrete paths clamp at T - 1."""
        xp, ratio = _host_or_device(sigma_over_alpha)
        return self.time_of(xp, ratio)

    def sample_time(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        """Draws t for training, one per example, float32: uniform on VP and flow, log-normal sigma on EDM."""
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
    alphas_cumprod = np.cumprod(1 - _checked_betas(betas))
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


def flow_path(t_min: float = 1e-3, time_distribution: str = "uniform") -> Path:
    """The straight path of rectified flow: alpha = 1 - t, sigma = t, t in [0, 1] (Liu et al. 2022).

    Args:
        t_min: the cleanest t of `linspace` spacing and of grids with `final="sigma_min"`.
        time_distribution: "uniform", or "logit_normal": t = sigmoid(N(0, 1)) (SD3, Esser et al. 2024, section
            3.1).

    Raises:
        InvalidArgumentError: unless 0 < t_min < 1.
        UnknownNameError: another time distribution.
    """
    one_of("time distribution", time_distribution, TIME_DISTRIBUTIONS)
    if not 0 < t_min < 1:
        raise InvalidArgumentError(f"flow_path needs 0 < t_min < 1, not {t_min}")

    def coefficients(xp, t):
        return 1 - t, t

    def time_of(xp, ratio):
        with np.errstate(divide="ignore"):
            return 1 / (1 + 1 / ratio)  # finite at 0 and at infinity, where ratio / (1 + ratio) is not

    def draw(key, shape):
        if time_distribution == "uniform":
            return jax.random.uniform(key, shape, jnp.float32)
        return jax.nn.sigmoid(jax.random.normal(key, shape, jnp.float32))

    return Path("flow", 0.0, float(t_min), 1.0, None, None, coefficients, time_of, draw)


def per_image(values: Any, x: Any) -> Any:
    """Numbers per image [B] as [B, 1, 1, 1] beside x [B, H, W, C]; scalars pass unchanged."""
    if np.ndim(values) == 0:
        return values
    chex.assert_shape(values, np.shape(x)[:1])
    return values.reshape(values.shape + (1,) * (np.ndim(x) - 1))
