"""Steps as diffusers takes them where it errs, for `reference_quirks`: what is right is in `D.solvers`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm import diffusion as D
from jaxldm.diffusion.grids import steps_in
from jaxldm.diffusion.predictions import LEVEL_COEFFICIENTS, implied_noise
from jaxldm.diffusion.solvers.pndm import ADAMS_BASHFORTH
from jaxldm.diffusion.solvers.predictor_corrector import folded, langevin_step, norms
from jaxldm.diffusion.solvers.solver import Row, Solver, State, move, noise_like, path_of, row
from jaxldm.diffusion.values import equal_by_call


def level_at(path: D.Path, grid: D.Grid, t: Float[Array, ""]) -> Row:
    """The row at a timestep; below 0 the last row of the run."""
    last, whole = row(grid, steps_in(grid)), jnp.maximum(t, 0)
    alpha, sigma = path.alpha(whole), path.sigma(whole)
    return Row(t, jnp.where(t < 0, last.alpha, alpha), jnp.where(t < 0, last.sigma, sigma))


@equal_by_call
def strided(solver: Solver, stride: int) -> Solver:
    """Each step ends `stride` timesteps further down, wherever the next row lies: DDIMScheduler.

    Args:
        solver: of one evaluation a step, without a memory.
        stride: T // N.
    """

    def step(state, denoise, grid, i, keys):
        end = level_at(path_of(denoise, "strided"), grid, grid.t[i] - stride)
        columns = [column.at[i + 1].set(value) for column, value in zip(grid[:3], end, strict=True)]
        return solver.step(state, denoise, D.Grid(*columns, *grid[3:]), i, keys)

    return Solver(solver.init, step)


class PndmState(NamedTuple):
    """x, where the averaged step starts, the sum of a Runge-Kutta step, past outputs, evaluations so far."""

    x: Float[Array, "B ..."]
    base: Float[Array, "B ..."]
    total: Float[Array, "B ..."]
    past: tuple[Float[Array, "B ..."], ...]
    taken: Int[Array, ""]


@equal_by_call
def pndm_by_evaluations(stride: int, runge_kutta: tuple[int, ...], combine: str) -> Solver:
    """PNDMScheduler: the rows of its grid are its evaluations, N + 1 or N + 9, and x's level is assumed.

    What a step does depends on how many evaluations were made, also where the run begins in the middle.

    Args:
        stride: T // N.
        runge_kutta: the timesteps of the evaluations of Runge-Kutta steps; empty without them.
        combine: see `D.solvers.pndm`.
    """
    coefficients, half = LEVEL_COEFFICIENTS[combine], stride // 2

    def step(state, denoise, grid, i, keys):
        path, here, c = path_of(denoise, "pndm"), row(grid, i), state.taken
        x_0 = denoise(state.x, here.t)
        a, b = coefficients(here.alpha, here.sigma)
        output = a * x_0 + b * implied_noise(x_0, state.x, here.alpha, here.sigma)
        if runge_kutta:
            from_rows = jnp.asarray(runge_kutta, state.x.dtype)[jnp.minimum(c // 4 * 4, len(runge_kutta) - 1)]
            is_rk, phase = c < len(runge_kutta), c % 4
        else:
            from_rows, is_rk, phase = here.t, jnp.bool_(False), jnp.int32(0)
        is_heun = (c == 1) & (not runge_kutta)
        remembers = jnp.where(is_rk, phase == 0, ~is_heun)
        older = (output, *state.past)[: len(state.past)]
        past = tuple(jnp.where(remembers, new, old) for new, old in zip(older, state.past, strict=True))

        # Adams-Bashforth over as many outputs as there are.
        known = jnp.minimum(c - 1, 3) if not runge_kutta else jnp.int32(3)
        weights = jnp.asarray(ADAMS_BASHFORTH, output.dtype)[jnp.maximum(known, 0)]
        average = sum(weight * value for weight, value in zip(weights, past, strict=True))
        average = jnp.where(is_heun, (output + state.past[0]) / 2, average)
        part = jnp.where((phase == 0) | (phase == 3), 1 / 6, 1 / 3)
        total = jnp.where(is_rk, jnp.where(phase == 0, 0, state.total) + part * output, state.total)
        average = jnp.where(is_rk, jnp.where(phase == 3, total, output), average)

        starts = jnp.where(is_rk, phase == 0, c == 0)
        base = jnp.where(starts, state.x, state.base)
        x = jnp.where(is_rk | is_heun, base, state.x)
        begin = jnp.where(is_rk, from_rows, jnp.where(is_heun, here.t + stride, here.t))
        down = jnp.where(c % 2 == 0, half, 0)
        end = jnp.where(is_rk, here.t - down, jnp.where(is_heun, here.t, here.t - stride))
        x = _transfer(x, average, level_at(path, grid, begin), level_at(path, grid, end), coefficients)
        return PndmState(x, base, total, past, c + 1), x_0

    def init(x):
        zero = jnp.zeros_like(x)
        return PndmState(x, zero, zero, (zero,) * 4, jnp.int32(0))

    return Solver(init, step)


def _transfer(x: Any, output: Any, here: Row, there: Row, coefficients: Any) -> Float[Array, "B ..."]:
    """From x at row `here`, where the output is a x_0 + b eps, to row `there`."""
    a, b = coefficients(here.alpha, here.sigma)
    whole = here.alpha * b - here.sigma * a
    return move(x, (b * x - here.sigma * output) / whole, here, there)


@equal_by_call
def euler_maruyama() -> Solver:
    """ScoreSdeVpScheduler: Euler-Maruyama steps of the reverse SDE, 1 / N each (Song et al. 2021)."""

    def step(state, denoise, grid, i, keys):
        path: Any = path_of(denoise, "euler_maruyama")
        x, here = state.x, row(grid, i)
        x_0 = denoise(x, here.t)
        score = -implied_noise(x_0, x, here.alpha, here.sigma) / here.sigma
        width = 1 / (grid.start + steps_in(grid))
        rate = path.beta_min + here.t * (path.beta_max - path.beta_min)
        mean = x + (0.5 * x + score) * rate * width
        return State(mean + jnp.sqrt(rate * width) * noise_like(keys, x)), x_0

    return Solver(State, step)


@equal_by_call
def score_ve_of_diffusers(
    levels: tuple[tuple[float, ...], tuple[float, ...]], snr: float, correct_steps: int
) -> Solver:
    """ScoreSdeVeScheduler: `predictor_corrector` with one length of the Langevin step for the whole batch.

    Args:
        levels: for each row the level that a step begins and ends at, which need not be those of the row.
        snr, correct_steps: see there.
    """

    def step(state, denoise, grid, i, keys):
        here, x = row(grid, i), state.x
        x_0 = first = denoise(x, here.t)
        for k in range(correct_steps):
            g, z = (x_0 - x) / here.sigma**2, noise_like(folded(keys, k), x)
            x = langevin_step(x, g, z, snr * jnp.mean(norms(z)) / jnp.mean(norms(g)))
            x_0 = denoise(x, here.t)
        begins, ends = (jnp.asarray(np.asarray(column), x.dtype)[grid.start + i] for column in levels)
        variance = begins**2 - ends**2
        mean = x + variance * (x_0 - x) / here.sigma**2
        std = jnp.where(i + 1 == steps_in(grid), 0, jnp.sqrt(variance))
        return State(mean + std * noise_like(folded(keys, correct_steps), x)), first

    return Solver(State, step)


@equal_by_call
def without_x0_at_noise(solver: Solver) -> Solver:
    """At pure noise x_0 is taken for 0, which IPNDMScheduler divides 0 by 1e-8 for."""

    def step(state, denoise, grid, i, keys):
        pure = row(grid, i).alpha == 0
        return solver.step(state, lambda x, t: jnp.where(pure, 0, denoise(x, t)), grid, i, keys)

    return Solver(solver.init, step)


@equal_by_call
def in_whole_run(solver: Solver, columns: tuple[tuple[float, ...], ...], counts: str) -> Solver:
    """The steps of a part of a run, with the orders and weights that they have in the whole run.

    Args:
        solver: any.
        columns: t, alpha and sigma of the whole run.
        counts: what stands for the number of steps taken. "steps": those that were. "rows": all rows before,
            whose answers are zeros (LMSDiscreteScheduler). "pairs": the rows before, from the second step on
            (DPMSolverSinglestepScheduler, whose pairs begin at even rows, and its threes at every third).
    """

    def step(state, denoise, grid, i, keys):
        dtype, number = state.x.dtype, grid.start + i
        whole = D.Grid(*(cast(Any, jnp.asarray(np.asarray(column), dtype)) for column in columns))
        if counts == "rows":
            state = state._replace(taken=jnp.asarray(number, jnp.int32))
        if counts == "pairs":
            state = state._replace(taken=jnp.where(state.taken == 0, 0, number).astype(jnp.int32))
        return solver.step(state, denoise, whole, number, keys)

    return Solver(solver.init, step)


@equal_by_call
def ddim_inverse_of_diffusers(kind: str, bounds: tuple[float, float] | None, stride: int) -> Solver:
    """DDIMInverseScheduler: one iteration, with x_0 and eps of the output at the level that x has.

    The network is asked at the time where the step ends, and each step begins `stride` timesteps below that.

    Args:
        kind: what the network predicts.
        bounds: of x_0, or None.
        stride: T // N.
    """
    coefficients = LEVEL_COEFFICIENTS[kind]

    def step(state, denoise, grid, i, keys):
        x, first, there = state.x, row(grid, 0), row(grid, i + 1)
        path: Any = path_of(denoise, "ddim_inverse")
        t = jnp.minimum(there.t - stride, path.t_noisy)
        alpha = jnp.where(t < 0, first.alpha, path.alpha(jnp.maximum(t, 0)))
        sigma = jnp.where(t < 0, first.sigma, path.sigma(jnp.maximum(t, 0)))
        found = denoise(x, there.t)
        a, b = coefficients(there.alpha, there.sigma)
        output = a * found + b * implied_noise(found, x, there.alpha, there.sigma)
        a, b = coefficients(alpha, sigma)
        whole = alpha * b - sigma * a
        x_0, epsilon = (b * x - sigma * output) / whole, (alpha * output - a * x) / whole
        x_0 = x_0 if bounds is None else jnp.clip(x_0, *bounds)
        return State(there.alpha * x_0 + there.sigma * epsilon), x_0

    return Solver(State, step)
