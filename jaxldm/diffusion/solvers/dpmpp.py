"""DPM-Solver++, second order: multistep 2M and singlestep 2S (Lu, Zhou, Bao, Chen, Li and Zhu 2022).

Both integrate x_0 as a function of lambda = log(alpha / sigma), half the log-SNR: a DDIM step taken with a
corrected x_0. So both are finite at pure noise and at the clean row, where lambda is infinite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.solvers.solver import Row, Solver, divide, move, row


class MultistepState(NamedTuple):
    """x, the previous step's x_0, and how many steps have been taken."""

    x: Float[Array, "B ..."]
    x_0: Float[Array, "B ..."]
    taken: Any


class SinglestepState(NamedTuple):
    """x, and the x, x_0 and row from which the current pair of steps started."""

    x: Float[Array, "B ..."]
    base_x: Float[Array, "B ..."]
    base_x_0: Float[Array, "B ..."]
    taken: Any


def half_log_snr(row: Row) -> Float[Array, ""]:
    """lambda = log(alpha / sigma); -inf at pure noise, +inf at the clean row."""
    return jnp.log(row.alpha) - jnp.log(row.sigma)


def is_an_end(row: Row) -> Any:
    """Whether lambda is infinite here: the clean row, or pure noise."""
    return (row.sigma == 0) | (row.alpha == 0)


def dpmpp_2m(lower_order_final: bool = True) -> Solver:
    """Lu et al. 2022, Algorithm 2: one evaluation a step, the previous x_0 gives the slope.

        D = (1 + 1/(2 r)) x_0 - 1/(2 r) x_0_previous,    r = h_previous / h,    h = lambda_s - lambda_t
        x_s = (sigma_s / sigma_t) x_t - alpha_s (e^{-h} - 1) D

    The first step, and the step onto the clean row (h is infinite there), are of first order.

    Args:
        lower_order_final: in runs of fewer than 15 steps that do not end clean, take the last step in first
            order too, for stability, as the authors do.
    """

    def step(state, denoise, grid, i, keys):
        here, there, num_steps = row(grid, i), row(grid, i + 1), steps_in(grid)
        x_0 = denoise(state.x, here.t)
        h = half_log_snr(there) - half_log_snr(here)
        h_previous = half_log_snr(here) - half_log_snr(row(grid, jnp.maximum(i - 1, 0)))
        first_order = (state.taken == 0) | is_an_end(there)
        if lower_order_final:
            first_order |= (i == num_steps - 1) & (num_steps < 15)
        weight = jnp.where(first_order, 0, divide(h, 2 * h_previous, 0.0))
        corrected = x_0 + weight * (x_0 - state.x_0)
        return MultistepState(move(state.x, corrected, here, there), x_0, state.taken + 1)

    return Solver(lambda x: MultistepState(x, jnp.zeros_like(x), jnp.int32(0)), step)


def dpmpp_2s() -> Solver:
    """Lu et al. 2022, Algorithm 1, with rows of the grid as intermediate points: one evaluation a step.

    Steps come in pairs from row t over row s to row u: a first-order step to s, then, from x_t again,

        D = x_0(t) + (x_0(s) - x_0(t)) / (2 r),    r = h_s / h_u,    h = lambda - lambda_t
        x_u = (sigma_u / sigma_t) x_t - alpha_u (e^{-h_u} - 1) D.

    A last step that has no partner, or that ends clean, is of first order. Cut its grids at even rows.
    """

    def step(state, denoise, grid, i, keys):
        base, here, there = row(grid, jnp.maximum(i - 1, 0)), row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        closes = (state.taken % 2 == 1) & ~is_an_end(there)
        h_here = half_log_snr(here) - half_log_snr(base)
        h_there = half_log_snr(there) - half_log_snr(base)
        # From pure noise (or, inverting, from the clean row) both h are infinite, and their ratio goes to 1.
        ratio = jnp.where(jnp.isfinite(h_here), divide(h_there, h_here, 1.0), 1)
        weight = jnp.where(closes, 0.5 * ratio, 0)  # finite where it is not used, for the sake of gradients
        corrected = state.base_x_0 + weight * (x_0 - state.base_x_0)
        x = jnp.where(closes, move(state.base_x, corrected, base, there), move(state.x, x_0, here, there))
        return SinglestepState(x, state.x, x_0, state.taken + 1)

    return Solver(lambda x: SinglestepState(x, x, jnp.zeros_like(x), jnp.int32(0)), step)
