"""Restart sampling: its grid, its noise, and the algorithm as Xu et al. 2023 print it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine_runs import marginal, moments_of, weak_order
from reference_schedulers import SEED, assert_close, jax_network, network, start_noise, step_noise

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

EDM, FLOW = D.EDM(), D.Flow(t_min=0.05)
NOISE = start_noise()
KEY = jax.random.key(SEED)
RESTARTS = [D.Restart(0.3, 2.0, num_steps=3, times=2), D.Restart(9.0, 20.0, num_steps=2)]


def test_rows_of_the_grid():
    grid = D.make_grid(EDM, 10)
    whole = D.restart_grid(EDM, grid, RESTARTS)
    assert len(whole.t) == len(grid.t) + 2 * 4 + 3
    rises = np.flatnonzero(np.diff(whole.sigma) > 0)
    assert len(rises) == 3
    for rise in rises:  # from a row of the grid to the top, and down to the same row
        assert whole.sigma[rise] in grid.sigma
        top = whole.sigma[rise + 1]
        np.testing.assert_allclose(top, 2.0 if top < 5 else 20.0, rtol=1e-6)
        assert whole.sigma[rise + (4 if top < 5 else 3)] == whole.sigma[rise]
    # Without the restarts the rest is the grid.
    kept = np.delete(
        whole.sigma, [k for r in rises for k in range(r + 1, r + (5 if whole.sigma[r] < 1 else 4))]
    )
    np.testing.assert_allclose(kept, grid.sigma, rtol=1e-6)
    np.testing.assert_array_equal(D.restart_grid(EDM, grid, []).sigma, grid.sigma)


def published(grid, restarts, rho=7.0):
    """Xu et al. 2023, Algorithm 1 with Heun's steps and sigma = t, on the noises that `sample` draws."""
    noises, drawn = step_noise(), itertools.count()

    def x_0(x, t):
        output = network(x / np.sqrt(t**2 + 0.25), np.log(t) / 4, np)
        return 0.25 / (t**2 + 0.25) * x + t * 0.5 / np.sqrt(t**2 + 0.25) * output

    def ode(x, times):
        for t, t_next in itertools.pairwise(times):
            next(drawn)
            slope = (x - x_0(x, t)) / t
            euler = x + (t_next - t) * slope
            x = (
                euler
                if t_next == 0
                else x + (t_next - t) / 2 * (slope + (euler - x_0(euler, t_next)) / t_next)
            )
        return x

    times, x = grid.sigma.astype(np.float64), 80.0 * NOISE
    turns = {int(np.argmin(np.abs(times - r.lowest))): r for r in restarts}
    for i in range(len(times) - 1):
        x = ode(x, times[i : i + 2])
        if i + 1 in turns:
            _, highest, num_steps, repeats = turns[i + 1]
            down = np.linspace(highest ** (1 / rho), times[i + 1] ** (1 / rho), num_steps + 1) ** rho
            for _ in range(repeats):
                z = noises[next(drawn)].numpy()
                x = ode(x + np.sqrt(highest**2 - times[i + 1] ** 2) * z, down)
    return x


def test_as_published():
    denoise = D.denoiser(jax_network, D.edm(D.EDM(), 0.5))
    grid = D.make_grid(EDM, 10)
    whole = D.restart_grid(EDM, grid, RESTARTS)
    run = jax.jit(lambda grid, x: D.sample(KEY, denoise, D.solvers.restart(), grid, x))
    reference = published(grid, RESTARTS)
    assert_close(np.asarray(run(D.pad(whole, 30), 80 * NOISE)), reference, "whole")
    # Cut in the middle of a restart, it goes on with the noise that the whole run draws.
    first, second = (D.pad(part, 30) for part in (D.cut(whole, 0, 12), D.cut(whole, 12)))
    assert_close(np.asarray(run(second, run(first, 80 * NOISE))), reference, "cut")


@pytest.mark.parametrize("path", [EDM, FLOW], ids=["edm", "flow"])
def test_the_marginals_stay_gaussian(path, x64):
    """Restarts end where the data is, to second order; also where the image shrinks as the noise grows."""
    mean, std = np.array([0.7, -0.4]), np.array([0.3, 0.8])
    first = 10.0 if path is EDM else 0.9

    lowest = first * (0.05 / first) ** 0.75  # a row of every one of the grids

    def grid_of(steps):
        t = np.geomspace(first, 0.05, steps + 1)
        grid = (
            D.at_times(path, t[:-1], final="sigma_min")
            if path is FLOW
            else D.cut(D.at_times(path, t), 0, steps)
        )
        return D.restart_grid(
            path, grid, [D.Restart(path.sigma(lowest) / path.alpha(lowest), 3.0, steps // 2, 2)]
        )

    slope, errors = weak_order(D.solvers.restart(), path, grid_of, (16, 32, 64), mean, std)
    assert slope == pytest.approx(2, abs=0.3), errors
    # One rise alone is exact, whatever the path.
    grid = grid_of(16)
    first_rise = int(np.flatnonzero(np.diff(grid.sigma) > 0)[0])
    rise = D.cut(grid, first_rise, first_rise + 1)
    moments = moments_of(D.solvers.restart(), D.gaussian_denoiser(path, mean, std), mean, std, 1)
    for ours, true in zip(moments(rise), marginal(rise, -1, mean, std), strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-10)


def test_restarts_repair_what_a_coarse_start_spoilt(x64):
    """The point of the method: noise contracts the error that the ODE carries to the end."""
    mean, std = np.array([0.7, -0.4]), np.array([0.3, 0.8])
    coarse = D.at_times(EDM, [80.0, 10.0, 1.0, *np.geomspace(0.9, 0.002, 40)])
    repaired = D.restart_grid(EDM, coarse, [D.Restart(0.05, 1.0, num_steps=30, times=3)])
    moments = moments_of(D.solvers.restart(), D.gaussian_denoiser(EDM, mean, std), mean, std, 160)
    errors = [np.abs(moments(grid)[1] - std**2).max() for grid in (coarse, repaired)]
    assert errors[1] < 0.3 * errors[0]


def test_a_grid_that_only_falls_is_the_inner_solver():
    denoise, grid, inner = D.denoiser(jax_network, D.flow(FLOW)), D.make_grid(FLOW, 6), D.solvers.dpmpp_2m()
    ours, theirs = (
        jax.jit(lambda x, s=s: D.sample(KEY, denoise, s, grid, x))(NOISE)
        for s in (D.solvers.restart(inner), inner)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_multistep_solver_starts_afresh_after_a_rise():
    denoise = D.denoiser(jax_network, D.flow(FLOW))
    solver = D.solvers.dpmpp_2m(lower_order_final=False)
    whole = D.restart_grid(FLOW, D.make_grid(FLOW, 8), [D.Restart(0.5, 1.5, 4)])
    top = int(np.flatnonzero(np.diff(whole.sigma) > 0)[0]) + 1
    x = D.sample(KEY, denoise, D.solvers.restart(solver), D.cut(whole, 0, top), jnp.asarray(NOISE))
    after = D.sample(KEY, denoise, solver, D.cut(whole, top), x)
    together = D.sample(KEY, denoise, D.solvers.restart(solver), whole, jnp.asarray(NOISE))
    np.testing.assert_allclose(together, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.restart_grid(EDM, D.pad(D.make_grid(EDM, 5), 9), RESTARTS), "padding"),
        (
            lambda: D.restart_grid(EDM, D.make_grid(EDM, 5), [D.Restart(2.5, 0.5, 3)]),
            "must rise|must be a finite",
        ),
        (lambda: D.restart_grid(EDM, D.make_grid(EDM, 5), [D.Restart(1.0, 90.0, 3)]), "ends at 80"),
        (
            lambda: D.restart_grid(FLOW, D.make_grid(FLOW, 5), [D.Restart(1.0, np.inf, 3)]),
            "must rise|must be a finite",
        ),
        (lambda: D.restart_grid(EDM, D.make_grid(EDM, 5), [D.Restart(0.5, 2.0, 0)]), "at least 1"),
        (lambda: D.solvers.restart(s_noise=-1.0), "s_noise"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
