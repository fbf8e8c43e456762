"""Guidance scales that change along the way: functions t [B] -> w, to pass as a `guidance_scale`.

All numbers in them may be traced: another schedule compiles nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real, ScalarLike

from jaxldm.arguments import array, checked, is_tracer, number
from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.grids import A_GRID, Grid
from jaxldm.diffusion.guidance import GuidanceScale, check_scale, scale_at
from jaxldm.diffusion.paths import A_PATH, Path
from jaxldm.diffusion.solvers.solver import divide
from jaxldm.errors import InvalidArgumentError

SCALAR = array("real", axes=0)


def UNIT(name: str, value: Any) -> Any:
    """A number in [0, 1]; may be traced."""
    return value if is_tracer(value) else number(0, 1)(name, value)


@checked(grid=A_GRID)
def guidance_schedule(
    grid: Grid, scales: Sequence[float] | Float[Array, " N"] | Float[Array, "N B"]
) -> Callable[[Any], Any]:
    """One guidance scale for each step of a grid; elsewhere that of the nearest t.

    Args:
        grid: of N steps; a padded one of M has M, the last M - N of them without effect.
        scales: w, one per step [N], or one per step and image [N, B].

    Raises:
        InvalidArgumentError: another number of scales, or scales that are NaN, infinite or negative.

    >>> import jax.numpy as jnp
    >>> from jaxldm import diffusion as D
    >>> w = D.guidance_schedule(D.make_grid(D.Flow(), 4), [1.0, 2.0, 5.0, 1.0])
    >>> w(jnp.array([1.0, 0.75, 0.5, 0.25])).tolist()
    [1.0, 2.0, 5.0, 1.0]
    """
    scales = jnp.atleast_1d(jnp.asarray(check_scale("scales", scales, np.inf)))
    steps = grid.t.shape[0] - 1
    if scales.shape[0] != steps:
        raise InvalidArgumentError(
            f"a guidance schedule for {steps} steps needs as many scales, not {len(scales)}"
        )
    rows = jnp.asarray(grid.t)[:-1]

    def scale(t):
        nearest = jnp.argmin(jnp.abs(rows.astype(t.dtype)[None] - t[:, None]), axis=1)
        return scales[nearest] if scales.ndim == 1 else scales[nearest, jnp.arange(len(t))]

    return scale


@checked(path=A_PATH, low=SCALAR, high=SCALAR)
def guidance_interval(
    path: Path,
    guidance_scale: GuidanceScale,
    low: Float[Any, ""] | float = 0.0,
    high: Float[Any, ""] | float = jnp.inf,
) -> Callable[[Any], Any]:
    """w where low < sigma / alpha <= high, and 1 outside (Kynkaanniemi et al. 2024, equation 6).

    At high noise guidance costs diversity, at low noise it changes nothing: outside of the interval only the
    conditional branch is computed. In the paper's sigma: (0.28, 5.42] for EDM2-XXL on ImageNet-512.

    Args:
        path: of the network.
        guidance_scale: w inside, a number, one per image [B], or a function of t.
        low: of sigma / alpha.
        high: of sigma / alpha; the noisy end by default, pure noise included.

    Raises:
        InvalidArgumentError: a negative or NaN bound, low >= high, or a scale that `guide_branches` refuses.
    """
    if not callable(guidance_scale):
        guidance_scale = check_scale("guidance_scale", guidance_scale, np.inf)
    if not traced(low, high) and not 0 <= low < high:
        raise InvalidArgumentError(
            f"a guidance interval needs 0 <= low < high in sigma / alpha, not {low}, {high}"
        )

    def scale(t):
        w = scale_at(guidance_scale, t)
        ratio = divide(path.sigma(t), path.alpha(t), jnp.inf)
        inside = (ratio > jnp.asarray(low, t.dtype)) & (ratio <= jnp.asarray(high, t.dtype))
        return jnp.where(inside, jnp.broadcast_to(w, t.shape), 1)

    return scale


@checked(grid=A_GRID, eta=UNIT)
def cfg_plus_plus(
    grid: Grid, scale: ScalarLike | Real[Array, " B"], eta: ScalarLike = 0.0
) -> Callable[[Any], Any]:
    """CFG++ (Chung et al. 2024, Algorithm 2) as a schedule: w_i = scale / (1 - r_s / r_t), r = sigma / alpha.

    CFG++ guides x_0 alone and renoises with the unconditional eps, with a scale lambda in [0, 1]:

        x_s = alpha_s x_0(eps_u + lambda (eps_c - eps_u)) + sigma_s eps_u.

    A DDIM step from row t to row s with ordinary guidance w is the same when w (r_t - r_s) = lambda r_t: so
    CFG++ is ordinary guidance, strong while the noise falls slowly and lambda on the step onto the clean row.
    The identity holds for the steps of `ddim` and `euler`; the higher orders of other solvers keep their
    order, with these scales.

    Args:
        grid: of the run, falling.
        scale: lambda, a number or one per image [B].
        eta: of `ddim`; its direction is then sqrt(sigma_s^2 - std^2) long and not sigma_s. 1 for `ddpm`.

    Raises:
        InvalidArgumentError: lambda outside [0, 1].
    """
    scale = jnp.asarray(check_scale("scale", array("real", axes=(0, 1))("scale", scale), 1.0))
    alpha, sigma = jnp.asarray(grid.alpha), jnp.asarray(grid.sigma)
    q = divide(sigma[1:] * alpha[:-1], sigma[:-1] * alpha[1:], 0.0)
    direction = q * jnp.sqrt(1 - eta**2 * (1 - q) * (1 + q))
    strength = divide(1.0, 1 - direction, 1.0)  # padded rows are skipped: any finite number does
    if scale.ndim == 1:
        strength, scale = strength[:, None], scale[None]
    return guidance_schedule(grid, strength * scale.astype(strength.dtype))
