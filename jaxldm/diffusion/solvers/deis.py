"""DEIS in log-rho form (Zhang and Chen 2022)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxldm.arguments import checked, count, flag
from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.diffusion.solvers.dpmpp import at_boundary, half_log_snr
from jaxldm.diffusion.solvers.multistep import (
    MultistepState,
    begin,
    difference,
    exponential_moments,
    order_of_step,
    past_nodes,
    polynomial_weights,
    remember,
)
from jaxldm.diffusion.solvers.solver import Solver, divide, move, row
from jaxldm.diffusion.values import equal_by_call


@checked(order=count(1, 3), lower_order_final=flag)
@equal_by_call
def deis(order: int = 2, lower_order_final: bool = True) -> Solver:
    """Exponential Adams-Bashforth: eps is a polynomial in log rho, rho = sigma / alpha.

        x_s / alpha_s = x_t / alpha_t + sum_j c_j eps_{i-j},    c_j = integral of L_j(log rho) d rho

    from rho_t to rho_s (Zhang and Chen 2022), with log rho as the variable of the Lagrange polynomials. The
    paper's tAB-DEIS has t there and its rhoAB-DEIS has rho (that one is `lms`); the log-rho form is the one
    that libraries offer, and unlike t it means the same on every path. One evaluation a step. The first
    steps, and those from pure noise or onto the clean row, are of lower order.

    A run that is cut and continued starts again at first order: the memory is lost.

    Args:
        order: 1 (DDIM) to 3. Runs of fewer steps never reach it.
        lower_order_final: in runs of fewer than 15 steps, the last step but one is at most of second order
            and the last of first, for stability.

    Raises:
        InvalidArgumentError: another order.
    """

    def step(state, denoise, grid, i, keys):
        here, there, num_steps = row(grid, i), row(grid, i + 1), steps_in(grid)
        x_0 = denoise(state.x, here.t)
        epsilon = implied_noise(x_0, state.x, here.alpha, here.sigma)
        ends = at_boundary(here) | at_boundary(there)
        steps_left = jnp.where(lower_order_final & (num_steps < 15), num_steps - i, order)
        reach = order_of_step(order, state.taken, ends, steps_left)
        nodes, valid = past_nodes(grid, i, half_log_snr, reach, order)
        h = jnp.where(ends, 1, half_log_snr(there) - half_log_snr(here))
        # d rho = -rho_t h e^{-h u} du: seen from row s, with v = 1 - u, the weight is h e^{-h (1 - v)}.
        moments = exponential_moments(h, order)
        weights = polynomial_weights([1 - node for node in nodes], valid, moments)
        width = -there.alpha * divide(here.sigma, here.alpha, 0.0)
        x = move(state.x, x_0, here, there) + width * difference(weights, epsilon, state.past)
        return MultistepState(x, remember(epsilon, state.past), state.taken + 1), x_0

    return Solver(lambda x: begin(x, order - 1), step)
