"""DPM-Solver++(3M) with the second difference that other programs compute: for parity with them alone.

Written with Lagrange's polynomials where `dpmpp_3m` has Newton's form: `curvature="exact"` checks it.
"""

import jax.numpy as jnp

from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.solvers.dpmpp import at_boundary, half_log_snr, slope_weight
from jaxldm.diffusion.solvers.dpmpp_sde import move_with_noise
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
from jaxldm.diffusion.solvers.solver import Solver, divide, row


def dpmpp_3m(curvature, eta=0.0, s_noise=1.0, solver_type="midpoint", lower_order_final=True):
    """`dpmpp_3m_sde`, which is `dpmpp_3m` at eta = 0.

    curvature: "exact"; "halved", half of the second difference: the authors' program, k-diffusion and the ODE
        of diffusers divide by r_0 + r_1 where Taylor's D_2 is twice that; "diffusers", what the SDE of
        diffusers has: a sign is wrong besides, so that it does not even vanish with h.
    """

    def step(state, denoise, grid, i, keys):
        here, there, num_steps = row(grid, i), row(grid, i + 1), steps_in(grid)
        x_0 = denoise(state.x, here.t)
        ends = at_boundary(here) | at_boundary(there)
        steps_left = jnp.where(lower_order_final & (num_steps < 15), num_steps - i, 3)
        order = order_of_step(3, state.taken, ends, steps_left)
        nodes, valid = past_nodes(grid, i, half_log_snr, order, 3)
        H = jnp.where(ends, 1, (1 + eta) * (half_log_snr(there) - half_log_snr(here)))
        whole, ramp, square = exponential_moments(H, 3)
        square = {"exact": square, "halved": square / 2, "diffusers": square / 2 - 1}[curvature]
        weights = polynomial_weights(nodes, valid, [whole, ramp, square])
        weights = [divide(weight, whole, 0.0) for weight in weights]
        second_order = divide(slope_weight(H, solver_type), nodes[1], 0.0)
        weights[1] = jnp.where((order == 2) & valid[1], second_order, weights[1])
        D = x_0 + difference(weights, x_0, state.past)
        x = move_with_noise(state.x, D, here, there, eta, s_noise, keys)
        return MultistepState(x, remember(x_0, state.past), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 2), step)
