"""UniPC: one polynomial predicts the next x and corrects the last (Zhao, Bai, Rao, Zhou and Lu 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxldm.arguments import checked, count, flag, several
from jaxldm.diffusion.grids import Grid, steps_in
from jaxldm.diffusion.solvers.dpmpp import at_boundary, half_log_snr
from jaxldm.diffusion.solvers.multistep import (
    difference,
    exponential_moments,
    order_of_step,
    past_nodes,
    polynomial_weights,
    remember,
)
from jaxldm.diffusion.solvers.solver import Solver, divide, move, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of

UNIPC_TYPES = ("bh1", "bh2")


class UniPCState(NamedTuple):
    """x as predicted, the x it was predicted from, the past x_0, the order of that step, steps taken."""

    x: Float[Array, "B ..."]
    base_x: Float[Array, "B ..."]
    past: tuple[Float[Array, "B ..."], ...]
    order: Int[Array, ""]
    taken: Int[Array, ""]


@checked(order=count(1, 3), lower_order_final=flag, corrector=flag, disable_corrector=several(count(0)))
@equal_by_call
def unipc(
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    corrector: bool = True,
    disable_corrector: Sequence[int] = (),
) -> Solver:
    """Zhao et al. 2023, UniPC-p in its data-prediction form: one evaluation a step, order p + 1.

    With u = (lambda - lambda_t) / h, x_0 is a polynomial in u through the last p rows; integrated exactly it
    predicts x_s (UniP). The x_0 found there makes it one degree higher, and x_s is corrected by it (UniC)
    before the next step, with no evaluation at the corrected x; the last row is not corrected. The paper's
    linear systems R rho = b are these integrals: solved exactly they do not depend on B(h). Only where one
    weight is left over the authors fix it at 1/2, and B(h) remains:

        UniP-2: B(h) / 2 times the slope,    UniC-1: B(h) / 2 times x_0(s) - x_0(t)

    bh1: B = h; bh2: B = 1 - e^{-h}. A step onto the clean row is of first order, one from pure noise is, too.
    A run that is cut and continued starts again at first order, uncorrected: the memory is lost.

    Args:
        order: p, 1 to 3. Runs of fewer steps never reach it.
        solver_type: "bh1" or "bh2".
        lower_order_final: let the order fall to 1 over the last steps, in runs of any length, as the authors
            do. That is stable, but with very many steps the last one is what is left of the error: measure
            the order without.
        corrector: False leaves UniP alone, of order p.
        disable_corrector: numbers of steps (from 0, in the whole grid) after which there is no correction;
            with strong guidance the first few.

    Raises:
        InvalidArgumentError: another order.
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, UNIPC_TYPES)
    corrector_off = tuple(disable_corrector)

    def step(state, denoise, grid, i, keys):
        before, here, there = row(grid, jnp.maximum(i - 1, 0)), row(grid, i), row(grid, i + 1)
        x, past, x_0 = state.x, state.past, denoise(state.x, here.t)

        # UniC: with the x_0 found here, the polynomial of the step to this row is one degree higher.
        if corrector:
            weights = corrector_weights(grid, jnp.maximum(i - 1, 0), state.order, order, solver_type)
            D = past[0] + difference(weights, past[0], (*past[1:], x_0))
            corrects = (state.taken > 0) & ~at_boundary(here)
            for number in corrector_off:
                corrects &= grid.start + i - 1 != number
            x = jnp.where(corrects, move(state.base_x, D, before, here), x)

        # UniP: the polynomial through this row and those before it gives the next x.
        steps_left = steps_in(grid) - i if lower_order_final else None
        order_here = order_of_step(order, state.taken, at_boundary(here) | at_boundary(there), steps_left)
        past = remember(x_0, past)
        weights = predictor_weights(grid, i, order_here, order, solver_type)
        D = x_0 + difference(weights, x_0, past[1:])
        return UniPCState(move(x, D, here, there), x, past, order_here, state.taken + 1), x_0

    def init(x):
        return UniPCState(x, x, (jnp.zeros_like(x),) * order, jnp.int32(1), jnp.int32(0))

    return Solver(init, step)


def predictor_weights(
    grid: Grid, i: Int[Any, ""] | int, order: Int[Any, ""] | int, most: int, solver_type: str
) -> list[Float[Array, ""]]:
    """UniP: weights of x_0 at rows i, i - 1, ..., as parts of a first-order step's.

    `order` of the `most` past rows are used; it may be traced.
    """
    h, nodes, valid = nodes_behind(grid, i, order, most)
    moments = exponential_moments(h, most)
    weights = [divide(weight, moments[0], 0.0) for weight in polynomial_weights(nodes, valid, moments)]
    if most > 1:
        slope = divide(half_b(h, moments[0], solver_type), nodes[1], 0.0)
        weights[1] = jnp.where((order == 2) & valid[1], slope, weights[1])
    return weights


def corrector_weights(
    grid: Grid, i: Int[Any, ""] | int, order: Int[Any, ""] | int, most: int, solver_type: str
) -> list[Float[Array, ""]]:
    """UniC: weights of x_0 at rows i, i - 1, ... and at row i + 1, as parts of a first-order step's."""
    h, nodes, valid = nodes_behind(grid, i, order, most)
    moments = exponential_moments(h, most + 1)
    ends = at_boundary(row(grid, i)) | at_boundary(row(grid, i + 1))
    nodes, valid = [*nodes, jnp.ones_like(h)], [*valid, ~ends]
    weights = [divide(weight, moments[0], 0.0) for weight in polynomial_weights(nodes, valid, moments)]
    # From pure noise h is infinite: bh2's limit is 1/2, bh1 has none and is left uncorrected.
    at_pure_noise = 0.5 if solver_type == "bh2" else 0.0
    slope = jnp.where(ends, at_pure_noise, half_b(h, moments[0], solver_type))
    weights[-1] = jnp.where((order == 1) | ends, slope, weights[-1])
    return weights


def nodes_behind(
    grid: Grid, i: Int[Any, ""] | int, order: Int[Any, ""] | int, most: int
) -> tuple[Float[Array, ""], list[Float[Array, ""]], list[Bool[Array, ""]]]:
    """(h, nodes, valid): step i in lambda (1 at a boundary), and `past_nodes` with row i always valid."""
    here, there = row(grid, i), row(grid, i + 1)
    nodes, valid = past_nodes(grid, i, half_log_snr, order, most)
    ends = at_boundary(here) | at_boundary(there)
    h = jnp.where(ends, 1, half_log_snr(there) - half_log_snr(here))
    return h, nodes, [jnp.bool_(True), *valid[1:]]


def half_b(h: Float[Array, ""], whole: Float[Array, ""], solver_type: str) -> Float[Array, ""]:
    """B(h) / 2 as a part of a first-order step, whole = 1 - e^{-h}: what the authors fix one weight at."""
    return 0.5 * (h / whole if solver_type == "bh1" else jnp.ones_like(h))
