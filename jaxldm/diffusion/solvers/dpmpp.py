"""DPM-Solver++: one-step 1S and 2S, multistep 2M and 3M (Lu, Zhou, Bao, Chen, Li and Zhu 2022).

All integrate x_0 as a function of lambda = log(alpha / sigma), half the log-SNR: a DDIM step with a corrected
x_0, called D. So all are finite at pure noise and at the clean row, where lambda is infinite.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxldm.arguments import checked, flag
from jaxldm.diffusion.grids import Grid, steps_in
from jaxldm.diffusion.solvers.ddim import ddim
from jaxldm.diffusion.solvers.multistep import MultistepState, begin, exponential_moments, order_of_step
from jaxldm.diffusion.solvers.solver import Row, Solver, divide, move, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of

SOLVER_TYPES = ("midpoint", "heun")
PARABOLAS = ("exact", "half")


class SinglestepState(NamedTuple):
    """x, and the x, x_0 and row from which the current pair of steps started."""

    x: Float[Array, "B ..."]
    base_x: Float[Array, "B ..."]
    base_x_0: Float[Array, "B ..."]
    taken: Int[Array, ""]


def half_log_snr(row: Row) -> Float[Array, ""]:
    """lambda = log(alpha / sigma); -inf at pure noise, +inf at the clean row."""
    return jnp.log(row.alpha) - jnp.log(row.sigma)


def at_boundary(row: Row) -> Bool[Array, ""]:
    """Whether lambda is infinite here: the clean row, or pure noise."""
    return (row.sigma == 0) | (row.alpha == 0)


def slope_weight(h: Float[Array, ""], solver_type: str) -> Float[Array, ""] | float:
    """How much of x_0's slope (its change over the whole step h) goes into the corrected x_0.

    "midpoint" takes 1/2; "heun" the exact integral 1/(1 - e^{-h}) - 1/h, which is near 1/2 for small h.
    Either is of second order.
    """
    if solver_type == "midpoint":
        return 0.5
    whole, ramp = exponential_moments(h, 2)
    return ramp / whole


@equal_by_call
def dpmpp_1s() -> Solver:
    """DPM-Solver++ of first order, which is DDIM (Lu et al. 2022, section 4) and so is `euler`.

    x_s = (sigma_s / sigma_t) x_t - alpha_s (e^{-h} - 1) x_0 is alpha_s x_0 + sigma_s eps in other words.
    """
    return ddim(eta=0.0)


def ends_in_first_order(
    grid: Grid, i: Int[Any, ""] | int, lower_order_final: bool, euler_at_final: bool
) -> Bool[Any, ""] | bool:
    """Whether step i is the last, and taken in first order: in short runs, or (`euler_at_final`) in all."""
    if not (lower_order_final or euler_at_final):
        return False
    num_steps = steps_in(grid)
    is_last = i == num_steps - 1
    return is_last if euler_at_final else is_last & (num_steps < 15)


@checked(lower_order_final=flag, euler_at_final=flag)
@equal_by_call
def dpmpp_2m(
    lower_order_final: bool = True, solver_type: str = "midpoint", euler_at_final: bool = False
) -> Solver:
    """Lu et al. 2022, Algorithm 2: one evaluation a step, the previous x_0 gives the slope.

        D = (1 + 1/(2 r)) x_0 - 1/(2 r) x_0_previous,    r = h_previous / h,    h = lambda_s - lambda_t
        x_s = (sigma_s / sigma_t) x_t - alpha_s (e^{-h} - 1) D

    The first step, and the step onto the clean row (h is infinite there), are of first order. A run that is
    cut and continued starts again at first order: the memory is lost.

    Args:
        lower_order_final: in runs of fewer than 15 steps that do not end clean, take the last step in first
            order too, for stability, as the authors do.
        solver_type: "midpoint" is the printed 1/2 in D; "heun" the exact integral of the slope in its place.
        euler_at_final: take the last step in first order in runs of any length.

    Raises:
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        before, here, there = row(grid, jnp.maximum(i - 1, 0)), row(grid, i), row(grid, i + 1)
        h = half_log_snr(there) - half_log_snr(here)
        h_previous = half_log_snr(here) - half_log_snr(before)
        first_order = (state.taken == 0) | at_boundary(there)
        first_order |= ends_in_first_order(grid, i, lower_order_final, euler_at_final)

        x_0, (x_0_previous,) = denoise(state.x, here.t), state.past
        slope = slope_weight(h, solver_type) * divide(h, h_previous, 0.0)
        D = x_0 + jnp.where(first_order, 0, slope) * (x_0 - x_0_previous)
        return MultistepState(move(state.x, D, here, there), (x_0,), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 1), step)


@checked(lower_order_final=flag, euler_at_final=flag)
@equal_by_call
def dpmpp_3m(
    lower_order_final: bool = True,
    solver_type: str = "midpoint",
    euler_at_final: bool = False,
    parabola: str = "exact",
) -> Solver:
    """DPM-Solver++ of third order, multistep: the parabola through the last three x_0, integrated exactly.

    With u = (lambda - lambda_t) / h, Newton's form of the parabola through u = 0, -r_0 and -(r_0 + r_1) is

        x_0(u) = x_0 + u D_1 + u (u + r_0) D_2,    r_0 = h_previous / h,    r_1 = h_before_previous / h
        D_1 = (x_0 - x_0_previous) / r_0,    D_2 = (D_1 - D_1_previous) / (r_0 + r_1)

    and D is its mean under the weight h e^{-h (1 - u)} over u from 0 to 1: the exponential Adams-Bashforth
    method that Lu et al. 2022 write with Taylor's formula, x_s as in `dpmpp_2m`. One evaluation a step; the
    first step is of first order, the second of second, as is what ends at the clean row. A run that is
    cut and continued starts again at first order; one of fewer than 3 steps never reaches the third.

    Args:
        lower_order_final: in runs of fewer than 15 steps, the last step but one is at most of second order
            and the last of first, for stability, as the authors do.
        solver_type: of the steps of second order, see `dpmpp_2m`.
        euler_at_final: take the last step in first order in runs of any length.
        parabola: "half" takes half of the mean of u^2, as the authors' program, k-diffusion and diffusers do:
            that leaves second order.

    Raises:
        UnknownNameError: another solver_type or parabola.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)
    one_of("parabola", parabola, PARABOLAS)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        order = third_order_step(state, grid, i, lower_order_final, euler_at_final)
        h, r_0, r_1 = relative_steps(grid, i, order)

        x_0, (x_1, x_2) = denoise(state.x, here.t), state.past
        slope, second = parabola_weights(h, r_0, order, solver_type, parabola)
        D_1 = divide(1.0, r_0, 0.0) * (x_0 - x_1)
        D_2 = divide(1.0, r_0 + r_1, 0.0) * (D_1 - divide(1.0, r_1, 0.0) * (x_1 - x_2))
        D = x_0 + slope * D_1 + second * D_2
        return MultistepState(move(state.x, D, here, there), (x_0, x_1), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 2), step)


def third_order_step(
    state: MultistepState,
    grid: Grid,
    i: Int[Any, ""] | int,
    lower_order_final: bool,
    euler_at_final: bool,
) -> Int[Array, ""]:
    """The order of step i of a third-order run, 1 to 3; may be traced."""
    num_steps = steps_in(grid)
    ends = at_boundary(row(grid, i)) | at_boundary(row(grid, i + 1))
    ends |= ends_in_first_order(grid, i, False, euler_at_final)
    steps_left = jnp.where(lower_order_final & (num_steps < 15), num_steps - i, 3)
    return order_of_step(3, state.taken, ends, steps_left)


def relative_steps(
    grid: Grid, i: Int[Any, ""] | int, order: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(h, r_0, r_1): step i in lambda, and the two steps before it over h; 1 where they are not used.

    A row at pure noise is infinitely far away: r is infinite, and its divided difference 0.
    """
    lambdas = [half_log_snr(row(grid, jnp.maximum(i + k, 0))) for k in (1, 0, -1, -2)]
    h, h_0, h_1 = (b - a for b, a in itertools.pairwise(lambdas))
    h = jnp.where(at_boundary(row(grid, i)) | at_boundary(row(grid, i + 1)), 1, h)
    return h, jnp.where(order >= 2, h_0 / h, 1), jnp.where(order >= 3, h_1 / h, 1)


def parabola_weights(
    h: Float[Array, ""], r_0: Float[Array, ""], order: Int[Array, ""], solver_type: str, parabola: str
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The means of u and of u (u + r_0) under the weight h e^{-h (1 - u)}; 0 beyond the order of the step."""
    whole, ramp, square = exponential_moments(h, 3)
    second_order = 0.5 if solver_type == "midpoint" else ramp / whole
    slope = jnp.where(order >= 3, ramp / whole, jnp.where(order == 2, second_order, 0))
    square = {"exact": square, "half": square / 2, "diffusers": square / 2 - 1}[parabola]
    return slope, jnp.where(order >= 3, (square + r_0 * ramp) / whole, 0)


@checked(lower_order_final=flag)
@equal_by_call
def dpmpp_2s(solver_type: str = "midpoint", lower_order_final: bool = False) -> Solver:
    """Lu et al. 2022, Algorithm 1, with rows of the grid as intermediate points: one evaluation a step.

    Steps come in pairs from row t over row s to row u: a first-order step to s, then, from x_t again,

        D = x_0(t) + (x_0(s) - x_0(t)) / (2 r),    r = h_s / h_u,    h = lambda - lambda_t
        x_u = (sigma_u / sigma_t) x_t - alpha_u (e^{-h_u} - 1) D.

    A last step that has no partner, or that ends clean, is of first order. Cut its grids at even rows.

    Args:
        solver_type: "midpoint" is the printed 1/2 in D; "heun" the exact integral of the slope in its place.
        lower_order_final: take the last step in first order, in runs of any length.

    Raises:
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        base, here, there = row(grid, jnp.maximum(i - 1, 0)), row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        closes = (state.taken % 2 == 1) & ~at_boundary(there)
        closes &= jnp.logical_not(ends_in_first_order(grid, i, False, lower_order_final))
        h_here = half_log_snr(here) - half_log_snr(base)
        h_there = half_log_snr(there) - half_log_snr(base)
        # From pure noise (or, inverting, from the clean row) both h are infinite, and their ratio goes to 1.
        from_boundary = ~jnp.isfinite(h_here)
        ratio = jnp.where(from_boundary, 1, divide(h_there, h_here, 1.0))
        slope = slope_weight(jnp.where(from_boundary, jnp.inf, h_there), solver_type)
        weight = jnp.where(closes, slope * ratio, 0)  # finite where it is not used, for the sake of gradients
        D = state.base_x_0 + weight * (x_0 - state.base_x_0)
        x = jnp.where(closes, move(state.base_x, D, base, there), move(state.x, x_0, here, there))
        return SinglestepState(x, state.x, x_0, state.taken + 1), x_0

    return Solver(lambda x: SinglestepState(x, x, jnp.zeros_like(x), jnp.int32(0)), step)
