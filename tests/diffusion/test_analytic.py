"""The closed forms, against NumPy written out by hand, Monte Carlo, and an ODE solver of SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixture_reference import MEANS, STDS, WEIGHTS, mixture_x0, solve_exactly

from jaxldm import diffusion as D

PATHS = {"vp": D.VP(D.linear_betas()), "edm": D.EDM(), "flow": D.Flow()}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every_path
def test_mixture_denoiser_by_hand(path, x64):
    t = np.linspace(path.t_min, path.t_noisy, 6)
    x = np.random.default_rng(0).standard_normal((6, 2)) * (1 + path.sigma(t)[:, None])
    expected = [
        mixture_x0(x[k : k + 1], path.alpha(t[k]), path.sigma(t[k]), WEIGHTS, MEANS, STDS)[0]
        for k in range(6)
    ]
    ours = D.gaussian_mixture_denoiser(path, WEIGHTS, MEANS, STDS)(jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@every_path
def test_one_component_is_the_gaussian(path):
    x = jax.random.normal(jax.random.key(0), (5, 3))
    mean, t = np.array([0.5, -1.0, 2.0], np.float32), 0.3 * path.t_noisy
    mixture = D.gaussian_mixture_denoiser(path, [2.0, 2.0], np.stack([mean, mean]), [0.7, 0.7])
    np.testing.assert_allclose(
        mixture(x, t), D.gaussian_denoiser(path, mean, 0.7)(x, t), rtol=1e-4, atol=1e-5
    )


def test_the_denoiser_is_the_conditional_mean():
    # Among many draws of (x_0, x_t), those with x_t near a point have the mean that the denoiser says.
    path, t, count = PATHS["flow"], 0.6, 400_000
    random = np.random.default_rng(1)
    component = random.random(count) < WEIGHTS[0]
    means, stds = np.where(component, -1.0, 1.0), np.where(component, 0.3, 0.4)
    x_0 = means + stds * random.standard_normal(count)
    x_t = (1 - t) * x_0 + t * random.standard_normal(count)
    denoise = D.gaussian_mixture_denoiser(path, WEIGHTS, [[-1.0], [1.0]], STDS)
    for point in (-0.8, 0.0, 0.5):
        near = np.abs(x_t - point) < 0.02
        error = x_0[near].std() / near.sum() ** 0.5
        assert denoise(jnp.array([[point]]), t)[0, 0] == pytest.approx(x_0[near].mean(), abs=4 * error)


@every_path
def test_gaussian_solution_solves_the_ode(path, x64):
    mean, std = np.array([0.4, -0.7]), 0.5
    x = np.random.default_rng(2).standard_normal((4, 2)) * path.sigma(path.t_noisy)
    grid = D.make_grid(path, 2, spacing="linspace", final="sigma_min")
    expected = solve_exactly(x, grid, np.ones(1), mean[None], np.array([std]))
    ours = D.gaussian_solution(path, mean, std, jnp.asarray(x), path.t_noisy, path.t_min)
    np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-9)
    there_and_back = D.gaussian_solution(path, mean, std, ours, path.t_min, path.t_noisy)
    np.testing.assert_allclose(there_and_back, x, rtol=1e-7, atol=1e-9)


@every_path
def test_gaussian_solution_ends_in_the_data(path):
    x = path.sigma(path.t_noisy) * np.random.default_rng(3).standard_normal((20000, 1)).astype(np.float32)
    x_0 = D.gaussian_solution(path, 0.4, 0.5, jnp.asarray(x, jnp.float32), path.t_noisy, path.t_clean)
    assert float(x_0.std()) == pytest.approx(0.5, rel=0.02)
    assert float(x_0.mean()) == pytest.approx(0.4, abs=0.02)


def test_density_integrates_to_one():
    x = np.linspace(-8, 8, 4001).reshape(-1, 1)
    density = np.exp(
        D.gaussian_mixture_log_density(
            PATHS["vp"], [3.0, 7.0], [[-1.0], [1.0]], STDS, jnp.asarray(x, jnp.float32), 500.0
        )
    )
    assert np.trapezoid(density, x[:, 0]) == pytest.approx(1, rel=1e-4)


@every_path
def test_finite_at_both_ends(path):
    x = jnp.ones((2, 2))
    for t in (path.t_clean, path.t_noisy):
        for denoise in (
            D.gaussian_denoiser(path, 0.2, 0.5),
            D.gaussian_mixture_denoiser(path, WEIGHTS, MEANS, STDS),
        ):
            assert np.isfinite(denoise(x, t)).all()
    np.testing.assert_allclose(D.gaussian_denoiser(path, 0.2, 0.5)(x, path.t_clean), x)
