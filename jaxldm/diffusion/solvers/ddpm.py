"""DDPM's ancestral sampling (Ho, Jain and Abbeel 2020)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxldm.diffusion.solvers.solver import Solver, State, divide, move, noise_like, row
from jaxldm.errors import one_of

VARIANCES = ("small", "large")


def ddpm(variance: str = "small") -> Solver:
    """Ho et al. 2020, equations 6 and 7, between any two rows of any path.

    With q = (sigma_s / alpha_s) / (sigma_t / alpha_t), the posterior q(x_s | x_t, x_0) is

        mean = alpha_s x_0 + q sigma_s eps,    variance = sigma_s^2 (1 - q^2).

    On the variance-preserving path these are the paper's. No noise is added on arrival at the clean row.

    Args:
        variance: "small" is the posterior's; "large" is the forward step's, sigma_t^2 (1 - q^2), the paper's
            beta_t. Both are used by published checkpoints.

    Raises:
        UnknownNameError: another variance.
    """
    one_of("variance", variance, VARIANCES)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        q = divide(there.sigma * here.alpha, here.sigma * there.alpha, 0.0)
        mean = move(state.x, x_0, here, there._replace(sigma=q * there.sigma))
        scale = there.sigma if variance == "small" else jnp.where(there.sigma == 0, 0, here.sigma)
        return State(mean + scale * jnp.sqrt((1 - q) * (1 + q)) * noise_like(keys, mean))

    return Solver(State, step)
