import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError

LABELS = jnp.array([0, 1, 2])
NULL = 3
X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
T = jnp.array([0.2, 0.5, 0.9])


def network(x, t, labels):
    """Depends on everything it is given, and on nothing outside its own image."""
    shape = (-1, 1, 1, 1)
    return jnp.tanh(x * (1 + labels.reshape(shape)) + t.reshape(shape)) + 0.1 * labels.reshape(shape)


def test_scale_one_is_conditional_and_zero_unconditional():
    labels = LABELS.astype(jnp.float32)
    # Exactly: (1 - w) u + w c, unlike u + w (c - u), rounds nothing at either end.
    np.testing.assert_array_equal(
        D.classifier_free_guidance(network, labels, NULL, 1.0)(X, T), network(X, T, labels)
    )
    np.testing.assert_array_equal(
        D.classifier_free_guidance(network, labels, NULL, 0.0)(X, T), network(X, T, jnp.full(3, 3.0))
    )


@given(scale=st.floats(0, 20), seed=st.integers(0, 1000))
def test_guidance_is_a_straight_line_through_both_branches(scale, seed):
    u, c = np.random.default_rng(seed).standard_normal((2, 2, 3, 3, 1))
    np.testing.assert_allclose(D.guide(u, c, scale), u + scale * (c - u), rtol=1e-9, atol=1e-9)


def test_one_scale_per_image_and_a_negative_condition():
    labels, negative = LABELS.astype(jnp.float32), jnp.array([5.0, 6.0, 7.0])
    scales = jnp.array([0.0, 1.5, 7.0])
    together = D.classifier_free_guidance(network, labels, negative, scales)(X, T)
    for k in range(3):
        one = slice(k, k + 1)
        expected = D.guide(
            network(X[one], T[one], negative[one]), network(X[one], T[one], labels[one]), scales[k]
        )
        np.testing.assert_allclose(together[one], expected, rtol=1e-5, atol=1e-6)


def test_whole_numbers_will_do_for_a_scale():
    labels = LABELS.astype(jnp.float32)
    whole = D.classifier_free_guidance(network, labels, NULL, np.array([1, 2, 3]))(X, T)
    np.testing.assert_array_equal(
        whole, D.classifier_free_guidance(network, labels, NULL, jnp.array([1.0, 2, 3]))(X, T)
    )


def test_both_branches_are_one_batch():
    batches = []

    def spy(x, t, labels):
        batches.append((x.shape, t.shape, labels.shape))
        return x

    D.classifier_free_guidance(spy, LABELS, NULL, 2.0)(X, T)
    assert batches == [((6, 4, 4, 2), (6,), (6,))]


def test_conditions_may_be_trees():
    condition = {"label": LABELS, "text": jnp.ones((3, 5, 2))}
    null = {"label": NULL, "text": jnp.zeros((1, 5, 2))}

    def tree_network(x, t, condition):
        return x * condition["text"].mean((1, 2)).reshape(-1, 1, 1, 1) + condition["label"].reshape(
            -1, 1, 1, 1
        ).astype(x.dtype)

    guided = D.classifier_free_guidance(tree_network, condition, null, 2.0)(X, T)
    shape = (3, 1, 1, 1)
    np.testing.assert_allclose(
        guided, 2 * (X + LABELS.reshape(shape).astype(X.dtype)) - 3, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "path", [D.vp_path(D.linear_betas()), D.edm_path(), D.flow_path()], ids=["vp", "edm", "flow"]
)
def test_noise_score_and_probability_give_the_same_guidance(path, x64):
    """Guiding eps, guiding the score, and the score of log p(x)^(1-w) p(x|c)^w by autodiff, as x_0."""
    weights, means, stds = np.array([0.4, 0.6]), np.array([[1.0, -0.5], [-1.0, 0.3]]), np.array([0.3, 0.6])
    w, t = 3.0, 0.4 * path.t_noisy
    alpha, sigma = path.alpha(t), path.sigma(t)
    x = np.random.default_rng(1).standard_normal((4, 2)) * sigma

    def log_density(x, only):
        parts = [part[only] for part in (weights, means, stds)]
        return jnp.sum(D.gaussian_mixture_log_density(path, *parts, x, t))

    everything, first = slice(None), slice(1)  # the condition says which component made x

    @jax.jit
    def answers(x):
        u = D.gaussian_mixture_denoiser(path, weights, means, stds)(x, t)
        c = D.gaussian_denoiser(path, means[0], stds[0])(x, t)
        products = jax.grad(lambda x: (1 - w) * log_density(x, everything) + w * log_density(x, first))
        return u, c, jax.grad(log_density)(x, everything), jax.grad(log_density)(x, first), products(x)

    u, c, score_u, score_c, score_of_products = (np.asarray(value) for value in answers(x))
    by_score = (x + sigma**2 * D.guide(score_u, score_c, w)) / alpha
    np.testing.assert_allclose((x + sigma**2 * score_of_products) / alpha, by_score, rtol=1e-9, atol=1e-9)
    for prediction in D.PREDICTIONS:
        guided = D.guide(*(D.from_x0(prediction, x_0, x, alpha, sigma) for x_0 in (u, c)), w)
        np.testing.assert_allclose(
            D.to_x0(prediction, guided, x, alpha, sigma), by_score, rtol=1e-9, atol=1e-9
        )


@given(phi=st.floats(0, 1), seed=st.integers(0, 1000))
def test_rescale_is_that_of_diffusers(phi, seed):
    guided, conditional = np.random.default_rng(seed).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    guided *= np.array([1, 3, 0.2], np.float32).reshape(3, 1, 1, 1)
    expected = rescale_noise_cfg(
        torch.from_numpy(guided), torch.from_numpy(conditional), guidance_rescale=phi
    )
    np.testing.assert_allclose(D.rescale_guidance(guided, conditional, phi), expected, rtol=1e-4, atol=1e-5)


def test_rescale_restores_the_standard_deviation_and_survives_a_constant():
    labels = LABELS.astype(jnp.float32)
    predict = D.classifier_free_guidance(network, labels, NULL, 9.0, rescale=1.0)
    np.testing.assert_allclose(predict(X, T).std((1, 2, 3)), network(X, T, labels).std((1, 2, 3)), rtol=1e-4)
    flat = jnp.ones((1, 4, 4, 2))
    np.testing.assert_array_equal(D.rescale_guidance(flat, X[:1], 0.7), flat)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": np.array([1.0, np.inf, 2.0])}, "guidance_scale"),
        ({"rescale": 1.5}, "rescale"),
        ({"null_condition": jnp.zeros(2)}, "does not broadcast"),
        ({"null_condition": {"label": 3}}, "same form"),
    ],
)
def test_impossible_guidance_is_refused(options, words):
    arguments = {"condition": LABELS, "null_condition": NULL, "guidance_scale": 2.0} | options
    with pytest.raises(InvalidArgumentError, match=words):
        D.classifier_free_guidance(network, **arguments)
