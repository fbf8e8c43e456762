"""The stochastic forms of DPM-Solver++, multistep: 2M and 3M.

Both integrate the reverse SDE in lambda = log(alpha / sigma). What is linear in x, and the noise, is exact;
x_0 is extrapolated from the answers at the rows before. Finite at pure noise and at the clean row.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxldm.arguments import checked, flag, number
from jaxldm.diffusion.solvers.dpmpp import (
    PARABOLAS,
    SOLVER_TYPES,
    at_boundary,
    ends_in_first_order,
    half_log_snr,
    parabola_weights,
    relative_steps,
    slope_weight,
    third_order_step,
)
from jaxldm.diffusion.solvers.multistep import MultistepState, begin
from jaxldm.diffusion.solvers.solver import Solver, divide, move, noise_like, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of


@checked(eta=number(0), s_noise=number(0), lower_order_final=flag, euler_at_final=flag)
@equal_by_call
def dpmpp_2m_sde(
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Solver:
    """SDE-DPM-Solver++(2M), Lu et al. 2022, section 4.4, with k-diffusion's eta: one evaluation a step.

        D = x_0 + w / r (x_0 - x_0_previous),    r = h_previous / h,    h = lambda_s - lambda_t
        x_s = (sigma_s / sigma_t) e^{-eta h} x_t - alpha_s (e^{-(1 + eta) h} - 1) D
              + sigma_s sqrt(1 - e^{-2 eta h}) s_noise z

    Weak order 2. The first step, and the step onto the clean row (h is infinite there), are of first order.

    Args:
        eta: 0 is `dpmpp_2m`, which draws no noise; 1 the reverse SDE of the diffusion.
        s_noise: standard deviation of the added noise.
        solver_type: "midpoint" has w = 1/2; "heun" the exact integral of the slope, see `dpmpp_2m`.
        lower_order_final: in runs of fewer than 15 steps that do not end clean, take the last step in first
            order too.
        euler_at_final: take the last step in first order in runs of any length.

    Raises:
        UnknownNameError: another solver_type.
        InvalidArgumentError: a negative eta or s_noise.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        before, here, there = row(grid, jnp.maximum(i - 1, 0)), row(grid, i), row(grid, i + 1)
        h = half_log_snr(there) - half_log_snr(here)
        h_previous = half_log_snr(here) - half_log_snr(before)
        first_order = (state.taken == 0) | at_boundary(there)
        first_order |= ends_in_first_order(grid, i, lower_order_final, euler_at_final)

        x_0, (x_0_previous,) = denoise(state.x, here.t), state.past
        slope = slope_weight((1 + eta) * h, solver_type) * divide(h, h_previous, 0.0)
        D = x_0 + jnp.where(first_order, 0, slope) * (x_0 - x_0_previous)
        x = move_with_noise(state.x, D, here, there, eta, s_noise, keys)
        return MultistepState(x, (x_0,), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 1), step)


@checked(eta=number(0), s_noise=number(0), lower_order_final=flag, euler_at_final=flag)
@equal_by_call
def dpmpp_3m_sde(
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "heun",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    parabola: str = "exact",
) -> Solver:
    """DPM-Solver++(3M) SDE, after k-diffusion's `sample_dpmpp_3m_sde`: the parabola through three x_0.

    The step of `dpmpp_2m_sde`, with the D of `dpmpp_3m` under the weight e^{-(1 + eta) h (1 - u)}. Third
    order for eta = 0. With noise the weak order stays 2: the last increment of the noise does not determine
    the next. The first step is of first order, the second of second.

    Args:
        eta: 0 is `dpmpp_3m`, which draws no noise; 1 the reverse SDE of the diffusion.
        s_noise: standard deviation of the added noise.
        solver_type: of the steps of second order: "heun" as in k-diffusion, "midpoint" as in diffusers.
        lower_order_final: in runs of fewer than 15 steps, the last step but one is at most of second order
            and the last of first.
        euler_at_final: take the last step in first order in runs of any length.
        parabola: "half" as k-diffusion, see `dpmpp_3m`; "diffusers" has another sign as well, so that the
            error does not vanish with h.

    Raises:
        UnknownNameError: another solver_type or parabola.
        InvalidArgumentError: a negative eta or s_noise.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)
    one_of("parabola", parabola, (*PARABOLAS, "diffusers"))

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        order = third_order_step(state, grid, i, lower_order_final, euler_at_final)
        h, r_0, r_1 = relative_steps(grid, i, order)

        x_0, (x_1, x_2) = denoise(state.x, here.t), state.past
        slope, second = parabola_weights((1 + eta) * h, r_0, order, solver_type, parabola)
        D_1 = divide(1.0, r_0, 0.0) * (x_0 - x_1)
        D_2 = divide(1.0, r_0 + r_1, 0.0) * (D_1 - divide(1.0, r_1, 0.0) * (x_1 - x_2))
        D = x_0 + slope * D_1 + second * D_2
        x = move_with_noise(state.x, D, here, there, eta, s_noise, keys)
        return MultistepState(x, (x_0, x_1), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 2), step)


def move_with_noise(x, x_0, here, there, eta, s_noise, keys):
    """The exact step of the reverse SDE, made less or more noisy by eta, if x_0 stayed what it is."""
    if eta == 0:
        return move(x, x_0, here, there)
    h = half_log_snr(there) - half_log_snr(here)
    ratio = there.sigma / jnp.where(here.sigma == 0, 1, here.sigma)
    x = ratio * jnp.exp(-eta * h) * x - there.alpha * jnp.expm1(-(1 + eta) * h) * x_0
    return x + s_noise * there.sigma * jnp.sqrt(-jnp.expm1(-2 * eta * h)) * noise_like(keys, x)
