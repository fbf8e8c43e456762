"""Samplers of distilled models: latent consistency and trajectory consistency."""

from __future__ import annotations

import jax.numpy as jnp

from jaxldm.arguments import checked, flag, number
from jaxldm.diffusion.solvers.solver import Row, Solver, State, divide, move, noise_like, path_of, row
from jaxldm.diffusion.values import equal_by_call


@checked(from_t_min=flag, s_noise=number(0))
@equal_by_call
def lcm(from_t_min: bool = False, s_noise: float = 1.0) -> Solver:
    """Multistep consistency sampling (Luo et al. 2023): x_s = alpha_s x_0 + sigma_s z with fresh noise z.

    To the clean image in one jump and back up (Song et al. 2023, Algorithm 1; Luo et al., Algorithm 3). Exact
    for a consistency model, whose x_0 is where the ODE ends, so a few steps suffice; an ordinary
    denoiser's x_0 is a mean, and samples made of it have too little variance. See `consistency_function`,
    `lcm_timesteps`.

    Args:
        from_t_min: x_0 is where the ODE is at the path's `t_min`, and has its noise m = sigma / alpha
            already: n = sqrt(sigma_s^2 - (alpha_s m)^2) in the place of sigma_s. So in Song et al. 2023, on a
            grid with `final="sigma_min"`.
        s_noise: the standard deviation of z.

    Raises:
        InvalidArgumentError: a negative s_noise; `from_t_min` with a denoiser that does not know its path.
    """

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        std = there.sigma
        if from_t_min:
            path = path_of(denoise, "lcm(from_t_min=True)")
            held = there.alpha * (path.sigma(path.t_min) / path.alpha(path.t_min))
            std = jnp.sqrt(jnp.maximum((std - held) * (std + held), 0))
        return State(there.alpha * x_0 + s_noise * std * noise_like(keys, x_0)), x_0

    return Solver(State, step)


@checked(gamma=number(0, 1, note="(0 is deterministic)"))
@equal_by_call
def tcd(gamma: float = 0.3) -> Solver:
    """Strategic stochastic sampling (Zheng et al. 2024): past row s to r = (1 - gamma) s, and back up.

        x_r = alpha_r x_0 + sigma_r eps
        x_s = (alpha_s / alpha_r) x_r + sqrt(sigma_s^2 - (alpha_s / alpha_r)^2 sigma_r^2) z

    The paper's Algorithm 4. On discrete paths r is rounded down to a timestep, as the authors do.

    Args:
        gamma: 0 is deterministic (`ddim`), 1 throws all of eps away (`lcm`). "eta" in other software.

    Raises:
        InvalidArgumentError: gamma outside [0, 1]; a denoiser that does not know its path.
    """

    def step(state, denoise, grid, i, keys):
        path, here, there = path_of(denoise, "tcd"), row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        if gamma == 0:
            return State(move(state.x, x_0, here, there)), x_0
        r = (1 - gamma) * there.t
        r = r if path.num_train_timesteps is None else jnp.floor(r)
        r = jnp.minimum(r, there.t)  # the clean row of a discrete path is at -1
        beyond = Row(r, path.alpha(r), path.sigma(r))
        x_r = move(state.x, x_0, here, beyond)
        q = divide(beyond.sigma * there.alpha, there.sigma * beyond.alpha, 1.0)
        std = there.sigma * jnp.sqrt(jnp.maximum((1 - q) * (1 + q), 0))
        return State(there.alpha / beyond.alpha * x_r + std * noise_like(keys, x_r)), x_0

    return Solver(State, step)
