"""Order by measurement: the slope of log error over log steps, in float64, for each solver on each path.

The error is against the exact solution: the closed form for the Gaussian, SciPy's eighth-order solver in
another variable for the mixture. The grids are uniform in the variable that the theory asks for (log-SNR or
Karras's) and end at sigma_min, because the step onto the clean row is of first order by construction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import other_solvers
import pytest
from mixture_reference import MEANS, STDS, WEIGHTS, solve_exactly
from solver_kinds import DISTILLED, NOISY, SAME_AS

from jaxldm import diffusion as D

# The first step of a multistep solver is Euler's, but at the noisy end eps and x_0 hardly change.
KEEP = {"lower_order_final": False}
ORDERS = [
    ("ddim", {}, 1),
    ("heun", {}, 2),
    ("dpm2", {}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {}, 4),
    ("pndm", {}, 2),
    ("pndm", {"skip_prk_steps": False}, 2),
    ("deis", {}, 2),
    ("deis", {"order": 3}, 3),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_3m", {}, 3),
    ("dpmpp_3s", {}, 3),
    ("dpmpp_3s", {"solver_type": "heun"}, 3),
    ("dpm_2s", {}, 2),
    ("dpm_2m", {}, 2),
    ("dpm_2m", {"solver_type": "heun"}, 2),
    ("dpm_3m", {}, 3),
    ("dpm_3m", {"parabola": "half"}, 2),
    ("dpm_3s", {}, 3),
    ("dpm_3s", {"solver_type": "heun"}, 3),
    ("ipndm", {}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("sa_solver", {"tau": 0.0}, 2),
    ("unipc", {"order": 1, **KEEP}, 2),
    ("unipc", KEEP, 3),
    ("unipc", {"solver_type": "bh1", **KEEP}, 3),
    ("unipc", {"order": 3, **KEEP}, 4),
    ("unipc", {"corrector": False, **KEEP}, 2),
    # What others compute under the same names, and why it is not what we do unless asked.
    ("dpmpp_3m of other programs", {"curvature": "halved"}, 2),
    ("pndm", {"combine": "v_prediction"}, 1),
]
OTHER_PROGRAMS = {"dpmpp_3m of other programs": other_solvers.dpmpp_3m}
STEPS = (64, 128, 256, 512)
IN_THREES = (63, 126, 252, 504)  # of one-step solvers of third order
PATHS = {
    "vp": (D.VP(D.linear_betas()), "exponential"),
    "edm": (D.EDM(), "karras"),
    "flow": (D.Flow(t_min=0.01), np.geomspace),
}
MEAN, STD = np.array([0.7, -0.4]), 0.3
MIXTURES = {
    "gaussian": (np.ones(2), np.stack([MEAN, MEAN]), np.full(2, STD)),  # twice the same: a mixture in shape
    "mixture": (WEIGHTS, MEANS, STDS),
}


class PathByNumber:
    """One of PATHS, chosen by a number that may be traced: one compilation serves them all."""

    __class__ = D.Path  # to `isinstance`

    def __init__(self, number):
        self.number = number

    def __getattr__(self, name):
        return lambda t: jax.lax.switch(self.number, [getattr(path, name) for path, _ in PATHS.values()], t)


def grid_of(path, spacing, steps):
    if isinstance(spacing, str):
        return D.make_grid(path, steps, spacing=spacing, final="sigma_min")
    last = path.sigma(path.t_min) / path.alpha(path.t_min)
    times = path.time(spacing(50, last, steps + 1))
    return D.at_times(path, times[:-1], final="sigma_min")


@functools.cache
def problem(path_name, numbers=STEPS):
    """Grids, x at their first row, and the exact x at their last for each mixture."""
    path, spacing = PATHS[path_name]
    grids = [grid_of(path, spacing, steps) for steps in numbers]
    x = np.random.default_rng(0).standard_normal((16, 2)) * grids[0].sigma[0]
    start, end = (grids[0].alpha[0], grids[0].sigma[0]), (grids[0].alpha[-1], grids[0].sigma[-1])
    scales = [np.hypot(alpha * STD, sigma) for alpha, sigma in (start, end)]
    gaussian = end[0] * MEAN + scales[1] / scales[0] * (x - start[0] * MEAN)
    return grids, x, {"gaussian": gaussian, "mixture": solve_exactly(x, grids[0], WEIGHTS, MEANS, STDS)}


def slope(errors, steps=STEPS):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_every_deterministic_solver_has_an_order_here():
    measured = {name for name, _, _ in ORDERS} | set(SAME_AS)
    elsewhere = {"restart", "flow_euler", "flow_heun"}
    assert set(D.solvers.SOLVERS) - measured <= NOISY | DISTILLED | elsewhere


@pytest.mark.parametrize("name, options, order", ORDERS, ids=lambda value: str(value))
def test_order(name, options, order, x64):
    @jax.jit
    def run(number, grid, x, mixture):
        denoise = D.gaussian_mixture_denoiser(PathByNumber(number), *mixture)
        return D.sample(jax.random.key(0), denoise, make(**options), grid, x)

    make = OTHER_PROGRAMS.get(name) or functools.partial(D.solvers.make, name)
    numbers = IN_THREES if name.endswith("_3s") else STEPS
    for number, path_name in enumerate(PATHS):
        grids, x, exact = problem(path_name, numbers)
        for mixture, solution in exact.items():
            runs = [run(number, D.pad(grid, max(STEPS)), x, MIXTURES[mixture]) for grid in grids]
            errors = [np.sqrt(np.mean((np.asarray(ours) - solution) ** 2)) for ours in runs]
            found, case = slope(errors, numbers), f"{path_name}, {mixture}: errors {errors}"
            if mixture == "gaussian":  # on even steps of log-SNR its leading error may cancel
                assert found > order - 0.2 * max(order - 1, 1), (found, case)
            else:
                assert found == pytest.approx(order, abs=0.2 * max(order - 1, 1)), (found, case)
    assert run._cache_size() == 1


@pytest.mark.parametrize("name, same", SAME_AS.items())
def test_same_as(name, same):
    grid = D.make_grid(PATHS["flow"][0], 7)
    x = jax.random.normal(jax.random.key(1), (3, 4))
    denoise = D.gaussian_denoiser(PATHS["flow"][0], 0.3, 0.5)
    runs = [D.sample(jax.random.key(0), denoise, D.solvers.make(solver), grid, x) for solver in (name, same)]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize(
    "name, least",
    [
        ("ddim", 0.9),
        ("heun", 1.7),
        ("dpm2", 1.7),
        ("dpmpp_2m", 1.3),
        ("dpmpp_2s", 1.6),
        ("dpmpp_3m", 1.3),
        ("lms", 1.3),
        ("unipc", 1.3),
    ],
)
def test_from_pure_noise_to_the_clean_image_nothing_spoils_the_order(name, least, x64):
    # Here log-SNR is infinite at both ends; the end steps are of first order, but short.
    path = D.Flow()
    x = np.random.default_rng(0).standard_normal((16, 2))
    almost = D.Grid(np.array([1.0, 1e-9]), np.array([0.0, 1 - 1e-9]), np.array([1.0, 1e-9]))
    exact = solve_exactly(x, almost, WEIGHTS, MEANS, STDS)
    denoise = D.gaussian_mixture_denoiser(path, WEIGHTS, MEANS, STDS)
    run = jax.jit(
        lambda grid: D.sample(jax.random.key(0), denoise, D.solvers.make(name), grid, jnp.asarray(x))
    )
    errors = [
        np.sqrt(np.mean((run(D.pad(D.make_grid(path, steps), max(STEPS))) - exact) ** 2)) for steps in STEPS
    ]
    assert slope(errors) > least


@pytest.mark.parametrize("skips", [True, False])
def test_pndm_on_even_steps_of_sigma(skips, x64):
    # Its weights are those of even steps: there they are Adams and Bashforth's, of order 4.
    path, steps = D.EDM(sigma_min=1.0), (32, 64, 128, 256)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 2)) * 4)
    denoise = D.gaussian_denoiser(path, MEAN, STD)
    exact = D.gaussian_solution(path, MEAN, STD, x, 4.0, 1.0)
    run = jax.jit(lambda grid: D.sample(jax.random.key(0), denoise, D.solvers.pndm(skips), grid, x))
    rows = [np.linspace(4, 1, count + 1)[:-1] for count in steps]
    grids = [D.at_sigmas(path, sigmas, final="sigma_min") for sigmas in rows]
    errors = [np.abs(run(D.pad(grid, max(steps))) - exact).max() for grid in grids]
    assert slope(errors, steps) > 3.5
