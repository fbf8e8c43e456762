"""Stochastic interpolants: values and slopes in the middle, and what they have in common with other paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

ROOT = np.sqrt(0.5)
ALPHA_VP = np.exp(-0.5 * (0.1 * 0.5 + 19.9 * 0.25 / 2))  # exp(-B/2) at t = 0.5


@pytest.mark.parametrize(
    "name, values, slopes",
    [
        ("linear", (0.5, 0.5), (-1, 1)),
        ("gvp", (ROOT, ROOT), (-np.pi / 2 * ROOT, np.pi / 2 * ROOT)),
        (
            "vp",
            (ALPHA_VP, np.sqrt(1 - ALPHA_VP**2)),
            (-10.05 / 2 * ALPHA_VP, 10.05 / 2 * ALPHA_VP**2 / np.sqrt(1 - ALPHA_VP**2)),
        ),
    ],
)
def test_values_and_derivatives_in_the_middle(name, values, slopes):
    path = D.Interpolant(name)
    np.testing.assert_allclose((path.alpha(0.5), path.sigma(0.5)), values, rtol=1e-12)
    np.testing.assert_allclose(path.derivatives(0.5), slopes, rtol=1e-12)


def test_gamma_in_the_middle_and_at_the_ends(x64):
    assert float(D.interpolant_gamma(0.5)) == pytest.approx(0.0505, rel=1e-12)
    assert [float(D.interpolant_gamma(t)) for t in (0.0, 1.0)] == [0.001, 0.001]
    assert jax.grad(D.interpolant_gamma)(jnp.float64(0.5)) == 0
    assert jax.grad(D.interpolant_gamma)(jnp.float64(0.2)) == pytest.approx(
        0.099 * 0.6 / (2 * 0.4), rel=1e-12
    )


@pytest.mark.parametrize("name", D.INTERPOLANTS)
@given(t=st.floats(0.001, 1.0))
def test_gamma_adds_its_variance(name, t):
    plain, noisy = D.Interpolant(name), D.Interpolant(name, gamma=(0.001, 0.1))
    gamma = D.interpolant_gamma(t)
    assert noisy.alpha(t) == plain.alpha(t)
    assert noisy.sigma(t) == pytest.approx(np.hypot(plain.sigma(t), gamma), rel=1e-12)


@pytest.mark.parametrize("name", D.INTERPOLANTS)
def test_derivatives_with_gamma(name):
    """sigma sigma' = beta beta' + gamma gamma'."""
    plain, noisy = D.Interpolant(name), D.Interpolant(name, gamma=(0.001, 0.1))
    t = np.linspace(0.05, 0.95, 7)
    gamma_slope = 0.099 * (1 - 2 * t) / (2 * np.sqrt(t * (1 - t)))
    alpha_slope, sigma_slope = noisy.derivatives(t)
    np.testing.assert_allclose(alpha_slope, plain.derivatives(t)[0], rtol=1e-12)
    np.testing.assert_allclose(
        noisy.sigma(t) * sigma_slope,
        plain.sigma(t) * plain.derivatives(t)[1] + D.interpolant_gamma(t) * gamma_slope,
        rtol=1e-10,
    )


def test_without_gamma_the_linear_interpolant_is_the_flow_path():
    t = np.linspace(0, 1, 11)
    flow = D.Flow()
    for path in (D.Interpolant("linear"), D.Interpolant("linear", gamma=(0.0, 0.0))):
        np.testing.assert_array_equal(path.alpha(t), flow.alpha(t))
        np.testing.assert_allclose(path.sigma(t), flow.sigma(t), rtol=1e-15)
        ours, theirs = D.make_grid(path, 7), D.make_grid(flow, 7)
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_vp_interpolant_is_ddpm_with_many_timesteps():
    path, total = D.Interpolant("vp"), 100000
    ddpm = D.VP(D.linear_betas(total, 0.1 / total, 20 / total))
    at = np.arange(999, total, 1000)
    np.testing.assert_allclose(ddpm.alpha(at), path.alpha((at + 1) / total), rtol=5e-4)
    np.testing.assert_allclose(ddpm.sigma(at), path.sigma((at + 1) / total), rtol=5e-4)


@pytest.mark.parametrize("gamma", [None, (0.001, 0.1)])
@pytest.mark.parametrize("name", D.INTERPOLANTS)
def test_the_exact_velocity_gives_the_exact_denoiser(x64, name, gamma):
    """E[alpha' x_0 + beta' eps + gamma' z | x_t] of Gaussian data, each term regressed on x_t by hand."""
    path, plain = D.Interpolant(name, gamma=gamma), D.Interpolant(name)
    m, s = 0.3, 0.5

    def velocity(x, t):
        t = t.reshape(-1, 1)
        (alpha, beta), (alpha_slope, beta_slope) = (plain.alpha(t), plain.sigma(t)), plain.derivatives(t)
        g, g_slope = (0 * t, 0 * t)
        if gamma is not None:
            g, g_slope = jax.jvp(D.interpolant_gamma, (t,), (jnp.ones_like(t),))
        residual = (x - alpha * m) / (alpha**2 * s**2 + beta**2 + g**2)
        return alpha_slope * (m + alpha * s**2 * residual) + (beta_slope * beta + g_slope * g) * residual

    x, t = jnp.linspace(-2, 2, 12).reshape(4, 3), jnp.array([0.01, 0.4, 0.8, 0.99])
    exact = D.gaussian_denoiser(path, m, s)(x, t)
    np.testing.assert_allclose(D.denoiser(velocity, D.velocity(path))(x, t), exact, rtol=1e-8, atol=1e-10)


def test_velocity_is_a_known_prediction_on_two_interpolants():
    x_0, eps, t = jnp.float32(0.7), jnp.float32(-1.3), jnp.float32(0.4)
    for name, prediction, factor in (("linear", D.flow, 1.0), ("gvp", D.v, np.pi / 2)):
        path = D.Interpolant(name)
        velocity = factor * prediction(path).target(x_0, eps, t)
        x_t = path.alpha(t) * x_0 + path.sigma(t) * eps
        np.testing.assert_allclose(D.velocity(path).to_x0(velocity, x_t, t), x_0, rtol=1e-5)


@pytest.mark.parametrize("gamma", [None, (0.001, 0.1)])
def test_time_has_the_right_gradient_on_the_device(x64, gamma):
    """The t of a ratio is found by halving; its gradient must be that of the inverse, 1 / slope."""
    for name in D.INTERPOLANTS:
        path = D.Interpolant(name, gamma=gamma)
        ratio = jnp.float64(0.8)
        t = path.time(ratio)
        alpha, sigma, (alpha_slope, sigma_slope) = path.alpha(t), path.sigma(t), path.derivatives(t)
        slope = (sigma_slope * alpha - sigma * alpha_slope) / alpha**2
        assert jax.grad(path.time)(ratio) == pytest.approx(float(1 / slope), rel=1e-9)


def test_a_grid_with_gamma_ends_clean_and_asks_no_network_below_zero():
    path = D.Interpolant("linear", gamma=(0.001, 0.1))
    grid = D.make_grid(path, 5)
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0) and grid.t[-1] == np.float32(-0.001)
    np.testing.assert_allclose(grid.t[:-1], [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    asked = []

    def denoise(x, t):
        jax.debug.callback(lambda t: asked.append(float(t)), t)
        return 0.5 * x

    D.sample(jax.random.key(0), denoise, D.solvers.ddim(), grid, jnp.ones((1, 2)))
    jax.effects_barrier()
    assert len(asked) == 5 and min(asked) > 0


def test_a_discrete_path_has_no_velocity():
    with pytest.raises(InvalidArgumentError, match="v_prediction"):
        D.denoiser(lambda x, t: x, D.velocity(D.VP(D.linear_betas())))
