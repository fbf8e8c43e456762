"""DDPM's ancestral sampling (Ho, Jain and Abbeel 2020)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxldm.arguments import checked, flag
from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.solvers.solver import Solver, State, divide, move, noise_like, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError, one_of

VARIANCES = ("small", "large", "learned")


@checked(final_noise=flag)
@equal_by_call
def ddpm(variance: str = "small", final_noise: bool = True) -> Solver:
    """Ho et al. 2020, equations 6 and 7, between any two rows of any path.

    With q = (sigma_s / alpha_s) / (sigma_t / alpha_t), the posterior q(x_s | x_t, x_0) is

        mean = alpha_s x_0 + q sigma_s eps,    variance = sigma_s^2 (1 - q^2).

    On the variance-preserving path these are the paper's. No noise is added on arrival at the clean row.

    Args:
        variance: "small" is the posterior's; "large" is the forward step's, sigma_t^2 (1 - q^2), the paper's
            beta_t. "learned" lies between them, log variance = v log large + (1 - v) log small, where the
            network predicts v for every number of the image (Nichol and Dhariwal 2021, equation 15): it needs
            `denoiser(..., learned_variance=True)`. All three are used by published checkpoints.
        final_noise: False adds none on arrival at the last row, wherever it lies: Wuerstchen ends at a mean
            that is not quite clean.

    Raises:
        UnknownNameError: another variance.
        InvalidArgumentError: "learned" with a denoiser that has no variance.
    """
    one_of("variance", variance, VARIANCES)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        if variance == "learned":
            x_0, v = predict_with_variance(denoise, state.x, here.t)
        else:
            x_0, v = denoise(state.x, here.t), 0.0 if variance == "small" else 1.0
        q = divide(there.sigma * here.alpha, here.sigma * there.alpha, 0.0)
        mean = move(state.x, x_0, here, there._replace(sigma=q * there.sigma))
        arrives = there.sigma == 0
        if not final_noise:
            arrives |= i + 1 == steps_in(grid)
        scale = here.sigma**v * jnp.where(arrives, 1, there.sigma) ** (1 - v)
        std = jnp.where(arrives, 0, scale * jnp.sqrt((1 - q) * (1 + q)))
        return State(mean + std * noise_like(keys, mean)), x_0

    return Solver(State, step)


def predict_with_variance(denoise, x, t):
    """(x_0, v), both of x's shape."""
    if getattr(denoise, "with_variance", None) is None:
        raise InvalidArgumentError(
            "ddpm('learned') needs a network with learned variance (2C output channels): "
            "D.denoiser(..., learned_variance=True); for others use ddpm('small') or ddpm('large')"
        )
    return denoise.with_variance(x, jnp.full(x.shape[:1], t))
