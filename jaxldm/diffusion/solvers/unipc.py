"""UniPC: one polynomial predicts the next x and corrects the last (Zhao, Bai, Rao, Zhou and Lu 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.solvers.dpmpp import half_log_snr, is_an_end
from jaxldm.diffusion.solvers.multistep import (
    check_order,
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
    order: Any
    taken: Any


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
    check_order("unipc", order, 3)
    one_of("solver_type", solver_type, UNIPC_TYPES)
    corrector_off = tuple(disable_corrector)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        x, past = state.x, state.past
        if corrector:
            corrects = (state.taken > 0) & ~is_an_end(here)
            for number in corrector_off:
                corrects &= grid.start + i - 1 != number
            before = row(grid, jnp.maximum(i - 1, 0))
            weights = unipc_weights(
                grid, jnp.maximum(i - 1, 0), state.order, order, solver_type, corrects=True
            )
            corrected = past[0] + difference(weights, past[0], (*past[1:], x_0))
            x = jnp.where(corrects, move(state.base_x, corrected, before, here), x)
        at_an_end = is_an_end(here) | is_an_end(there)
        steps_left = steps_in(grid) - i if lower_order_final else None
        reach = order_of_step(order, state.taken, at_an_end, steps_left)
        past = remember(x_0, past)
        weights = unipc_weights(grid, i, reach, order, solver_type, corrects=False)
        x_s = move(x, x_0 + difference(weights, x_0, past[1:]), here, there)
        return UniPCState(x_s, x, past, reach, state.taken + 1)

    def init(x):
        return UniPCState(x, x, (jnp.zeros_like(x),) * order, jnp.int32(1), jnp.int32(0))

    return Solver(init, step)


def unipc_weights(grid: Any, i: Any, order: Any, most: int, solver_type: str, corrects: bool) -> list[Any]:
    """Weights of x_0 at rows i, i - 1, ... and, to correct, at row i + 1, as parts of a first-order step's.

    `order` of the `most` past rows count; it may be traced.
    """
    here, there = row(grid, i), row(grid, i + 1)
    at_an_end = is_an_end(here) | is_an_end(there)
    h = jnp.where(at_an_end, 1, half_log_snr(there) - half_log_snr(here))
    nodes, counts = past_nodes(grid, i, half_log_snr, order, most)
    counts[0] = jnp.bool_(True)
    moments = exponential_moments(h, most + corrects)
    half = 0.5 * (h / moments[0] if solver_type == "bh1" else jnp.ones_like(h))
    if corrects:
        nodes, counts = [*nodes, jnp.ones_like(h)], [*counts, ~at_an_end]
    weights = [divide(weight, moments[0], 0.0) for weight in polynomial_weights(nodes, counts, moments)]
    if corrects:
        # From pure noise h is infinite: bh2's limit is 1/2, bh1 has none and is left uncorrected.
        at_pure_noise = 0.5 if solver_type == "bh2" else 0.0
        weights[-1] = jnp.where(order == 1, half, weights[-1])
        weights[-1] = jnp.where(at_an_end, at_pure_noise, weights[-1])
    elif most > 1:
        weights[1] = jnp.where((order == 2) & counts[1], divide(half, nodes[1], 0.0), weights[1])
    return weights
