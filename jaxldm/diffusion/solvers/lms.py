"""LMS: linear multistep in sigma / alpha (k-diffusion's `sample_lms`)."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxldm.arguments import checked, count
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.diffusion.solvers.multistep import (
    MultistepState,
    begin,
    difference,
    order_of_step,
    past_nodes,
    polynomial_weights,
    remember,
)
from jaxldm.diffusion.solvers.solver import Row, Solver, divide, move, row
from jaxldm.diffusion.values import equal_by_call


@checked(order=count(1, 4))
@equal_by_call
def lms(order: int = 4) -> Solver:
    """Adams-Bashforth on uneven steps for d(x/alpha) / dr = eps, r = sigma / alpha: one evaluation a step.

        x_s / alpha_s = x_t / alpha_t + sum_j c_j eps_{i-j},    c_j = integral of L_j(r) from r_t to r_s

    with L_j the Lagrange polynomials through the last `order` rows, integrated in closed form. This is
    k-diffusion's `sample_lms`, and the rhoAB form of DEIS (Zhang and Chen 2022). The first step
    is Euler's, the next of second order and so on; a row at pure noise (r infinite) is left out of the
    polynomial. The clean row is an ordinary one here.

    A run that is cut and continued starts again at first order: the memory is lost.

    Args:
        order: 1 (Euler) to 4. Runs of fewer steps never reach it.

    Raises:
        InvalidArgumentError: another order.
    """

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        epsilon = implied_noise(x_0, state.x, here.alpha, here.sigma)
        reach = order_of_step(order, state.taken, (here.alpha == 0) | (there.alpha == 0))
        nodes, valid = past_nodes(grid, i, noise_ratio, reach, order)
        weights = polynomial_weights(nodes, valid, [1 / (p + 1) for p in range(order)])
        width = there.sigma - there.alpha * divide(here.sigma, here.alpha, 0.0)  # alpha_s (r_s - r_t)
        x = move(state.x, x_0, here, there) + width * difference(weights, epsilon, state.past)
        return MultistepState(x, remember(epsilon, state.past), state.taken + 1), x_0

    return Solver(lambda x: begin(x, order - 1), step)


def noise_ratio(row: Row) -> Float[Array, ""]:
    """r = sigma / alpha; infinite at pure noise."""
    return divide(row.sigma, row.alpha, float("inf"))
