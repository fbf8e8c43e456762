"""Improved PNDM: Adams-Bashforth's weights on eps from the first step on (Zhang and Chen 2022)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxldm.diffusion.predictions import implied_noise
from jaxldm.diffusion.solvers.dpm import move_along
from jaxldm.diffusion.solvers.multistep import MultistepState, begin, remember
from jaxldm.diffusion.solvers.pndm import ADAMS_BASHFORTH
from jaxldm.diffusion.solvers.solver import Solver, row
from jaxldm.diffusion.values import equal_by_call


@equal_by_call
def ipndm() -> Solver:
    """Zhang and Chen 2022, iPNDM: DDIM's step with the Adams-Bashforth average of the last four eps.

        x_s = (alpha_s / alpha_t) (x_t - sigma_t e) + sigma_s e
        e = (55 eps_i - 59 eps_{i-1} + 37 eps_{i-2} - 9 eps_{i-3}) / 24

    The first three steps average as many as there are: no Runge-Kutta steps as in `pndm`. The weights are
    those of even steps. From pure noise the step is DDIM's.
    """

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        epsilon = implied_noise(x_0, state.x, here.alpha, here.sigma)
        known = jnp.where(here.alpha == 0, 0, jnp.minimum(state.taken, 3))
        weights = jnp.asarray(ADAMS_BASHFORTH, epsilon.dtype)[known]
        average = weights[0] * epsilon
        for k, past in enumerate(state.past):
            average = average + weights[k + 1] * past
        x = move_along(state.x, x_0, average - epsilon, here, there)
        return MultistepState(x, remember(epsilon, state.past), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 3), step)
