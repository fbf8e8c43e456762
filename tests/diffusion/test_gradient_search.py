"""Gradients of a verifier: as the image is drawn, and through all steps into the initial noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

PATH, KEY = D.VP.named("linear"), jax.random.key(3)
GRID, SOLVER = D.make_grid(PATH, 5), D.solvers.dpmpp_2m()
SHAPE = (3, 2, 3, 1)
RNG = np.random.default_rng(0)
MEAN, STD = (RNG.uniform(low, high, SHAPE[1:]).astype(np.float32) for low, high in ((-1, 1), (0.6, 1)))
DENOISE = D.gaussian_denoiser(PATH, MEAN, STD)
A = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
X_T = D.initial_noise(KEY, SHAPE, GRID)


def linear(x):
    return jnp.sum(A * x, (1, 2, 3))


def squares(x):
    return jnp.sum(x**2, (1, 2, 3))


def whole_map():
    """(slope, offset), [H, W, C]: x_0 of the run is slope z + offset, with z = x_T / sigma_T."""
    x = jnp.stack([jnp.zeros(SHAPE[1:]), jnp.ones(SHAPE[1:])]) * GRID.sigma[0]
    offset, high = np.asarray(D.sample(KEY, DENOISE, SOLVER, GRID, x))
    return high - offset, offset


def optimize(verifier=linear, **numbers):
    return D.search.optimize_noise(KEY, DENOISE, SOLVER, GRID, X_T, verifier, **numbers)


def test_the_noise_of_a_linear_reward():
    """b.z + gamma ((d - 1) log |z| - |z|^2 / 2) is largest along b, at a length from a quadratic equation."""
    gamma = 2.0
    found = optimize(num_updates=150, learning_rate=0.3, regularization=gamma, max_gradient=1e6)
    b = (whole_map()[0] * np.asarray(A)).reshape(3, -1)
    force = np.linalg.norm(b, axis=1, keepdims=True) / gamma
    length = (force + np.sqrt(force**2 + 4 * (b.shape[1] - 1))) / 2
    exact = length * b / np.linalg.norm(b, axis=1, keepdims=True)
    z = np.reshape(found.x_T, (3, -1)) / GRID.sigma[0]
    np.testing.assert_allclose(z, exact, rtol=2e-3, atol=2e-3)
    assert found.history.shape == (151, 3) and (found.history[-1] > found.history[0]).all()
    again = D.sample(KEY, DENOISE, SOLVER, GRID, found.x_T)
    np.testing.assert_allclose(again, found.x_0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(linear(again), found.score, rtol=1e-4, atol=1e-4)


def test_the_noise_of_a_picture():
    """-|x_0 - y|^2 / 2 without a regularizer: the noise that y comes from."""
    y = jnp.asarray(MEAN[None] + 0.5 * STD[None] * RNG.normal(size=SHAPE), jnp.float32)
    found = optimize(
        lambda x: -0.5 * squares(x - y),
        num_updates=200,
        learning_rate=1.0,
        max_gradient=1e6,
    )
    slope, offset = whole_map()
    np.testing.assert_allclose(found.x_0, y, atol=1e-2)
    np.testing.assert_allclose(found.x_T / GRID.sigma[0], (y - offset[None]) / slope[None], atol=5e-2)


def test_the_best_on_the_way_is_kept_and_steps_are_bounded():
    found = optimize(num_updates=1, learning_rate=1.0, max_gradient=0.25)
    moved = np.linalg.norm(np.reshape(found.x_T - X_T, (3, -1)), axis=1) / GRID.sigma[0]
    np.testing.assert_allclose(moved, 0.25, rtol=1e-4)
    # Too far beyond the optimum of a narrow reward: the start is better, and is what is returned.
    y = D.sample(KEY, DENOISE, SOLVER, GRID, X_T) + 0.01
    found = optimize(lambda x: -100 * squares(x - y), num_updates=3, learning_rate=1e3, max_gradient=1e6)
    np.testing.assert_allclose(found.x_T, X_T, rtol=1e-6)


def test_other_numbers_compile_nothing():
    def run(rate, gamma):
        return optimize(num_updates=2, learning_rate=rate, regularization=gamma)

    first = run(0.1, 0.0)
    assert compilations(lambda: run(0.2, 1.0)) == 0
    assert not np.allclose(first.x_0, run(0.2, 1.0).x_0)


def climbed(eta):
    solver = D.search.gradient_ascent(D.solvers.ddim(), linear, eta)
    return D.sample(KEY, DENOISE, solver, GRID, X_T)


def test_ascent_as_the_equation_has_it():
    """x <- x + eta grad Quality(x_0(x)) before each step, where x_0 = k(t) x + ... for Gaussian data."""
    eta, x, plain = 0.2, np.asarray(X_T, np.float64), D.solvers.ddim()
    for i in range(5):
        alpha, sigma = GRID.alpha[i], GRID.sigma[i]
        x = x + eta * np.asarray(A) * alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        row = D.cut(GRID, i, i + 1)
        x = np.asarray(D.sample(KEY, DENOISE, plain, row, x.astype(np.float32)), np.float64)
    np.testing.assert_allclose(climbed(eta), x, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(climbed(0.0), D.sample(KEY, DENOISE, plain, GRID, X_T))
    some = climbed(np.array([0.0, eta, 0.0], np.float32))
    np.testing.assert_allclose(some[1], x[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(some[0], climbed(0.0)[0], rtol=1e-4, atol=1e-5)


def test_another_eta_compiles_nothing():
    climbed(0.1)
    assert compilations(lambda: climbed(0.3)) == 0


def test_classifier_guidance_by_a_verifier_is_the_tilted_denoiser():
    """x_0 + w sigma^2 / alpha grad r(x_0(x)) is E[x_0 | x_t] of p(x) exp(w a.x), for Gaussian data."""
    w = 1.7
    guided = D.classifier_guidance(DENOISE, lambda x, t: linear(DENOISE(x, t)), w)
    tilted = [D.gaussian_denoiser(PATH, MEAN + w * STD**2 * np.asarray(A[b]), STD) for b in range(3)]
    for t in (10.0, 500.0, 990.0):
        expected = jnp.concatenate([tilted[b](X_T[b : b + 1], t) for b in range(3)])
        np.testing.assert_allclose(guided(X_T, t), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: climbed(-1.0), "eta must be a finite number of at least 0, got -1"),
        (lambda: climbed(np.nan), "eta must be a finite number"),
        (lambda: climbed(np.ones(2, np.float32)), "eta must be one number, or one for each of 3 images"),
        (lambda: optimize(num_updates=0), "num_updates must be a whole number of at least 1, got 0"),
        (lambda: optimize(num_updates=1, learning_rate=-0.1), "learning_rate must be a finite number"),
        (
            lambda: optimize(lambda x: x.sum(), num_updates=1),
            "verifier must return one floating-point number",
        ),
        (lambda: optimize(lambda x: linear(x) * jnp.nan, num_updates=1), "verifier gave NaN"),
        (
            lambda: D.search.optimize_noise(
                KEY, DENOISE, SOLVER, D.Grid(*(c[-2:][::-1] for c in GRID[:3])), X_T, linear, num_updates=1
            ),
            "must have noise",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
