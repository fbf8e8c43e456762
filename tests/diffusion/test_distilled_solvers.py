"""Samplers of consistency models on data whose consistency function is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine_runs import moments_of
from reference_schedulers import SEED, jax_network, start_noise

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

MEAN, STD = np.array([0.7, -0.4]), np.array([0.3, 0.8])
KEY = jax.random.key(SEED)
NOISE = start_noise()
VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
PATHS = {"vp": VP, "edm": EDM, "flow": FLOW}


def gaussian_consistency_function(path):
    """Where the ODE ends: the perfect consistency model."""

    def function(x, t):
        return D.gaussian_solution(path, MEAN, STD, x, t[:, None], path.t_clean)

    return D.Denoiser(function, path)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_lcm_of_a_consistency_model_is_exact_in_any_number_of_steps(path, x64):
    moments = moments_of(D.solvers.lcm(), gaussian_consistency_function(path), MEAN, STD, 8)
    for steps in (1, 2, 3, 8):
        mean, variance = moments(D.make_grid(path, steps))
        np.testing.assert_allclose(mean, MEAN, atol=1e-6)
        np.testing.assert_allclose(variance, STD**2, rtol=1e-6)
    # With the ordinary denoiser, whose x_0 is a mean, variance is lost.
    moments = moments_of(D.solvers.lcm(), D.gaussian_denoiser(path, MEAN, STD), MEAN, STD, 8)
    assert (moments(D.make_grid(path, 8))[1] < 0.9 * STD**2).all()


@pytest.mark.parametrize("gamma", [0.3, 1.0])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_tcd_keeps_the_noise_that_each_row_should_have(path, gamma, x64):
    # With one image for data, x_t is that image and noise sigma(t), whatever gamma is.
    denoise = D.Denoiser(lambda x, t: 0 * x + jnp.asarray(MEAN)[None], path)
    moments = moments_of(D.solvers.tcd(gamma), denoise, MEAN, 0 * STD, 6)
    grid = D.make_grid(path, 6)
    for last in range(1, 7):
        mean, variance = moments(D.cut(grid, 0, last))
        np.testing.assert_allclose(mean, grid.alpha[last] * MEAN, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(variance, grid.sigma[last] ** 2, rtol=1e-6, atol=1e-12)


def test_what_ends_at_t_min_gets_the_noise_that_is_missing(x64):
    """Song et al. 2023, algorithm 1: x_0 holds the noise of sigma_min."""
    path = D.EDM(sigma_min=0.4)

    def function(x, t):
        return D.gaussian_solution(path, MEAN, STD, x, t[:, None], path.t_min)

    moments = moments_of(D.solvers.lcm(from_t_min=True), D.Denoiser(function, path), MEAN, STD, 4)
    for steps in (1, 3):
        mean, variance = moments(D.make_grid(path, steps, final="sigma_min"))
        np.testing.assert_allclose(mean, MEAN, atol=1e-6)
        np.testing.assert_allclose(variance, STD**2 + 0.4**2, rtol=1e-6)
    with pytest.raises(InvalidArgumentError, match="must know the path"):
        D.sample(KEY, lambda x, t: x, D.solvers.lcm(from_t_min=True), D.make_grid(path, 2), NOISE)


def test_tcd_lies_between_ddim_and_lcm():
    denoise = D.denoiser(jax_network, D.flow(FLOW))
    grid = D.make_grid(FLOW, 5)

    def run(solver):
        return jax.jit(lambda x: D.sample(KEY, denoise, solver, grid, x))(NOISE)

    np.testing.assert_allclose(run(D.solvers.tcd(0.0)), run(D.solvers.ddim()), rtol=1e-6)
    np.testing.assert_allclose(run(D.solvers.tcd(1.0)), run(D.solvers.lcm()), rtol=1e-5, atol=1e-6)


def test_consistency_function_is_the_identity_at_timestep_0():
    x = jnp.asarray(NOISE)
    denoise = D.consistency_function(
        D.denoiser(jax_network, D.epsilon(VP)), timestep_scaling=10.0, sigma_data=0.5
    )
    np.testing.assert_array_equal(denoise(x, 0.0), x)
    # s = 10 at timestep 1: c_skip = 0.25 / 100.25, c_out = 10 / sqrt(100.25).
    plain = D.denoiser(jax_network, D.epsilon(VP))(x, 1.0)
    np.testing.assert_allclose(denoise(x, 1.0), 0.25 / 100.25 * x + 10 / 100.25**0.5 * plain, rtol=1e-5)
    np.testing.assert_allclose(denoise(x, 999.0), D.denoiser(jax_network, D.epsilon(VP))(x, 999.0), rtol=1e-5)
    assert denoise.path is VP


def test_lcm_timesteps():
    np.testing.assert_array_equal(D.lcm_timesteps(4), [999, 759, 499, 259])
    np.testing.assert_array_equal(D.lcm_timesteps(50), 20 * np.arange(50, 0, -1) - 1)
    assert D.at_times(VP, D.lcm_timesteps(1)).t.tolist() == [999, -1]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.lcm_timesteps(51), "1 to 50 steps"),
        (lambda: D.lcm_timesteps(0), "at least 1"),
        (lambda: D.lcm_timesteps(4, strength=0.0), "strength"),
        (lambda: D.lcm_timesteps(4, original_inference_steps=2000), "1000"),
        (lambda: D.consistency_function(D.denoiser(jax_network, D.flow(FLOW))), "number of a timestep"),
        (
            lambda: D.consistency_function(D.denoiser(jax_network, D.epsilon(VP)), sigma_data=0.0),
            "sigma_data",
        ),
        (lambda: D.solvers.tcd(1.5), "gamma"),
        (lambda: D.solvers.tcd(-0.5), "gamma"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
