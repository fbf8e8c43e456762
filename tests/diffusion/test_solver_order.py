"""Order by measurement: the slope of log error over log steps, in float64, for each solver on each path.

The error is against the exact solution: the closed form for the Gaussian, SciPy's eighth-order solver in
another variable for the mixture. The grids are uniform in the variable that the theory asks for (log-SNR or
Karras's) and end at sigma_min, because the step onto the clean row is of first order by construction.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixture_reference import MEANS, STDS, WEIGHTS, solve_exactly

from jaxldm import diffusion as D

ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_2s": 2}
STEPS = (32, 64, 128, 256)
PATHS = {
    "vp": (D.vp_path(D.linear_betas()), "exponential"),
    "edm": (D.edm_path(), "karras"),
    "flow": (D.flow_path(t_min=0.01), np.geomspace),
}
MEAN, STD = np.array([0.7, -0.4]), 0.3


def grid_of(path, spacing, steps):
    if isinstance(spacing, str):
        return D.make_grid(path, steps, sigmas=spacing, final="sigma_min")
    last = path.sigma(path.t_min) / path.alpha(path.t_min)
    return D.make_grid(path, sigmas=spacing(50, last, steps + 1)[:-1], final="sigma_min")


def slope(errors):
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


def test_every_deterministic_solver_has_an_order_here():
    assert set(ORDERS) == set(D.solvers.SOLVERS) - {"ddpm"}


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "euler"])  # euler is ddim, bit for bit
@pytest.mark.parametrize("path_name", PATHS)
def test_order(path_name, name, x64):
    path, spacing = PATHS[path_name]
    grids = [grid_of(path, spacing, steps) for steps in STEPS]
    x = np.random.default_rng(0).standard_normal((16, 2)) * grids[0].sigma[0]

    @jax.jit
    def run(grid, weights, means, stds):
        denoise = D.gaussian_mixture_denoiser(path, weights, means, stds)
        return D.sample(jax.random.key(0), denoise, D.solvers.make(name), grid, jnp.asarray(x))

    def errors(exact, *mixture):
        runs = [np.asarray(run(D.pad(grid, max(STEPS)), *mixture)) for grid in grids]
        return [np.sqrt(np.mean((ours - exact) ** 2)) for ours in runs]

    start, end = (grids[0].alpha[0], grids[0].sigma[0]), (grids[0].alpha[-1], grids[0].sigma[-1])
    scales = [np.hypot(alpha * STD, sigma) for alpha, sigma in (start, end)]
    gaussian = end[0] * MEAN + scales[1] / scales[0] * (x - start[0] * MEAN)
    mixture = solve_exactly(x, grids[0], WEIGHTS, MEANS, STDS)
    twice = (
        np.ones(2),
        np.stack([MEAN, MEAN]),
        np.full(2, STD),
    )  # the Gaussian, as a mixture of the same shape
    assert slope(errors(gaussian, *twice)) == pytest.approx(ORDERS[name], abs=0.2)
    assert slope(errors(mixture, WEIGHTS, MEANS, STDS)) == pytest.approx(ORDERS[name], abs=0.2)


def test_euler_is_ddim():
    grid = D.make_grid(PATHS["flow"][0], 7)
    x = jax.random.normal(jax.random.key(1), (3, 4))
    denoise = D.gaussian_denoiser(PATHS["flow"][0], 0.3, 0.5)
    runs = [
        D.sample(jax.random.key(0), denoise, solver, grid, x)
        for solver in (D.solvers.euler(), D.solvers.ddim())
    ]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("name, least", [("ddim", 0.9), ("heun", 1.7), ("dpmpp_2m", 1.3), ("dpmpp_2s", 1.6)])
def test_from_pure_noise_to_the_clean_image_nothing_spoils_the_order(name, least, x64):
    # Here log-SNR is infinite at both ends; the end steps are of first order, but short.
    path = D.flow_path()
    x = np.random.default_rng(0).standard_normal((16, 2))
    almost = D.Grid(np.array([1.0, 1e-9]), np.array([0.0, 1 - 1e-9]), np.array([1.0, 1e-9]))
    exact = solve_exactly(x, almost, WEIGHTS, MEANS, STDS)
    denoise = D.gaussian_mixture_denoiser(path, WEIGHTS, MEANS, STDS)
    run = jax.jit(
        lambda grid: D.sample(jax.random.key(0), denoise, D.solvers.make(name), grid, jnp.asarray(x))
    )
    errors = [
        np.sqrt(np.mean((run(D.make_grid(path, steps, max_steps=max(STEPS))) - exact) ** 2))
        for steps in STEPS
    ]
    assert slope(errors) > least
