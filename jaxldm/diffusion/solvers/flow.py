"""Euler and Heun in the path's own time, on the velocity dx/dt = alpha' x_0 + sigma' eps.

`euler` and `heun` integrate over sigma / alpha instead. On the flow path Euler is the same both ways; on
curved paths (GVP, variance-preserving) these are other discretisations of the same ODE.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.diffusion.paths import Path
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.diffusion.solvers.solver import Row, Solver, State, path_of, row
from jaxldm.diffusion.values import equal_by_call


@equal_by_call
def flow_euler() -> Solver:
    """Euler's method in the path's own time, x_s = x_t + (s - t) v (Liu et al. 2022).

    First order, one evaluation a step.
    v = alpha' x_0 + sigma' eps is the velocity of the probability-flow ODE on any path (Ma et al. 2024,
    equation 3; on the flow path eps - x_0). The grid's t, alpha and sigma must belong together.

    Raises:
        InvalidArgumentError: a denoiser that does not know its path.
    """

    def step(state, denoise, grid, i, keys):
        path, here, there = path_of(denoise, "flow_euler"), row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        v = velocity(state.x, x_0, path, here, there)
        return State(state.x + (there.t - here.t) * v), x_0

    return Solver(State, step)


@equal_by_call
def flow_heun() -> Solver:
    """Heun's method in the path's own time: the step of `flow_euler` with the mean of both velocities.

    Second order, 2 N - 1 evaluations for N steps to the clean image: onto the clean row, where the noise in x
    cannot be seen, the step is Euler's. From pure noise it is Heun's.

    Raises:
        InvalidArgumentError: a denoiser that does not know its path.
    """

    def step(state, denoise, grid, i, keys):
        path, here, there = path_of(denoise, "flow_heun"), row(grid, i), row(grid, i + 1)
        width = there.t - here.t
        x_0 = denoise(state.x, here.t)
        v = velocity(state.x, x_0, path, here, there)
        euler = state.x + width * v

        def trapezoid(euler):
            return state.x + width / 2 * (v + velocity(euler, denoise(euler, there.t), path, there, here))

        return State(jax.lax.cond(there.sigma > 0, trapezoid, lambda euler: euler, euler)), x_0

    return Solver(State, step)


def velocity(
    x: Float[Array, "B ..."], x_0: Float[Array, "B ..."], path: Path, here: Row, other: Row
) -> Float[Array, "B ..."]:
    """dx/dt = alpha' x_0 + sigma' eps at row `here`, as seen from the row at the step's other end."""
    alpha_rate, sigma_rate = rates(path, here, other)
    return alpha_rate * x_0 + sigma_rate * implied_noise(x_0, x, here.alpha, here.sigma)


def rates(path: Path, here: Row, other: Row) -> tuple[Float[Array, " ..."], Float[Array, " ..."]]:
    """alpha'(t) and sigma'(t) at row `here`, taken a millionth of the path inside the step to the other row.

    Paths have kinks, a discrete one at every timestep; and where alpha or sigma is 0, a derivative may be
    infinite, or NaN by logarithms of 0.
    """
    inside = jnp.sign(other.t - here.t) * (1e-6 * (path.t_noisy - path.t_clean))
    return path.derivatives(here.t + inside)
