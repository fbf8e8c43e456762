"""DPM2: Karras's second-order step with its midpoint in log sigma, and its ancestral form (k-diffusion)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxldm.arguments import checked, number
from jaxldm.diffusion.solvers.euler import ANCESTRAL_FORMS, ancestral_split
from jaxldm.diffusion.solvers.solver import Row, Solver, State, divide, move, noise_like, path_of, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of


@equal_by_call
def dpm2() -> Solver:
    """The midpoint method for d(x/alpha) / dr = eps, r = sigma / alpha, with its middle in log r.

    An Euler step goes to the middle, where eps is evaluated again and used for the whole step:

        x_s / alpha_s = x_t / alpha_t + (r_s - r_t) eps(x_mid, sqrt(r_t r_s)).

    Second order, two evaluations a step: DPM-Solver-2 (Lu et al. 2022, Algorithm 1 with r_1 = 1/2) as
    k-diffusion's `sample_dpm_2` took it over. Steps that start at pure noise or end clean, where log r is
    infinite, are Euler steps, so N steps to the clean image take 2 N - 1 evaluations.

    Raises:
        InvalidArgumentError: when sampling, a denoiser that does not know its path.
    """
    return dpm2_ancestral(eta=0.0)


@checked(eta=number(0), s_noise=number(0))
@equal_by_call
def dpm2_ancestral(eta: float = 1.0, s_noise: float = 1.0, form: str = "karras") -> Solver:
    """k-diffusion's `sample_dpm_2_ancestral` on every path: DPM2 down to r_down, and noise back up to row s.

    r_down = kept r_s and the fresh noise are those of `euler_ancestral`, which describes the arguments; the
    middle lies at r_mid = sqrt(r_t r_down), which is r_s for eta = 1. The midpoint rule is the Euler step
    plus alpha_s (r_t - r_down) / r_mid (x_0(x_mid) - x_0), and so it is written.

    Args:
        eta: 0 is `dpm2` and draws no noise.
        s_noise: multiplies the fresh noise.
        form: "karras" or "rectified_flow".

    Raises:
        InvalidArgumentError: eta or s_noise below 0; when sampling, a denoiser that does not know its path.
        UnknownNameError: another form.
    """
    one_of("form", form, ANCESTRAL_FORMS)

    def step(state, denoise, grid, i, keys):
        path = path_of(denoise, "dpm2" if eta == 0 else "dpm2_ancestral")
        x, here, there = state.x, row(grid, i), row(grid, i + 1)
        kept, fresh = ancestral_split(here, there, eta, form) if eta > 0 else (1.0, 0.0)
        down = there._replace(sigma=kept * there.sigma)
        x_0 = denoise(x, here.t)
        euler = move(x, x_0, here, down)
        q = divide(down.sigma * here.alpha, here.sigma * down.alpha, 0.0)  # r_down / r_t; 0 at either end
        root = jnp.sqrt(jnp.where(q > 0, q, 1))

        def midpoint(euler):
            t = path.time(root * divide(here.sigma, here.alpha, 1.0))
            middle = Row(t, path.alpha(t), path.sigma(t))
            change = denoise(move(x, x_0, here, middle), t) - x_0
            return euler + down.alpha * (1 - q) / root * change

        x = jax.lax.cond(q > 0, midpoint, lambda euler: euler, euler)
        if eta > 0:
            x = x + s_noise * fresh * there.sigma * noise_like(keys, x)
        return State(x), x_0

    return Solver(State, step)
