"""What the multistep solvers share: a memory of past steps, and the polynomial through what it holds.

A multistep solver interpolates the network's answers at the last rows by a polynomial and integrates that
exactly: in sigma / alpha (LMS), or in log(sigma / alpha) under an exponential weight (DEIS, DPM-Solver++,
UniPC). Everything here is arithmetic on a few scalars; the row number may be traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxldm.diffusion.grids import Grid
from jaxldm.diffusion.solvers.solver import Row, divide, row


class MultistepState(NamedTuple):
    """x, what the steps before remember (the latest first), and how many steps have been taken."""

    x: Float[Array, "B ..."]
    past: tuple[Float[Array, "B ..."], ...]
    taken: Int[Array, ""]


def begin(x: Float[Array, "B ..."], memory: int) -> MultistepState:
    """A state that has taken no step yet and will remember `memory` of them."""
    return MultistepState(x, (jnp.zeros_like(x),) * memory, jnp.int32(0))


def remember(
    value: Float[Array, "B ..."], past: tuple[Float[Array, "B ..."], ...]
) -> tuple[Float[Array, "B ..."], ...]:
    """`past` with its latest step in front and its oldest forgotten."""
    return (value, *past)[: len(past)]


def order_of_step(
    order: int,
    taken: Int[Array, ""],
    at_boundary: Bool[Array, ""],
    steps_left: Int[Any, ""] | int | None = None,
) -> Int[Array, ""]:
    """The order that a step can have: as much as it remembers, 1 from or onto an end of the path.

    Args:
        order: what was asked for; a run of fewer steps never reaches it.
        taken: steps before this one.
        at_boundary: whether the variable of the polynomial is infinite at either row.
        steps_left: falls to 1 at the last step; None where the last steps keep their order.
    """
    possible = jnp.minimum(order, taken + 1)
    if steps_left is not None:
        possible = jnp.minimum(possible, steps_left)
    return jnp.where(at_boundary, 1, possible)


def past_nodes(
    grid: Grid, i: Int[Any, ""] | int, coordinate: Callable[[Row], Any], order: Int[Any, ""] | int, most: int
) -> tuple[list[Float[Array, ""]], list[Bool[Array, ""]]]:
    """Where rows i, i - 1, ... lie, seen from row i in units of the step to row i + 1; and which are valid.

    `order` of them are used in this step (it may be traced), out of `most`. A row where the coordinate is
    infinite is not: that is the limit of the interpolating polynomial as the row goes there.
    """
    here = coordinate(row(grid, i))
    width = coordinate(row(grid, i + 1)) - here
    nodes, valid = [], []
    for m in range(most):
        distance = coordinate(row(grid, jnp.maximum(i - m, 0))) - here
        valid.append((m < order) & jnp.isfinite(distance))
        nodes.append(jnp.where(valid[m], divide(distance, width, -m), -m))
    return nodes, valid


def polynomial_weights(
    nodes: Sequence[Float[Array, ""]],
    valid: Sequence[Bool[Array, ""]],
    moments: Sequence[Float[Array, ""] | float],
) -> list[Float[Array, ""]]:
    """The integral of each Lagrange polynomial: quadrature weights for values at the valid nodes.

    moments[p] is the integral of u^p under the weight function of the quadrature; nodes that are not
    valid get weight 0.
    """
    weights = []
    for j in range(len(nodes)):
        polynomial = [1.0]  # its coefficients, of 1, u, u^2, ...
        for m in range(len(nodes)):
            if m != j:
                both = valid[j] & valid[m]
                slope = jnp.where(both, divide(1.0, nodes[j] - nodes[m], 0.0), 0)
                constant = jnp.where(both, -slope * nodes[m], 1)
                same, raised = [*polynomial, 0.0], [0.0, *polynomial]
                polynomial = [constant * c + slope * r for c, r in zip(same, raised, strict=True)]
        total = sum(c * moment for c, moment in zip(polynomial, moments, strict=True))
        weights.append(jnp.where(valid[j], total, 0))
    return weights


def exponential_moments(h: Float[Array, ""], most: int) -> list[Float[Array, ""]]:
    """The integrals of h e^{-h (1 - u)} u^p over u from 0 to 1, for p = 0 ... most - 1.

    They are p! h phi_{p+1}(-h) in the notation of exponential integrators. The recurrence M_p = 1 - p M_{p-1}
    / h loses digits for small h; there the highest is a series and the recurrence runs downwards. All are 1
    at h = inf.
    """
    small = jnp.abs(h) < 1
    near, far = jnp.where(small, h, 1), jnp.where(small, 1, h)
    up = [-jnp.expm1(-far)]
    for p in range(1, most):
        up.append(1 - p * up[-1] / far)
    series = jnp.zeros_like(h)
    for n in reversed(range(18)):
        series = 1 / math.factorial(n + most) - near * series
    down = [math.factorial(most - 1) * near * series]
    for p in reversed(range(1, most)):
        down.insert(0, (1 - down[0]) * near / p)
    return [jnp.where(small, low, high) for low, high in zip(down, up, strict=True)]


def difference(
    weights: Sequence[Float[Array, ""]], now: Float[Array, "B ..."], past: Sequence[Float[Array, "B ..."]]
) -> Float[Array, "B ..."] | int:
    """sum_m weights[m] (past[m - 1] - now), m = 1, 2, ...: what the memory adds to a first-order step."""
    return sum(weight * (value - now) for weight, value in zip(weights[1:], past, strict=True))
