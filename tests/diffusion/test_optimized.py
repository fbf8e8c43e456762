"""All solvers on one grid, and images that do not depend on their batch, compiled as users compile them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_kinds import DISTILLED, NOISY

from jaxldm import diffusion as D

OPTIMIZED = True  # see tests/conftest.py
PATH, MEAN, STD, KEY = D.VP.named("linear"), 0.3, 0.5, jax.random.key(4)
GRID = D.exponential(PATH, 64, final="sigma_min")
DENOISE = D.gaussian_denoiser(PATH, MEAN, STD)


@pytest.mark.parametrize("name", sorted(D.solvers.SOLVERS))
def test_every_solver_solves(name):
    x_T = D.initial_noise(KEY, (256, 2, 2, 1), GRID)
    x = np.asarray(D.sample(KEY, DENOISE, D.solvers.make(name), GRID, x_T))
    if name in DISTILLED:
        assert np.isfinite(x).all() and abs(x.mean() - MEAN) < 0.1
    elif name in NOISY:
        assert abs(x.mean() - MEAN) < 0.06 and abs(x.std() - STD) < 0.06
    else:
        exact = D.gaussian_solution(PATH, MEAN, STD, x_T, GRID.t[0], GRID.t[-1])
        assert np.abs(x - exact).max() < 0.25 * STD


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_2m_sde"])
def test_an_image_is_the_same_alone_and_in_a_batch(name):
    solver, keys = D.solvers.make(name), jax.random.split(KEY, 3)
    x_T = jnp.stack([jax.random.normal(key, (4, 4, 1)) for key in keys])
    together = D.sample(keys, DENOISE, solver, GRID, x_T)
    alone = D.sample(keys[1:2], DENOISE, solver, GRID, x_T[1:2])
    np.testing.assert_array_equal(alone[0], together[1])
    assert np.abs(together[0] - together[1]).max() > 0.1
