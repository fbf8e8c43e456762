"""Stochastic solvers on Gaussian data: mean and covariance of many samples, within the Monte-Carlo bound."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D

MEAN, STD = np.array([0.5, -0.3, 0.0]), np.array([0.2, 0.6, 1.1])
COUNT = 20_000
KEY = jax.random.key(2)


def draw(path, solver, grid):
    denoise = D.gaussian_denoiser(path, MEAN, STD)
    run = jax.jit(lambda x: D.sample(KEY, denoise, solver, grid, x))
    return np.asarray(run(D.initial_noise(KEY, (COUNT, 3), grid)), np.float64)


def assert_moments(samples, mean, variance):
    """Within 5 standard errors: of means, of variances, and of covariances, which are 0."""
    std = np.sqrt(variance)
    np.testing.assert_array_less(np.abs(samples.mean(0) - mean), 5 * std / COUNT**0.5)
    error = 5 * np.outer(std, std) * np.sqrt((1 + np.eye(3)) / COUNT)
    np.testing.assert_array_less(np.abs(np.cov(samples.T) - np.diag(variance)), error)


def ddim_moments(grid, eta, variance_type):
    """Mean and variance of the chain, step by step, with the coefficients as DDPM and DDIM print them."""
    alphas_cumprod = grid.alpha.astype(np.float64) ** 2
    mean, variance = np.zeros(3), np.full(3, 1 - alphas_cumprod[0])
    for now, then in itertools.pairwise(alphas_cumprod):
        slope = np.sqrt(now) * STD**2 / (now * STD**2 + 1 - now)  # x_0 = slope x + intercept
        intercept = (1 - now) * MEAN / (now * STD**2 + 1 - now)
        posterior = (1 - then) / (1 - now) * (1 - now / then)
        added = eta**2 * posterior
        direction = np.sqrt(1 - then - added)
        per_x0 = np.sqrt(then) - direction * np.sqrt(now) / np.sqrt(1 - now)
        per_x = direction / np.sqrt(1 - now)
        if variance_type == "large":
            added = (1 - now / then) * (then < 1)
        mean = per_x0 * (slope * mean + intercept) + per_x * mean
        variance = (per_x0 * slope + per_x) ** 2 * variance + added
    return mean, variance


@pytest.mark.parametrize(
    "solver, eta, variance_type",
    [(D.solvers.ddim(0.5), 0.5, None), (D.solvers.ddpm(), 1, "small"), (D.solvers.ddpm("large"), 1, "large")],
    ids=["ddim", "ddpm_small", "ddpm_large"],
)
def test_every_step_has_the_printed_moments(solver, eta, variance_type):
    path = D.VP(D.linear_betas())
    grid = D.make_grid(path, 12)
    assert_moments(draw(path, solver, grid), *ddim_moments(grid, eta, variance_type))


@pytest.mark.parametrize(
    "path", [D.VP(D.scaled_linear_betas()), D.EDM(), D.Flow()], ids=["vp", "edm", "flow"]
)
def test_heun_with_churn_ends_in_the_data(path):
    grid = D.make_grid(path, 64, spacing=None if path.name == "flow" else "karras")
    samples = draw(path, D.solvers.heun(s_churn=40.0), grid)
    assert_moments(samples, MEAN, STD**2)
    # The noise takes part: without it, other samples.
    assert np.abs(samples - draw(path, D.solvers.heun(), grid)).mean() > 0.05


def conditioned_moments(grid):
    """Mean and variance of the chain that draws x_s from q(x_s | x_t, E[x_0 | x_t]), by Bayes' rule alone."""
    rows = np.stack([grid.alpha, grid.sigma], 1).astype(np.float64)
    mean, variance = np.zeros(3), np.full(3, rows[0, 1] ** 2)
    for (alpha, sigma), (alpha_s, sigma_s) in itertools.pairwise(rows):
        total = alpha**2 * STD**2 + sigma**2
        slope, intercept = alpha * STD**2 / total, sigma**2 * MEAN / total
        if sigma_s == 0:
            return alpha_s * (slope * mean + intercept), (alpha_s * slope) ** 2 * variance
        ratio = alpha / alpha_s  # x_t = ratio x_s + noise of variance `fresh`
        fresh = sigma**2 - ratio**2 * sigma_s**2
        posterior = 1 / (1 / sigma_s**2 + ratio**2 / fresh)
        per_x0, per_x = posterior * alpha_s / sigma_s**2, posterior * ratio / fresh
        mean = per_x0 * (slope * mean + intercept) + per_x * mean
        variance = (per_x0 * slope + per_x) ** 2 * variance + posterior
    raise AssertionError("the grid must end clean")


@pytest.mark.parametrize("path", [D.EDM(), D.Flow()], ids=["edm", "flow"])
def test_ddpm_on_the_other_paths(path):
    grid = D.make_grid(path, 12)
    assert_moments(draw(path, D.solvers.ddpm(), grid), *conditioned_moments(grid))


def test_churn_between_its_bounds_alone():
    path = D.EDM()
    grid = D.make_grid(path, 8)
    x = D.initial_noise(KEY, (4, 3), grid)
    run = lambda solver: D.sample(KEY, D.gaussian_denoiser(path, MEAN, STD), solver, grid, x)  # noqa: E731
    still = run(D.solvers.heun())
    np.testing.assert_allclose(run(D.solvers.heun(s_churn=9.0, s_tmin=10.0, s_tmax=11.0)), still, rtol=1e-5)
    assert np.abs(run(D.solvers.heun(s_churn=9.0, s_tmin=1.0)) - still).max() > 0.01


def test_churn_raises_the_noise_as_published():
    """Karras et al. 2022, Algorithm 2, lines 4 to 6, on a path where sigma / alpha is not t."""
    from jaxldm.diffusion.solvers.heun import raise_noise

    path = D.Flow()
    x_0 = 0.3 * jnp.ones((COUNT, 3))
    t, gamma = jnp.float32(0.4), 0.3
    x = (1 - t) * x_0 + t * jax.random.normal(jax.random.key(7), x_0.shape)
    here = D.solvers.Row(t, 1 - t, t)
    raised, hat = raise_noise(x, here, path, gamma, 1.0, D.image_keys(KEY, COUNT))
    assert float(hat.sigma / hat.alpha) == pytest.approx(1.3 * 0.4 / 0.6, rel=1e-5)
    # It is a draw from the path at the new time: same x_0, more noise.
    assert_moments(np.asarray(raised, np.float64), float(hat.alpha) * 0.3, np.full(3, float(hat.sigma) ** 2))
