"""DDIM backwards: from an image to the noise that DDIM draws it from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxldm.arguments import checked, count
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.diffusion.solvers.solver import Solver, State, divide, row
from jaxldm.diffusion.values import equal_by_call


@checked(iterations=count(1))
@equal_by_call
def ddim_inverse(iterations: int = 5) -> Solver:
    """The inverse of DDIM's step, on grids that rise from the clean row to the noisiest.

    DDIM goes from the noisier row t to row s with the eps found at t. Its inverse is the x_t whose eps leads
    to the x_s that is given, the fixed point of

        x_t = (alpha_t / alpha_s) x_s + (sigma_t - alpha_t sigma_s / alpha_s) eps(x_t, t)

    iterated from x_t = x_s. One iteration is DDIM inversion as published (Song et al. 2021, section 4.3;
    Mokady et al. 2023), of first order; more converge to the exact inverse (Pan et al. 2023), where drawing
    from the noise gives the image back. At pure noise, where x leaves eps undefined, x_0 is in the place of
    eps. Every iteration is an evaluation.

        rising = D.Grid(*(column[::-1] for column in grid[:3]))
        noise = D.sample(key, denoise, D.solvers.ddim_inverse(), rising, x_0)

    Args:
        iterations: how many.
    """

    def step(state, denoise, grid, i, keys):
        x, clean, noisy = state.x, row(grid, i), row(grid, i + 1)
        ratio = noisy.alpha / clean.alpha
        to_noise = divide(noisy.sigma, clean.sigma, 1.0)

        def iterate(_, found):
            y, _ = found
            x_0 = denoise(y, noisy.t)
            epsilon = implied_noise(x_0, y, noisy.alpha, noisy.sigma)
            by_epsilon = ratio * x + (noisy.sigma - ratio * clean.sigma) * epsilon
            by_x_0 = to_noise * x - to_noise * clean.alpha * x_0
            return jnp.where(noisy.alpha == 0, by_x_0, by_epsilon), x_0

        y, x_0 = jax.lax.fori_loop(0, iterations, iterate, (x, jnp.zeros_like(x)))
        return State(y), x_0

    return Solver(State, step)
