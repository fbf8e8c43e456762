"""DPM-Solver++: one-step 1S and 2S, multistep 2M and 3M (Lu, Zhou, Bao, Chen, Li and Zhu 2022).

All integrate x_0 as a function of lambda = log(alpha / sigma), half the log-SNR: a DDIM step taken with a
corrected x_0. So all are finite at pure noise and at the clean row, where lambda is infinite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.diffusion.grids import Grid, steps_in
from jaxldm.diffusion.solvers.ddim import ddim
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
from jaxldm.diffusion.solvers.solver import Row, Solver, divide, move, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of

SOLVER_TYPES = ("midpoint", "heun")


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


def slope_weight(h: Any, solver_type: str) -> Any:
    """How much of x_0's slope (its change over the whole step h) goes into the corrected x_0.

    "midpoint" takes 1/2; "heun" the exact integral 1/(1 - e^{-h}) - 1/h, which is near 1/2 for small h.
    Either is of second order.
    """
    if solver_type == "midpoint":
        return 0.5
    whole, ramp = exponential_moments(h, 2)
    return ramp / whole


def through_two(
    x_0: Any,
    state: MultistepState,
    grid: Grid,
    i: Any,
    solver_type: str,
    lower_order_final: bool,
    eta: float = 0.0,
) -> Any:
    """The D of 2M: x_0 and its slope since the step before, under the weight e^{-(1 + eta) h (1 - u)}.

    eta = 0 is the ODE's, `dpmpp_2m`; any other that of the SDE, `dpmpp_2m_sde`.
    """
    here, there, num_steps = row(grid, i), row(grid, i + 1), steps_in(grid)
    h = half_log_snr(there) - half_log_snr(here)
    h_previous = half_log_snr(here) - half_log_snr(row(grid, jnp.maximum(i - 1, 0)))
    first_order = (state.taken == 0) | is_an_end(there)
    if lower_order_final:
        first_order |= (i == num_steps - 1) & (num_steps < 15)
    weight = slope_weight((1 + eta) * h, solver_type) * divide(h, h_previous, 0.0)
    return x_0 + jnp.where(first_order, 0, weight) * (x_0 - state.past[0])


def through_three(
    x_0: Any,
    state: MultistepState,
    grid: Grid,
    i: Any,
    solver_type: str,
    lower_order_final: bool,
    curvature: str,
    eta: float = 0.0,
) -> Any:
    """The D of 3M: x_0 with the parabola through the last three, under the weight of `through_two`.

    `curvature` is that of `dpmpp_3m_sde`: "exact", or what other programs make of the second difference.
    """
    here, there, num_steps = row(grid, i), row(grid, i + 1), steps_in(grid)
    at_an_end = is_an_end(here) | is_an_end(there)
    steps_left = jnp.where(lower_order_final & (num_steps < 15), num_steps - i, 3)
    reach = order_of_step(3, state.taken, at_an_end, steps_left)
    nodes, counts = past_nodes(grid, i, half_log_snr, reach, 3)
    H = jnp.where(at_an_end, 1, (1 + eta) * (half_log_snr(there) - half_log_snr(here)))
    whole, ramp, square = exponential_moments(H, 3)
    square = {"exact": square, "k-diffusion": square / 2, "diffusers": square / 2 - 1}[curvature]
    weights = polynomial_weights(nodes, counts, [whole, ramp, square])
    weights = [divide(weight, whole, 0.0) for weight in weights]
    second_order = divide(slope_weight(H, solver_type), nodes[1], 0.0)
    weights[1] = jnp.where((reach == 2) & counts[1], second_order, weights[1])
    return x_0 + difference(weights, x_0, state.past)


@equal_by_call
def dpmpp_1s() -> Solver:
    """DPM-Solver++ of first order, which is DDIM (Lu et al. 2022, section 4) and so is `euler`.

    x_s = (sigma_s / sigma_t) x_t - alpha_s (e^{-h} - 1) x_0 is alpha_s x_0 + sigma_s eps in other words.
    """
    return ddim(eta=0.0)


@equal_by_call
def dpmpp_2m(lower_order_final: bool = True, solver_type: str = "midpoint") -> Solver:
    """Lu et al. 2022, Algorithm 2: one evaluation a step, the previous x_0 gives the slope.

        D = (1 + 1/(2 r)) x_0 - 1/(2 r) x_0_previous,    r = h_previous / h,    h = lambda_s - lambda_t
        x_s = (sigma_s / sigma_t) x_t - alpha_s (e^{-h} - 1) D

    The first step, and the step onto the clean row (h is infinite there), are of first order. A run that is
    cut and continued starts again at first order: the memory is lost.

    Args:
        lower_order_final: in runs of fewer than 15 steps that do not end clean, take the last step in first
            order too, for stability, as the authors do.
        solver_type: "midpoint" is the printed 1/2 in D; "heun" the exact integral of the slope in its place.

    Raises:
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        corrected = through_two(x_0, state, grid, i, solver_type, lower_order_final)
        return MultistepState(move(state.x, corrected, here, there), (x_0,), state.taken + 1)

    return Solver(lambda x: begin(x, 1), step)


@equal_by_call
def dpmpp_3m(
    lower_order_final: bool = True, solver_type: str = "midpoint", halve_curvature: bool = False
) -> Solver:
    """DPM-Solver++ of third order, multistep: the parabola through the last three x_0, integrated exactly.

        x_s = (sigma_s / sigma_t) x_t + alpha_s sum_j c_j x_0_{i-j},    c_j = integral of h e^{-h (1 - u)} L_j

    over u from 0 to 1, u = (lambda - lambda_t) / h, with L_j the Lagrange polynomials: the exponential
    Adams-Bashforth method that Lu et al. 2022 write with Taylor's formula. One evaluation a step; the first
    step is of first order, the second of second, as is what ends at the clean row. A run that is cut and
    continued starts again at first order; one of fewer than 3 steps never reaches the third.

    Args:
        lower_order_final: in runs of fewer than 15 steps, the last step but one is at most of second order
            and the last of first, for stability, as the authors do.
        solver_type: of the steps of second order, see `dpmpp_2m`.
        halve_curvature: take only half of the second difference, as the authors' program, k-diffusion and
            diffusers do: they divide by r_0 + r_1 where Taylor's D_2 is twice that. It is of second order
            then (tests/diffusion/test_solver_order.py measures both).

    Raises:
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        curvature = "k-diffusion" if halve_curvature else "exact"
        corrected = through_three(x_0, state, grid, i, solver_type, lower_order_final, curvature)
        x = move(state.x, corrected, here, there)
        return MultistepState(x, remember(x_0, state.past), state.taken + 1)

    return Solver(lambda x: begin(x, 2), step)


@equal_by_call
def dpmpp_2s(solver_type: str = "midpoint") -> Solver:
    """Lu et al. 2022, Algorithm 1, with rows of the grid as intermediate points: one evaluation a step.

    Steps come in pairs from row t over row s to row u: a first-order step to s, then, from x_t again,

        D = x_0(t) + (x_0(s) - x_0(t)) / (2 r),    r = h_s / h_u,    h = lambda - lambda_t
        x_u = (sigma_u / sigma_t) x_t - alpha_u (e^{-h_u} - 1) D.

    A last step that has no partner, or that ends clean, is of first order. Cut its grids at even rows.

    Args:
        solver_type: "midpoint" is the printed 1/2 in D; "heun" the exact integral of the slope in its place.

    Raises:
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        base, here, there = row(grid, jnp.maximum(i - 1, 0)), row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        closes = (state.taken % 2 == 1) & ~is_an_end(there)
        h_here = half_log_snr(here) - half_log_snr(base)
        h_there = half_log_snr(there) - half_log_snr(base)
        # From pure noise (or, inverting, from the clean row) both h are infinite, and their ratio goes to 1.
        from_an_end = ~jnp.isfinite(h_here)
        ratio = jnp.where(from_an_end, 1, divide(h_there, h_here, 1.0))
        slope = slope_weight(jnp.where(from_an_end, jnp.inf, h_there), solver_type)
        weight = jnp.where(closes, slope * ratio, 0)  # finite where it is not used, for the sake of gradients
        corrected = state.base_x_0 + weight * (x_0 - state.base_x_0)
        x = jnp.where(closes, move(state.base_x, corrected, base, there), move(state.x, x_0, here, there))
        return SinglestepState(x, state.x, x_0, state.taken + 1)

    return Solver(lambda x: SinglestepState(x, x, jnp.zeros_like(x), jnp.int32(0)), step)
