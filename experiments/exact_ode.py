"""Where a probability-flow ODE ends, as exactly as float64 has it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from scipy.integrate import solve_ivp

from jaxldm import diffusion as D

_END = 1e-6  # of the angle, where the data are


def follow(denoiser: Callable[[D.Path], D.Denoiser], path: D.Path, x: np.ndarray) -> np.ndarray:
    """Where the ODE takes x from the noisy end of a path, by SciPy's eighth-order solver; float64 is on.

    In the angle a = atan(sigma / alpha), for z = x / norm, every path has alpha = cos a and sigma = sin a:
    dz/da = cos(a) eps - sin(a) x_0 = (cos(a) z - x_0) / sin(a).

    Args:
        denoiser: path -> E[x_0 | x_t].
        path: where x lies.
        x: [B, ...], x_t at `path.t_noisy`.
    """
    circle = D.Interpolant("gvp")
    predict = jax.jit(lambda z, angle: denoiser(circle)(z, angle * 2 / np.pi))
    alpha, sigma = path.alpha(path.t_noisy), path.sigma(path.t_noisy)

    def slope(angle, z):
        z = z.reshape(x.shape)
        return ((np.cos(angle) * z - np.asarray(predict(z, angle))) / np.sin(angle)).ravel()

    span = (float(np.arctan2(sigma, alpha)), _END)
    solution = solve_ivp(
        slope, span, np.ravel(x) / np.hypot(alpha, sigma), method="DOP853", rtol=1e-9, atol=1e-10
    )
    return solution.y[:, -1].reshape(x.shape)
