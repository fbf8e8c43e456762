"""The stochastic forms of DPM-Solver++: multistep 2M and 3M, and one-step with a midpoint.

All integrate the reverse SDE in lambda = log(alpha / sigma). What is linear in x, and the noise, is exact;
x_0 is extrapolated from the answers at the rows before. Finite at pure noise and at the clean row.
"""

from __future__ import annotations

import jax
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
from jaxldm.diffusion.solvers.solver import Row, Solver, State, divide, move, noise_like, path_of, row
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


@checked(eta=number(0), s_noise=number(0))
@equal_by_call
def dpmpp_sde(eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """DPM-Solver++ (SDE) with a midpoint, k-diffusion's `sample_dpmpp_sde`: two evaluations a step.

    From row t a first-order step of the reverse SDE to the middle in lambda, and with the x_0 found there,
    from row t again, one to row s. The noise of both is one path, z_s = sqrt(w) z_mid + sqrt(1 - w) z' with
    w = (r_t - r_mid) / (r_t - r_s), r = sigma / alpha, as increments of a Brownian motion in r are. Steps
    that start at pure noise or end clean have no middle: N steps to the clean image take 2 N - 1 evaluations.

    Args:
        eta: 0 draws no noise and is of second order; 1 the reverse SDE of the diffusion.
        s_noise: standard deviation of the added noise.

    Raises:
        InvalidArgumentError: a negative eta or s_noise; when sampling, a denoiser without a path.
    """

    def step(state, denoise, grid, i, keys):
        path = path_of(denoise, "dpmpp_sde")
        x, here, there = state.x, row(grid, i), row(grid, i + 1)
        x_0 = denoise(x, here.t)
        whole = move_with_noise(x, x_0, here, there, eta, s_noise, keys)
        q = divide(there.sigma * here.alpha, here.sigma * there.alpha, 0.0)  # r_s / r_t; 0 at either end
        root = jnp.sqrt(jnp.where(q > 0, q, 1))

        def by_midpoint(whole):
            t = path.time(root * divide(here.sigma, here.alpha, 1.0))
            middle = Row(t, path.alpha(t), path.sigma(t))
            h, first, second = -2 * jnp.log(root), 0.0, 0.0
            if eta > 0:
                weight = 1 / (1 + root)  # (r_t - r_mid) / (r_t - r_s)
                first, other = (
                    noise_like(jax.vmap(jax.random.fold_in, (0, None))(keys, k), x) for k in (0, 1)
                )
                second = jnp.sqrt(weight) * first + jnp.sqrt(1 - weight) * other
            to_middle = _in_noise(x, x_0, here, middle, h / 2, eta, s_noise * first)
            return _in_noise(x, denoise(to_middle, t), here, there, h, eta, s_noise * second)

        x = jax.lax.cond(q > 0, by_midpoint, lambda whole: whole, whole)
        return State(x), x_0

    return Solver(State, step)


def _in_noise(x, x_0, here, there, h, eta, noise):
    """The exact step of width h with this noise, if x_0 stayed what it is."""
    x = there.sigma / here.sigma * jnp.exp(-eta * h) * x - there.alpha * jnp.expm1(-(1 + eta) * h) * x_0
    return x if eta == 0 else x + there.sigma * jnp.sqrt(-jnp.expm1(-2 * eta * h)) * noise


def move_with_noise(x, x_0, here, there, eta, s_noise, keys):
    """The exact step of the reverse SDE, made less or more noisy by eta, if x_0 stayed what it is."""
    if eta == 0:
        return move(x, x_0, here, there)
    h = half_log_snr(there) - half_log_snr(here)
    ratio = there.sigma / jnp.where(here.sigma == 0, 1, here.sigma)
    x = ratio * jnp.exp(-eta * h) * x - there.alpha * jnp.expm1(-(1 + eta) * h) * x_0
    return x + s_noise * there.sigma * jnp.sqrt(-jnp.expm1(-2 * eta * h)) * noise_like(keys, x)
