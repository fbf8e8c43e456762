"""Transforms of a denoiser's x_0, classifier guidance and thresholding, and that they compose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

VP, EDM, FLOW = D.VP(D.linear_betas()), D.EDM(), D.Flow()
KEY = jax.random.key(2)
WEIGHTS, MEANS, STDS = np.array([0.4, 0.6]), np.array([[1.0, -0.5], [-1.0, 0.3]]), np.array([0.3, 0.6])


def log_first(path):
    """log p(the first component made x_0 | x_t), exactly."""

    def log_probability(x, t):
        joint = D.gaussian_mixture_log_density(path, WEIGHTS[:1], MEANS[:1], STDS[:1], x, t) + np.log(0.4)
        return joint - D.gaussian_mixture_log_density(path, WEIGHTS, MEANS, STDS, x, t)

    return log_probability


@pytest.mark.parametrize("path", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
def test_the_exact_classifier_makes_the_conditional_denoiser(path, x64):
    unconditional = D.gaussian_mixture_denoiser(path, WEIGHTS, MEANS, STDS)
    conditional = D.gaussian_denoiser(path, MEANS[0], STDS[0])
    t = np.array([0.05, 0.3, 0.6, 0.9]) * path.t_noisy
    noise = np.random.default_rng(1).standard_normal((4, 2))
    x, t = jnp.asarray(path.sigma(t)[:, None] * noise + path.alpha(t)[:, None] * 0.5), jnp.asarray(t)
    ask = jax.jit(lambda w: D.classifier_guidance(unconditional, log_first(path), w)(x, t))
    u, c = jax.jit(lambda: (unconditional(x, t), conditional(x, t)))()
    np.testing.assert_allclose(ask(1.0), c, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ask(0.0), u, rtol=1e-12)
    scales = jnp.array([0.5, 2.0, 7.0, 0.0])  # and so it is classifier-free guidance
    np.testing.assert_allclose(ask(scales), D.guide(u, c, scales), rtol=1e-8, atol=1e-8)
    by_time = D.classifier_guidance(unconditional, log_first(path), D.guidance_interval(path, 1.0))
    np.testing.assert_allclose(jax.jit(by_time)(x, t), c, rtol=1e-8, atol=1e-8)


def test_classifier_guidance_is_finite_at_both_ends():
    denoise = D.classifier_guidance(
        D.gaussian_mixture_denoiser(FLOW, WEIGHTS, MEANS, STDS), log_first(FLOW), guidance_scale=2.0
    )

    @jax.jit
    def ask(x, t):
        unguided = D.gaussian_mixture_denoiser(FLOW, WEIGHTS, MEANS, STDS)(x, t)
        return denoise(x, t), unguided, jax.grad(lambda x: jnp.sum(denoise(x, t)))(x)

    for t in (1.0, 0.0):
        guided, unguided, gradient = ask(jnp.ones((2, 2)), jnp.float32(t))
        np.testing.assert_allclose(guided, unguided, rtol=1e-6)
        assert np.isfinite(gradient).all()
    grid = D.make_grid(FLOW, 20)
    x_T = D.initial_noise(KEY, (64, 2), grid)
    x_0 = np.asarray(D.sample(KEY, denoise, D.solvers.ddim(), grid, x_T))
    distances = np.linalg.norm(x_0[:, None] - MEANS, axis=-1)
    assert (distances[:, 0] < distances[:, 1]).mean() > 0.95


@given(scale=st.floats(0.3, 4), percentile=st.floats(0.5, 1), most=st.floats(1, 3), seed=st.integers(0, 1000))
def test_dynamic_thresholding_is_that_of_diffusers(scale, percentile, most, seed):
    x_0 = scale * np.random.default_rng(seed).standard_normal((3, 4, 4, 2)).astype(np.float32)
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=most)
    expected = scheduler._threshold_sample(torch.from_numpy(x_0))
    ours = D.dynamic_threshold(lambda x, t: x, percentile, most)(x_0, 0.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_dynamic_thresholding_has_no_bound_unless_asked():
    x_0 = 3 * np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    # diffusers' default bound of 1 makes its dynamic thresholding the static one.
    theirs = DDPMScheduler(thresholding=True)._threshold_sample(torch.from_numpy(x_0)).numpy()
    np.testing.assert_allclose(theirs, np.clip(x_0, -1, 1))
    ours = np.asarray(D.dynamic_threshold(lambda x, t: x)(x_0, 0.0))
    assert np.abs(ours).max() == 1 and not np.allclose(ours, theirs, atol=0.1)
    small = x_0 / np.abs(x_0).max()
    np.testing.assert_array_equal(D.dynamic_threshold(lambda x, t: x)(small, 0.0), small)


def test_transforms_compose_and_keep_what_a_denoiser_knows():
    def network(x, t, labels):
        return jnp.tanh(x) * (1 + labels.reshape(-1, 1, 1, 1))

    predict = D.classifier_free_guidance(network, jnp.array([1.0, 2.0]), 0.0, 7.5, rescale=0.7)
    stronger = D.autoguidance(predict, lambda x, t: 0.5 * jnp.tanh(x), 2.0)
    bright = D.classifier_guidance(
        D.denoiser(stronger, D.v(VP)), lambda x, t: -jnp.sum((x - 0.5) ** 2, (1, 2, 3)), 0.1
    )
    denoise = D.dynamic_threshold(D.static_threshold(bright, -2.0, 2.0), 0.9)
    assert denoise.path is VP
    grid = D.make_grid(VP, 5)
    x_T = D.initial_noise(KEY, (2, 4, 4, 1), grid)
    solver = D.solvers.heun(s_churn=1.0)  # which asks for the path
    plain, kept = jax.jit(lambda x: [D.sample(KEY, of, solver, grid, x) for of in (bright, denoise)])(x_T)
    assert np.abs(plain).max() > 1.5 and np.abs(kept).max() <= 1 + 1e-6  # the last step is x_0 itself


def test_a_plain_function_stays_one_and_a_learned_variance_is_kept():
    assert not hasattr(D.static_threshold(lambda x, t: x), "path")

    def network(x, t):
        return jnp.concatenate([4 * x, 0 * x], axis=-1)

    learned = D.denoiser(network, D.x0(VP), learned_variance=True)
    x, t = jnp.ones((2, 4, 4, 1)), jnp.zeros(2)
    x_0, variance = D.static_threshold(learned).with_variance(x, t)
    np.testing.assert_array_equal(x_0, np.ones((2, 4, 4, 1)))
    np.testing.assert_array_equal(variance, learned.with_variance(x, t)[1])


def test_a_threshold_is_data():
    traces = []

    @jax.jit
    def run(percentile, low, x):
        traces.append(1)
        return D.dynamic_threshold(D.static_threshold(lambda x, t: x, low, 2.0), percentile)(x, 0.0)

    x = jnp.linspace(-3, 3, 12).reshape(2, 6)
    assert not np.allclose(run(0.5, -1.0, x), run(0.9, -2.0, x)) and len(traces) == 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.static_threshold(D.gaussian_denoiser(VP), 1.0, -1.0), "low < high"),
        (lambda: D.dynamic_threshold(D.gaussian_denoiser(VP), 99.5), "percentile"),
        (lambda: D.dynamic_threshold(D.gaussian_denoiser(VP), 0.9, 0.5), "max_value"),
        (lambda: D.classifier_guidance(lambda x, t: x, log_first(VP), 1.0), r"D\.Denoiser"),
        (lambda: D.classifier_guidance(D.gaussian_denoiser(VP), log_first(VP), np.inf), "guidance_scale"),
    ],
)
def test_impossible_transforms_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
