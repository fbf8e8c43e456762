"""DDIM backwards: the exact inverse where it converged, and the published one after one iteration."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference_schedulers import LINEAR_BETAS, assert_close, jax_network, start_noise, torch_network

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

KEY = jax.random.key(0)
PATHS = {"vp": D.VP(D.linear_betas()), "edm": D.EDM(sigma_max=20.0), "flow": D.Flow()}


def rising(grid):
    return D.Grid(*(column[::-1] for column in grid[:3]))


@pytest.mark.parametrize("name", PATHS)
def test_what_it_finds_is_drawn_again(name, x64):
    """Also from the clean row, and on the flow path to pure noise."""
    path = PATHS[name]
    grid = D.make_grid(path, 8)
    denoise = D.gaussian_mixture_denoiser(
        path, np.array([0.4, 0.6]), np.array([[0.8, 0.1], [-0.5, 0.4]]), np.full(2, 0.5)
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 2))) * grid.sigma[0]
    draw = jax.jit(lambda x: D.sample(KEY, denoise, D.solvers.ddim(), grid, x))
    image = draw(x)
    errors = []
    for iterations in (1, 10, 200):
        solver = D.solvers.ddim_inverse(iterations)
        found = jax.jit(lambda x, s=solver: D.sample(KEY, denoise, s, rising(grid), x))(image)
        errors.append(float(np.abs(draw(found) - image).max()))
    assert errors[0] > 0.01 and errors[1] < errors[0] / 2 and errors[2] < 1e-6, errors


def test_one_iteration_is_that_of_diffusers():
    """Of a network that predicts eps. For others the reference takes eps at another level than it asks at."""
    path, solver = D.VP(D.linear_betas()), D.solvers.ddim_inverse(1)
    denoise = D.denoiser(jax_network, D.epsilon(path))
    for steps in (5, 20):
        scheduler = diffusers.DDIMInverseScheduler(**LINEAR_BETAS, clip_sample=False)
        scheduler.set_timesteps(steps)
        x = torch.from_numpy(start_noise())
        for t in scheduler.timesteps:
            x = scheduler.step(torch_network(x, float(t)), t, x, return_dict=False)[0]
        grid = rising(D.make_grid(path, steps, spacing="leading"))
        np.testing.assert_array_equal(grid.t[1:], scheduler.timesteps)
        ours = D.sample(KEY, denoise, solver, grid, start_noise())
        assert_close(np.asarray(ours), x.numpy(), steps)


def test_refusals():
    with pytest.raises(InvalidArgumentError, match="iterations"):
        D.solvers.ddim_inverse(0)
