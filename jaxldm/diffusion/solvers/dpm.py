"""DPM-Solver: multistep 2M and 3M, one-step 2S and 3S, and the SDE (Lu, Zhou, Bao, Chen, Li and Zhu 2022).

The mirror of DPM-Solver++: all integrate eps instead of x_0 as a function of lambda = log(alpha / sigma),
under the weight e^{h (1 - u)}: h has the other sign, sigma and alpha change places. Steps from pure noise and
onto the clean row, where that weight is infinite, are DDIM's.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import checked, count, flag, number
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.diffusion.solvers.dpmpp import (
    PARABOLAS,
    SOLVER_TYPES,
    SinglestepState,
    at_boundary,
    ends_in_first_order,
    half_log_snr,
    parabola_weights,
    relative_steps,
    slope_weight,
    third_order_step,
)
from jaxldm.diffusion.solvers.dpmpp_3s import begin_thirds, next_thirds, order_of_third, thirds
from jaxldm.diffusion.solvers.dpmpp_sde import move_with_noise
from jaxldm.diffusion.solvers.multistep import MultistepState, begin
from jaxldm.diffusion.solvers.solver import Row, Solver, divide, move, noise_like, row
from jaxldm.diffusion.values import equal_by_call
from jaxldm.errors import one_of


def move_along(
    x: Float[Array, "B ..."],
    x_0: Float[Array, "B ..."],
    extra: Float[Array, "B ..."],
    here: Row,
    there: Row,
) -> Float[Array, "B ..."]:
    """(alpha_s / alpha_t) x - sigma_s (e^h - 1) (eps + extra): from row t to row s.

    `extra` is what is added to the eps of x and x_0, and 0 from pure noise and onto the clean row.
    """
    weight = divide(there.alpha * here.sigma, here.alpha, 0.0) - there.sigma  # sigma_s (e^h - 1)
    return move(x, x_0, here, there) - weight * extra


@checked(lower_order_final=flag, euler_at_final=flag)
@equal_by_call
def dpm_2m(
    lower_order_final: bool = True, solver_type: str = "midpoint", euler_at_final: bool = False
) -> Solver:
    """DPM-Solver of second order, multistep: `dpmpp_2m` with eps in the place of x_0.

        D = (1 + 1/(2 r)) eps - 1/(2 r) eps_previous,    r = h_previous / h,    h = lambda_s - lambda_t
        x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) D

    The first step, and those from pure noise or onto the clean row, are of first order.

    Args:
        lower_order_final: in runs of fewer than 15 steps, take the last step in first order.
        solver_type: "midpoint" is the printed 1/2 in D; "heun" the exact integral of the slope in its place.
        euler_at_final: take the last step in first order in runs of any length.

    Raises:
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        epsilon = implied_noise(x_0, state.x, here.alpha, here.sigma)
        slope = previous_slope(state, grid, i, solver_type, lower_order_final, euler_at_final)
        x = move_along(state.x, x_0, slope * (epsilon - state.past[0]), here, there)
        return MultistepState(x, (epsilon,), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 1), step)


def previous_slope(
    state: MultistepState,
    grid: Any,
    i: Any,
    solver_type: str,
    lower_order_final: bool,
    euler_at_final: bool,
) -> Float[Array, ""]:
    """How much of (eps - eps_previous) is added to eps; 0 in steps of first order."""
    before, here, there = row(grid, jnp.maximum(i - 1, 0)), row(grid, i), row(grid, i + 1)
    first_order = (state.taken == 0) | at_boundary(here) | at_boundary(there)
    first_order |= ends_in_first_order(grid, i, lower_order_final, euler_at_final)
    h = jnp.where(first_order, 1, half_log_snr(there) - half_log_snr(here))
    h_previous = half_log_snr(here) - half_log_snr(before)
    return jnp.where(first_order, 0, slope_weight(-h, solver_type) * divide(h, h_previous, 0.0))


@checked(lower_order_final=flag, euler_at_final=flag)
@equal_by_call
def dpm_3m(
    lower_order_final: bool = True,
    solver_type: str = "midpoint",
    euler_at_final: bool = False,
    parabola: str = "exact",
) -> Solver:
    """DPM-Solver of third order, multistep: the parabola through the last three eps, integrated exactly.

    `dpmpp_3m` with eps in the place of x_0, under the weight e^{h (1 - u)}.

    Args:
        lower_order_final: in runs of fewer than 15 steps, the last step but one is at most of second order
            and the last of first.
        solver_type: of the steps of second order, see `dpm_2m`.
        euler_at_final: take the last step in first order in runs of any length.
        parabola: "half" takes half of the mean of u^2, as diffusers does: that leaves second order.

    Raises:
        UnknownNameError: another solver_type or parabola.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)
    one_of("parabola", parabola, PARABOLAS)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        order = third_order_step(state, grid, i, lower_order_final, euler_at_final)
        h, r_0, r_1 = relative_steps(grid, i, order)
        x_0, (e_1, e_2) = denoise(state.x, here.t), state.past
        e_0 = implied_noise(x_0, state.x, here.alpha, here.sigma)
        slope, second = parabola_weights(-h, r_0, order, solver_type, parabola)
        D_1 = divide(1.0, r_0, 0.0) * (e_0 - e_1)
        D_2 = divide(1.0, r_0 + r_1, 0.0) * (D_1 - divide(1.0, r_1, 0.0) * (e_1 - e_2))
        x = move_along(state.x, x_0, slope * D_1 + second * D_2, here, there)
        return MultistepState(x, (e_0, e_1), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 2), step)


@checked(lower_order_final=flag)
@equal_by_call
def dpm_2s(solver_type: str = "midpoint", lower_order_final: bool = False) -> Solver:
    """DPM-Solver-2, with rows of the grid as intermediate points: `dpmpp_2s` with eps in the place of x_0.

    Steps come in pairs from row t over row s to row u: a first-order step to s, then, from x_t again,

        D = eps(t) + (eps(s) - eps(t)) / (2 r),    r = h_s / h_u,    h = lambda - lambda_t
        x_u = (alpha_u / alpha_t) x_t - sigma_u (e^{h_u} - 1) D.

    A last step that has no partner, or that begins at pure noise or ends clean, is of first order. Cut its
    grids at even rows.

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
        closes = (state.taken % 2 == 1) & ~at_boundary(there) & ~at_boundary(base)
        closes &= jnp.logical_not(ends_in_first_order(grid, i, False, lower_order_final))
        h_here = jnp.where(closes, half_log_snr(here) - half_log_snr(base), 1)
        h_there = jnp.where(closes, half_log_snr(there) - half_log_snr(base), 1)
        weight = slope_weight(-h_there, solver_type) * divide(h_there, h_here, 1.0)
        base_epsilon = implied_noise(state.base_x_0, state.base_x, base.alpha, base.sigma)
        epsilon = implied_noise(x_0, state.x, here.alpha, here.sigma)
        extra = jnp.where(closes, weight, 0) * (epsilon - base_epsilon)
        second = move_along(state.base_x, state.base_x_0, extra, base, there)
        x = jnp.where(closes, second, move(state.x, x_0, here, there))
        return SinglestepState(x, state.x, x_0, state.taken + 1), x_0

    return Solver(lambda x: SinglestepState(x, x, jnp.zeros_like(x), jnp.int32(0)), step)


@checked(lower_order_final=flag)
@equal_by_call
def dpm_3s(solver_type: str = "midpoint", lower_order_final: bool = False) -> Solver:
    """DPM-Solver-3, with rows of the grid as intermediate points: `dpmpp_3s` with eps in the place of x_0.

    Steps that begin at pure noise or end clean are of first order, from where x is.

    Args:
        solver_type: see `dpmpp_3s`.
        lower_order_final: see `dpmpp_3s`.

    Raises:
        UnknownNameError: another solver_type.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        order = order_of_third(state, grid, i, lower_order_final)
        base = row(grid, jnp.maximum(i - order + 1, 0))
        order = jnp.where(at_boundary(base), 1, order)
        x_0 = denoise(state.x, here.t)
        epsilon = implied_noise(x_0, state.x, here.alpha, here.sigma)
        middle, latest = thirds(grid, i, order, -1.0, solver_type)
        extra = middle * (state.middle - state.base) + latest * (epsilon - state.base)
        base_x_0 = (state.base_x - base.sigma * state.base) / jnp.where(base.alpha == 0, 1, base.alpha)
        later = move_along(state.base_x, base_x_0, extra, base, there)
        x = jnp.where(order == 1, move(state.x, x_0, here, there), later)
        return next_thirds(state, x, epsilon, order), x_0

    return Solver(begin_thirds, step)


@checked(order=count(1, 2), eta=number(0), s_noise=number(0), lower_order_final=flag, euler_at_final=flag)
@equal_by_call
def dpm_sde(
    order: int = 2,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Solver:
    """SDE-DPM-Solver, Lu et al. 2022 (DPM-Solver++), equations 18 and 19 there: the reverse SDE in eps.

        x_s = (alpha_s / alpha_t) x_t - (1 + eta) sigma_s (e^h - 1) D
              + sigma_s sqrt(eta (e^{2h} - 1)) s_noise z,    D as in `dpm_2m`, or eps for order 1

    Take `dpmpp_2m_sde` where you may choose: what is exact here is the noise, and x_0 is not. Steps from pure
    noise and onto the clean row are those of `dpmpp_2m_sde`.

    Args:
        order: 1 or 2.
        eta: 0 is `dpm_2m`, which draws no noise; 1 the reverse SDE of the diffusion.
        s_noise: standard deviation of the added noise.
        solver_type: see `dpm_2m`.
        lower_order_final: in runs of fewer than 15 steps, take the last step in first order.
        euler_at_final: take the last step in first order in runs of any length.

    Raises:
        UnknownNameError: another solver_type.
        InvalidArgumentError: another order, a negative eta or s_noise.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)

    def step(state, denoise, grid, i, keys):
        here, there = row(grid, i), row(grid, i + 1)
        x_0 = denoise(state.x, here.t)
        epsilon = implied_noise(x_0, state.x, here.alpha, here.sigma)
        slope = 0.0
        if order == 2:
            slope = previous_slope(state, grid, i, solver_type, lower_order_final, euler_at_final)
        D = epsilon + slope * (epsilon - state.past[0])
        ends = at_boundary(here) | at_boundary(there)
        ratio = divide(there.alpha * here.sigma, here.alpha, 0.0)  # sigma_s e^h
        x = divide(there.alpha, here.alpha, 0.0) * state.x - (1 + eta) * (ratio - there.sigma) * D
        if eta > 0:
            variance = jnp.maximum((ratio - there.sigma) * (ratio + there.sigma), 0)
            x += s_noise * jnp.sqrt(eta * variance) * noise_like(keys, x)
        # With finite numbers where it is not used, for the sake of gradients.
        a, b = (Row(*(jnp.where(ends, value, 0.5) for value in end)) for end in (here, there))
        x = jnp.where(ends, move_with_noise(state.x, x_0, a, b, eta, s_noise, keys), x)
        return MultistepState(x, (epsilon,), state.taken + 1), x_0

    return Solver(lambda x: begin(x, 1), step)
