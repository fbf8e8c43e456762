"""SA-Solver: stochastic Adams methods, a predictor and a corrector (Xue, Yi, Luo et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.arguments import checked, count, flag, number, several
from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.solvers.dpmpp import at_boundary, half_log_snr
from jaxldm.diffusion.solvers.multistep import (
    difference,
    exponential_moments,
    order_of_step,
    past_nodes,
    polynomial_weights,
    remember,
)
from jaxldm.diffusion.solvers.solver import Row, Solver, noise_like, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import InvalidArgumentError


class SAState(NamedTuple):
    """x as predicted, the x and noise it was predicted from, past x_0, the corrector's order, steps taken."""

    x: Float[Array, "B ..."]
    base_x: Float[Array, "B ..."]
    noise: Float[Array, "B ..."]
    past: tuple[Float[Array, "B ..."], ...]
    order: Int[Array, ""]
    taken: Int[Array, ""]


@checked(
    predictor_order=count(1, 4),
    corrector_order=count(1, 4),
    tau=number(0),
    interval=several(number(0, infinite=True)),
    lower_order_final=flag,
)
@equal_by_call
def sa_solver(
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    interval: tuple[float, ...] = (0.05, 50.0),
    lower_order_final: bool = True,
) -> Solver:
    """Xue et al. 2023, Algorithm 1: one evaluation a step, at the predicted x; then that x is corrected.

    With h = lambda_s - lambda_t, H = (1 + tau^2) h and l_k the Lagrange polynomials of the rows before,

        x_s = (sigma_s / sigma_t) e^{-tau^2 h} x_t + alpha_s sum_k b_k x_0_k
              + sigma_s sqrt(1 - e^{-2 tau^2 h}) z
        b_k = integral of H e^{-H (1 - u)} l_k(u) over u from 0 to 1

    The predictor's rows are t and those before, the corrector's begin with s; it has the predictor's noise.
    Two rows have, as in the authors' program, H / 2 in the place of the integral of u. The step onto the
    clean row and that from pure noise are of first order.

    Args:
        predictor_order, corrector_order: how many rows.
        tau: how much noise; 0 is none, 1 the reverse SDE of the diffusion.
        interval: between which noise levels sigma / alpha there is noise, (low, high).
        lower_order_final: the last steps have fewer rows, as many as there are steps left.

    Raises:
        InvalidArgumentError: an argument out of range.
    """
    if len(interval) != 2 or interval[0] > interval[1]:
        raise InvalidArgumentError(f"interval must be two noise levels, (low, high), got {interval}")
    low, high = interval
    memory = max(predictor_order, corrector_order - 1)

    def noise_of(here):
        """tau^2 at a row."""
        is_between = (here.sigma >= low * here.alpha) & (here.sigma <= high * here.alpha)
        return jnp.where(is_between, tau**2, 0.0)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        before = row(grid, jnp.maximum(i - 1, 0))
        x_0 = denoise(state.x, here.t)
        outputs = (x_0, *state.past)

        # The corrector: row i, seen from row i - 1, is at u = 1.
        order = jnp.where(at_boundary(before) | at_boundary(here), 1, state.order)
        nodes, valid = past_nodes(grid, jnp.maximum(i - 1, 0), half_log_snr, order - 1, memory)
        nodes, valid = [jnp.ones_like(here.t), *nodes], [order > 0, *valid]
        eta = noise_of(before)
        corrected = advance(state.base_x, outputs, (nodes, valid), order, (before, here), eta, state.noise)
        x = jnp.where(state.taken > 0, corrected, state.x)

        left = steps_in(grid) - i
        ends = at_boundary(there) | at_boundary(here)
        order = order_of_step(predictor_order, state.taken, ends, left if lower_order_final else None)
        nodes, valid = past_nodes(grid, i, half_log_snr, order, memory)
        noise = noise_like(keys, x)
        predicted = advance(x, outputs, (nodes, valid), order, (here, there), noise_of(here), noise)
        next_order = jnp.minimum(corrector_order, state.taken + 2)
        next_order = jnp.minimum(next_order, left + 1) if lower_order_final else next_order
        past = remember(x_0, state.past)
        return SAState(predicted, x, noise, past, next_order, state.taken + 1), x_0

    def init(x):
        zero = jnp.zeros_like(x)
        return SAState(x, x, zero, (zero,) * memory, jnp.int32(1), jnp.int32(0))

    return Solver(init, step)


def advance(
    x: Float[Array, "B ..."],
    outputs: Sequence[Float[Array, "B ..."]],
    rows: tuple[list[Any], list[Any]],
    order: Int[Array, ""],
    ends: tuple[Row, Row],
    eta: Float[Array, ""],
    noise: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
    """x at the second end: the polynomial through the outputs at these nodes, integrated, and noise.

    Args:
        x: at the first end.
        outputs: x_0, the latest first.
        rows: (where each was given, which are valid).
        order: how many are valid.
        ends: the rows t and s.
        eta: tau^2.
        noise: standard normal.
    """
    (nodes, valid), (here, there) = rows, ends
    infinite = at_boundary(here) | at_boundary(there)
    h = jnp.where(infinite, 1, half_log_snr(there) - half_log_snr(here))
    moments = exponential_moments((1 + eta) * h, len(nodes))
    if len(nodes) > 1:
        moments[1] = jnp.where(order == 2, (1 + eta) * h / 2, moments[1])
    weights = polynomial_weights(nodes, valid, moments)
    more = difference(weights, outputs[0], outputs[1 : len(nodes)])
    # Of first order, finite at both ends: e^{-tau^2 h} is 0 there, or 1 without noise.
    decay = jnp.where(infinite, jnp.where(eta > 0, 0.0, 1.0), jnp.exp(-eta * h))
    ratio = decay * there.sigma / jnp.where(here.sigma == 0, 1, here.sigma)
    first = ratio * x + (there.alpha - ratio * here.alpha) * outputs[0]
    variance = jnp.where(eta > 0, (1 - decay) * (1 + decay), 1.0)
    fresh = jnp.where(eta > 0, there.sigma * jnp.sqrt(variance), 0)
    return first + jnp.where(infinite, 0, there.alpha) * more + fresh * noise
