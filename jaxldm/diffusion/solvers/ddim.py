"""DDIM (Song, Meng and Ermon 2021)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxldm.arguments import checked, flag, number
from jaxldm.diffusion.solvers.solver import Solver, State, divide, move, noise_like, row
from jaxldm.diffusion.values import equal_by_call


@checked(eta=number(0, 1, note="(0 is deterministic, 1 is DDPM)"), keeps_epsilon=flag)
@equal_by_call
def ddim(eta: float = 0.0, keeps_epsilon: bool = False) -> Solver:
    """Song et al. 2021, equations 12 and 16, on every path.

    With q = (sigma_s / alpha_s) / (sigma_t / alpha_t), the step from row t to the cleaner row s is

        std = eta sigma_s sqrt(1 - q^2)
        x_s = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps + std z.

    On the variance-preserving path std is the paper's eta sqrt((1 - abar_s)/(1 - abar_t)) sqrt(1 -
    abar_t/abar_s), written so that nothing is lost in float32 and both ends are finite.

    Args:
        eta: 0 is deterministic (first order; it draws no noise at all), 1 is DDPM.
        keeps_epsilon: where x_0 is clipped, keep the eps that the network predicted with the x_0 before: x_s
            then lies on no row of the path (`use_clipped_model_output=False` in diffusers).

    Raises:
        InvalidArgumentError: eta outside [0, 1].
    """

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x, both = state.x, getattr(denoise, "with_unchanged", None)
        if keeps_epsilon and both is not None:
            x_0, predicted = both(x, jnp.full(x.shape[:1], here.t))
            x = x + here.alpha * (x_0 - predicted)  # the x whose eps with this x_0 is the network's
        else:
            x_0 = denoise(x, here.t)
        if eta == 0:
            return State(move(x, x_0, here, there)), x_0
        q = divide(there.sigma * here.alpha, here.sigma * there.alpha, 0.0)
        std = eta * there.sigma * jnp.sqrt((1 - q) * (1 + q))
        direction = there.sigma * jnp.sqrt(1 - eta**2 * (1 - q) * (1 + q))
        x = move(x, x_0, here, there._replace(sigma=direction))
        return State(x + std * noise_like(keys, x)), x_0

    return Solver(State, step)
