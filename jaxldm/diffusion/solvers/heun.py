"""EDM's second-order sampler (Karras, Aittala, Aila and Laine 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxldm.arguments import checked, number
from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.solvers.solver import Row, Solver, State, move, noise_like, path_of, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError


@checked(s_churn=number(0), s_tmin=number(0), s_tmax=number(0, infinite=True), s_noise=number(0))
@equal_by_call
def heun(
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0
) -> Solver:
    """Karras et al. 2022, Algorithm 2, on every path: Heun's method for d(x/alpha) / d(sigma/alpha) = eps.

    With r = sigma / alpha, noise is first raised from r to (1 + gamma) r, gamma = min(s_churn / N, sqrt(2) -
    1) where s_tmin <= r <= s_tmax, by adding s_noise sqrt(r_hat^2 - r^2) z to x / alpha; then a Euler step is
    corrected by the trapezoid rule. Steps that start at pure noise (alpha = 0) or end clean are Euler steps,
    so N steps to the clean image take 2 N - 1 evaluations. Second order.

    Args:
        s_churn: 0 is deterministic; 40 to 80 in the paper.
        s_tmin: no noise is added below this sigma / alpha.
        s_tmax: nor above this one. A discrete path's noisy end is a bound too.
        s_noise: standard deviation of the added noise (1.003 to 1.007 in the paper).

    Raises:
        InvalidArgumentError: negative settings; with churn, a denoiser that does not know its path.
    """
    if s_tmax < s_tmin:
        raise InvalidArgumentError(f"s_tmax must be at least s_tmin = {s_tmin:g}, got {s_tmax:g}")

    def step(state, denoise, grid, i, keys):
        x, here, there = state.x, row(grid, i), row(grid, i + 1)
        if s_churn > 0:
            path = path_of(denoise, "heun with s_churn")
            gamma = jnp.minimum(s_churn / jnp.asarray(steps_in(grid), x.dtype), 2**0.5 - 1)
            finite = here._replace(alpha=jnp.where(here.alpha == 0, 1, here.alpha))
            ratio = finite.sigma / finite.alpha
            raised = raise_noise(x, finite, path, gamma, s_noise, keys)
            churn = (ratio >= s_tmin) & (ratio <= s_tmax) & (here.alpha > 0)
            x, here = jax.tree.map(lambda new, old: jnp.where(churn, new, old), raised, (x, here))
        x_0 = denoise(x, here.t)
        euler = move(x, x_0, here, there)

        def trapezoid(euler):
            # eps, averaged over both ends; width is alpha_s (r_s - r_t).
            width = there.sigma - there.alpha * here.sigma / here.alpha
            first = (x - here.alpha * x_0) / here.sigma
            second = (euler - there.alpha * denoise(euler, there.t)) / there.sigma
            return euler + 0.5 * width * (second - first)

        corrects = (there.sigma > 0) & (here.sigma > 0) & (here.alpha > 0)
        return State(jax.lax.cond(corrects, trapezoid, lambda euler: euler, euler)), x_0

    return Solver(State, step)


def raise_noise(x, here, path, gamma, s_noise, keys):
    """x and its row at (1 + gamma) times the sigma / alpha: Karras et al. 2022, Algorithm 2, lines 4 to 6."""
    t = path.time((1 + gamma) * here.sigma / here.alpha)
    hat = Row(t, path.alpha(t), path.sigma(t))
    variance = jnp.maximum((hat.sigma / hat.alpha) ** 2 - (here.sigma / here.alpha) ** 2, 0)
    return hat.alpha * (x / here.alpha + s_noise * jnp.sqrt(variance) * noise_like(keys, x)), hat
