"""Stochastic interpolants (Albergo et al. 2023; SiT, Ma et al. 2024) as paths.

Here t = 1 is noise and t = 0 data, as on every path of this library; SiT counts the other way, t_SiT = 1 - t,
and its velocity has the opposite sign.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real

from jaxldm.arguments import check_fields, checked, number, optional, refuse, several
from jaxldm.diffusion.paths import (
    Path,
    host_or_device,
    safe_sqrt,
    vp_sde_coefficients,
    vp_sde_time,
)
from jaxldm.diffusion.rectified_flow import flow_time
from jaxldm.errors import InvalidArgumentError, one_of

INTERPOLANTS = ("linear", "gvp", "vp")
_VP_BETAS = (0.1, 20.0)  # SiT's VP interpolant is the VP-SDE of Song et al. 2021


@checked(smin=number(), smax=number())
def interpolant_gamma(
    t: Real[Any, " *shape"] | float, smin: float = 0.001, smax: float = 0.1
) -> Float[Any, " *shape"]:
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


def a_pair(name: str, value: Any) -> tuple[float, ...]:
    """(smin, smax)."""
    pair = several(number())(name, value)
    if len(pair) != 2:
        raise refuse(name, "(smin, smax)", value)
    return pair


@dataclasses.dataclass(frozen=True)
class Interpolant(Path):
    """SiT's interpolants: x_t = alpha(t) x_0 + beta(t) eps + gamma(t) z, t in [0, 1] (Ma et al. 2024).

    "linear": alpha = 1 - t, beta = t (rectified flow). "gvp": alpha = cos(pi t/2), beta = sin(pi t/2). "vp":
    the VP-SDE of `ContinuousVP()`. eps and z are independent, so given x_0 the marginal is Gaussian and all
    that a denoiser or solver can see is sigma(t) = sqrt(beta^2 + gamma^2).

    Attributes:
        kind: "linear", "gvp" or "vp".
        gamma: (smin, smax) of `interpolant_gamma`, or None for gamma = 0. With smin > 0 the image keeps noise
            smin at t = 0; sigma falls to 0 at `t_clean` = -smin, where no network is called.
        t_min: the end of grids with `final="sigma_min"`. Training draws t from 0 on ("vp": from t_min on).

    Raises:
        UnknownNameError: another kind.
        InvalidArgumentError: unless 0 < t_min < 1 and 0 <= smin <= smax, or where smax is so large that
            sigma / alpha would fall somewhere.

    >>> from jaxldm import diffusion as D
    >>> [round(float(f(0.5)), 4) for f in (D.Interpolant("gvp").alpha, D.Interpolant("gvp").sigma)]
    [0.7071, 0.7071]
    """

    kind: str = "linear"
    gamma: tuple[float, float] | None = dataclasses.field(default=None, kw_only=True)
    t_min: float = dataclasses.field(default=1e-3, kw_only=True)

    def __post_init__(self):
        check_fields(self, gamma=optional(a_pair), t_min=number(above=0, below=1))
        one_of("kind of interpolant", self.kind, INTERPOLANTS)
        if self.gamma is None:
            return
        smin, smax = self.gamma
        if not 0 <= smin <= smax < np.inf:
            raise InvalidArgumentError(f"gamma is (smin, smax) with 0 <= smin <= smax, got {self.gamma}")
        alpha, sigma = self.coefficients(np, np.linspace(-smin, 1, 4097))
        if not (np.diff(np.arctan2(sigma, alpha)) > 0).all():
            raise InvalidArgumentError(
                f"gamma={self.gamma} is too large for the {self.kind} interpolant: sigma / alpha would not "
                "grow with t"
            )

    @property
    def name(self) -> str:
        """ "linear_interpolant" and so on."""
        return f"{self.kind}_interpolant"

    @property
    def t_clean(self) -> float:
        """-smin, or 0 without gamma."""
        return 0.0 if self.gamma is None else 0.0 - self.gamma[0]

    @property
    def t_train_min(self) -> float:
        """0, except for "vp", whose velocity is infinite there."""
        return self.t_min if self.kind == "vp" else 0.0

    def coefficients(
        self, xp: Any, t: Float[Any, " *shape"]
    ) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
        """alpha and sqrt(beta^2 + gamma^2)."""
        if self.gamma is None:
            return _interpolant(xp, self.kind, t)
        inside = xp.clip(t, 0.0, 1.0)
        alpha, beta = _interpolant(xp, self.kind, inside)
        sigma = safe_sqrt(xp, beta**2 + _gamma(xp, inside, *self.gamma) ** 2)
        return alpha, xp.where(t < 0, self.gamma[0] + t, sigma)

    def time_of(self, xp: Any, ratio: Float[Any, " *shape"]) -> Float[Any, " *shape"]:
        """In closed form without gamma, by halving with it."""
        if self.gamma is None:
            return _interpolant_time(xp, self.kind, ratio)
        smin = self.gamma[0]
        t = _solve_time(xp, self.coefficients, xp.maximum(ratio, smin))
        t = xp.where(xp.isinf(ratio), 1.0, t)
        return xp.where(ratio <= smin, ratio - smin, t)


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
