"""DPM-Solver++ of third order, one-step (3S), and what it shares with DPM-Solver-3 (Lu et al. 2022)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.arguments import checked, flag
from jaxldm.diffusion.grids import Grid, steps_in
from jaxldm.diffusion.solvers.dpmpp import SOLVER_TYPES, at_boundary, half_log_snr
from jaxldm.diffusion.solvers.multistep import exponential_moments
from jaxldm.diffusion.solvers.solver import Solver, divide, move, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of


class ThirdsState(NamedTuple):
    """x; the x and the answers from which the current three steps started; steps taken, and remembered."""

    x: Float[Array, "B ..."]
    base_x: Float[Array, "B ..."]
    base: Float[Array, "B ..."]
    middle: Float[Array, "B ..."]
    taken: Int[Array, ""]
    known: Int[Array, ""]


@checked(lower_order_final=flag)
@equal_by_call
def dpmpp_3s(solver_type: str = "midpoint", lower_order_final: bool = False) -> Solver:
    """DPM-Solver++ of third order, with rows of the grid as intermediate points: one evaluation a step.

    Steps come in threes from row t over rows s and v to row u: a first-order step to s, from x_t a
    second-order step to v (`dpmpp_2s`), and from x_t again, with u = (lambda - lambda_t) / h,

        x_0(u) = x_0(t) + u / r_v (x_0(v) - x_0(t))                 "midpoint"
                 the parabola through x_0(t), x_0(s) and x_0(v)      "heun"

    integrated exactly. The line is of third order where r_v is 2/3, as on rows that are even in lambda. A
    last step that has no partners, or that ends clean, is of first order. Cut its grids at every third row.

    Args:
        solver_type: "midpoint" or "heun", see above, and `dpmpp_2s` for the second step.
        lower_order_final: take the last step in first order where the number of steps is a multiple of 3.

    Raises:
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        order = order_of_third(state, grid, i, lower_order_final)
        base = row(grid, jnp.maximum(i - order + 1, 0))
        x_0 = denoise(state.x, here.t)
        middle, latest = thirds(grid, i, order, 1.0, solver_type)
        D = state.base + middle * (state.middle - state.base) + latest * (x_0 - state.base)
        x = jnp.where(order == 1, move(state.x, x_0, here, there), move(state.base_x, D, base, there))
        return next_thirds(state, x, x_0, order), x_0

    return Solver(begin_thirds, step)


def begin_thirds(x: Float[Array, "B ..."]) -> ThirdsState:
    """A state that has taken no step yet."""
    zero, none = jnp.zeros_like(x), jnp.int32(0)
    return ThirdsState(x, x, zero, zero, none, none)


def next_thirds(state: ThirdsState, x: Any, answer: Any, order: Int[Array, ""]) -> ThirdsState:
    """The state after a step of that order, which began with this answer (x_0 or eps)."""
    first = order == 1
    return ThirdsState(
        x,
        jnp.where(first, state.x, state.base_x),
        jnp.where(first, answer, state.base),
        jnp.where(order == 2, answer, state.middle),
        state.taken + 1,
        jnp.minimum(state.known + 1, 2),
    )


def order_of_third(
    state: ThirdsState, grid: Grid, i: Int[Any, ""] | int, lower_order_final: bool
) -> Int[Array, ""]:
    """1, 2, 3, 1, 2, 3, ..., as far as answers are remembered; 1 onto the clean row."""
    order = jnp.minimum(state.taken % 3, state.known) + 1
    ends = at_boundary(row(grid, i + 1))
    if lower_order_final:
        num_steps = steps_in(grid)
        ends |= (i == num_steps - 1) & (num_steps % 3 == 0)
    return jnp.where(ends, 1, order)


def thirds(
    grid: Grid, i: Int[Any, ""] | int, order: Int[Array, ""], sign: float, solver_type: str
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How much of the middle and of the latest answer, less the first, is added to the first.

    Args:
        grid, i: row i is where the latest answer was given.
        order: of the step.
        sign: of h in the weight e^{-h (1 - u)}: 1 for x_0, -1 for eps.
        solver_type: see `dpmpp_3s`.
    """
    base, second = (row(grid, jnp.maximum(i - order + k, 0)) for k in (1, 2))
    start = half_log_snr(base)
    # From pure noise all h are infinite: their ratios go to 1, and the line is all that is left.
    infinite = at_boundary(base) | at_boundary(row(grid, i + 1)) | (order == 1)
    h = jnp.where(infinite, 1, half_log_snr(row(grid, i + 1)) - start)
    r_1 = jnp.where(infinite, 0.5, divide(half_log_snr(second) - start, h, 0.5))
    r_0 = jnp.where(infinite, 1, divide(half_log_snr(row(grid, i)) - start, h, 1.0))
    whole, ramp, square = exponential_moments(sign * h, 3)
    first, squared = ramp / whole, square / whole
    line = jnp.where((order == 2) & (solver_type == "midpoint"), 0.5, jnp.where(infinite, 1, first))
    is_parabola = (order == 3) & (solver_type == "heun") & ~infinite
    bend = jnp.where(is_parabola, divide(squared - first * r_1, r_0 - r_1, 0.0), 0)
    middle = jnp.where(is_parabola, (first - bend) / r_1, 0)
    latest = jnp.where(is_parabola, bend, line) / r_0
    return middle, latest
