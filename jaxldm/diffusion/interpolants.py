"""Stochastic interpolants (Albergo et al. 2023; SiT, Ma et al. 2024) as paths.

Here t = 1 is noise and t = 0 data, as on every path of this library; SiT counts the other way, t_SiT = 1 - t,
and its velocity has the opposite sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm.diffusion.paths import (
    Path,
    host_or_device,
    per_image,
    safe_sqrt,
    vp_sde_coefficients,
    vp_sde_time,
)
from jaxldm.diffusion.rectified_flow import check_time_distribution, draw_time, flow_time
from jaxldm.diffusion.sampling import Denoiser
from jaxldm.errors import InvalidArgumentError, one_of

INTERPOLANTS = ("linear", "gvp", "vp")
_VP_BETAS = (0.1, 20.0)  # SiT's VP interpolant is the VP-SDE of Song et al. 2021


def interpolant_gamma(t: Any, smin: float = 0.001, smax: float = 0.1) -> Any:
    """gamma(t) = smin + (smax - smin) sqrt(t (1 - t)) for t in [0, 1], of t's shape.

    smin at both ends and (smin + smax) / 2 in the middle, where its slope is 0. At the ends the slope is
    infinite; automatic differentiation gives 0 there.

    >>> float(interpolant_gamma(0.5))
    0.0505
    """
    xp, t = host_or_device(t)
    return _gamma(xp, t, smin, smax)


def _gamma(xp, t, smin, smax):
    return smin + (smax - smin) * safe_sqrt(xp, t * (1 - t))


def interpolant_path(
    name: str = "linear",
    *,
    gamma: tuple[float, float] | None = None,
    t_min: float = 1e-3,
    time_distribution: str = "uniform",
) -> Path:
    """SiT's interpolants: x_t = alpha(t) x_0 + beta(t) eps + gamma(t) z, t in [0, 1] (Ma et al. 2024).

    "linear": alpha = 1 - t, beta = t (rectified flow). "gvp": alpha = cos(pi t/2), beta = sin(pi t/2). "vp":
    the VP-SDE of `continuous_vp_path()`. eps and z are independent, so given x_0 the marginal is Gaussian and
    all that a denoiser or solver can see is sigma(t) = sqrt(beta^2 + gamma^2).

    Args:
        name: "linear", "gvp" or "vp".
        gamma: (smin, smax) of `interpolant_gamma`, or None for gamma = 0. With smin > 0 the image keeps noise
            smin at t = 0; sigma falls to 0 at `t_clean` = -smin, where no network is asked.
        t_min: the cleanest t that is trained, and the end of grids with `final="sigma_min"`.
        time_distribution: of training, see `flow_path`; "vp" draws uniformly from [t_min, 1].

    Raises:
        UnknownNameError: another name or time distribution.
        InvalidArgumentError: unless 0 < t_min < 1 and 0 <= smin <= smax, or where smax is so large that
            sigma / alpha would fall somewhere.

    >>> from jaxldm import diffusion as D
    >>> [round(float(f(0.5)), 4) for f in (D.interpolant_path("gvp").alpha, D.interpolant_path("gvp").sigma)]
    [0.7071, 0.7071]
    """
    one_of("interpolant", name, INTERPOLANTS)
    check_time_distribution(time_distribution)
    if not 0 < t_min < 1:
        raise InvalidArgumentError(f"interpolant_path needs 0 < t_min < 1, not {t_min}")
    smin, smax = _checked_gamma(gamma)

    def coefficients(xp, t):
        if gamma is None:
            return _interpolant(xp, name, t)
        inside = xp.clip(t, 0.0, 1.0)
        alpha, beta = _interpolant(xp, name, inside)
        sigma = safe_sqrt(xp, beta**2 + _gamma(xp, inside, smin, smax) ** 2)
        return alpha, xp.where(t < 0, smin + t, sigma)

    def time_of(xp, ratio):
        if gamma is None:
            return _interpolant_time(xp, name, ratio)
        t = _solve_time(xp, coefficients, xp.maximum(ratio, smin))
        t = xp.where(xp.isinf(ratio), 1.0, t)
        return xp.where(ratio <= smin, ratio - smin, t)

    def draw(key, shape):
        if name == "vp":
            return jax.random.uniform(key, shape, jnp.float32, t_min, 1.0)
        return draw_time(key, shape, time_distribution)

    alpha, sigma = coefficients(np, np.linspace(-smin, 1, 4097))
    if not (np.diff(np.arctan2(sigma, alpha)) > 0).all():
        raise InvalidArgumentError(
            f"gamma={gamma} is too large for the {name} interpolant: sigma / alpha would not grow with t"
        )
    return Path(f"{name}_interpolant", 0.0 - smin, float(t_min), 1.0, None, None, coefficients, time_of, draw)


def _checked_gamma(gamma: tuple[float, float] | None) -> tuple[float, float]:
    if gamma is None:
        return 0.0, 0.0
    smin, smax = (float(value) for value in gamma)
    if not 0 <= smin <= smax < np.inf:
        raise InvalidArgumentError(f"gamma is (smin, smax) with 0 <= smin <= smax, not {gamma}")
    return smin, smax


def _interpolant(xp, name, t):
    """(alpha, beta) without gamma. sin(pi/2 (1 - t)) is the cosine that is exactly 0 at t = 1."""
    if name == "linear":
        return 1 - t, t
    if name == "gvp":
        return xp.sin(np.pi / 2 * (1 - t)), xp.sin(np.pi / 2 * t)
    return vp_sde_coefficients(xp, t, *_VP_BETAS)


def _interpolant_time(xp, name, ratio):
    if name == "linear":
        return flow_time(xp, ratio)
    if name == "gvp":
        return 2 / np.pi * xp.arctan(ratio)
    return vp_sde_time(xp, ratio, *_VP_BETAS)


def _solve_time(xp, coefficients, ratio):
    """t in [0, 1] of a sigma / alpha by halving; on the device a last Newton step makes it differentiable.

    Angles arctan(sigma / alpha) are compared: they are finite at pure noise.
    """
    angle = xp.arctan(ratio)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        alpha, sigma = coefficients(xp, middle)
        below = xp.arctan2(sigma, alpha) < angle
        return xp.where(below, middle, low), xp.where(below, high, middle)

    ends = xp.zeros_like(ratio), xp.ones_like(ratio)
    if xp is np:
        for i in range(60):
            ends = halve(i, ends)
        return (ends[0] + ends[1]) / 2
    halvings = 30 if ratio.dtype == jnp.float32 else 60
    low, high = jax.lax.fori_loop(0, halvings, halve, jax.lax.stop_gradient(ends))
    t = jax.lax.stop_gradient((low + high) / 2)
    found, slope = jax.jvp(lambda t: jnp.arctan2(*coefficients(xp, t)[::-1]), (t,), (jnp.ones_like(t),))
    return jnp.clip(t - (found - angle) / jax.lax.stop_gradient(slope), 0.0, 1.0)


def velocity_to_x0(velocity: Any, x_t: Any, t: Any, path: Path) -> Any:
    """The clean image [B, H, W, C] that a velocity alpha' x_0 + sigma' eps at x_t stands for, on any path.

    x_0 = (sigma' x_t - sigma velocity) / (sigma' alpha - sigma alpha'); t is a number or one per image [B].
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    alpha_slope, sigma_slope = path.derivatives(t)
    x_scale = sigma_slope / (sigma_slope * alpha - sigma * alpha_slope)
    velocity_scale = sigma / (sigma_slope * alpha - sigma * alpha_slope)
    return per_image(x_scale, x_t) * x_t - per_image(velocity_scale, x_t) * velocity


def velocity_denoiser(predict: Callable[[Any, Any], Any], path: Path) -> Denoiser:
    """`denoise(x, t) -> x_0` of a network that predicts alpha' x_0 + sigma' eps, SiT's objective.

    On the linear path that is the `flow` prediction, on GVP pi/2 times `v_prediction`; this one serves every
    continuous path, gamma included (sigma sigma' = beta beta' + gamma gamma').

    Args:
        predict: (x [B, H, W, C], t [B]) -> velocity [B, H, W, C].

    Raises:
        InvalidArgumentError: a discrete path, which has no velocity.
    """
    if path.num_train_timesteps is not None:
        raise InvalidArgumentError(
            "a discrete path has no velocity: use D.denoiser(predict, path, prediction='v_prediction')"
        )
    return Denoiser(lambda x, t: velocity_to_x0(predict(x, t).astype(x.dtype), x, t, path), path)
