import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from every_prediction import predictions_on
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


@jax.jit
def guided_and_branches(x, t, scales):
    labels = LABELS.astype(jnp.float32)
    guided = D.classifier_free_guidance(network, labels, NULL, scales)(x, t)
    return guided, network(x, t, jnp.full(3, float(NULL))), network(x, t, labels)


@given(w=st.floats(0, 20), t=st.floats(0, 1), seed=st.integers(0, 1000))
def test_each_image_has_its_own_guidance_1_and_0_and_all_between(w, t, seed):
    x = np.random.default_rng(seed).standard_normal(X.shape).astype(np.float32)
    guided, away, towards = guided_and_branches(
        x, jnp.full(3, t, jnp.float32), jnp.array([0, 1, w], jnp.float32)
    )
    np.testing.assert_allclose(guided[0], away[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(guided[1], towards[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(guided[2], away[2] + w * (towards[2] - away[2]), rtol=1e-4, atol=1e-5)


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


WEIGHTS, MEANS, STDS = np.array([0.4, 0.6]), np.array([[1.0, -0.5], [-1.0, 0.3]]), np.array([0.3, 0.6])


@functools.cache
def answers_and_scores(path):
    """x_0 without and with the condition (which component made x), their scores, and that of the product."""

    def log_density(x, t, only):
        parts = [part[only] for part in (WEIGHTS, MEANS, STDS)]
        return jnp.sum(D.gaussian_mixture_log_density(path, *parts, x, t))

    def run(x, t, w):
        everything, first = slice(None), slice(1)
        u = D.gaussian_mixture_denoiser(path, WEIGHTS, MEANS, STDS)(x, t)
        c = D.gaussian_denoiser(path, MEANS[0], STDS[0])(x, t)
        scores = [jax.grad(log_density)(x, t, only) for only in (everything, first)]
        product = jax.grad(lambda x: (1 - w) * log_density(x, t, everything) + w * log_density(x, t, first))(
            x
        )
        return u, c, *scores, product

    return jax.jit(run)


@pytest.mark.parametrize("path", [D.VP(D.linear_betas()), D.EDM(), D.Flow()], ids=["vp", "edm", "flow"])
@given(w=st.floats(0, 10), part=st.floats(0.1, 0.95), seed=st.integers(0, 1000))
def test_noise_score_and_probability_give_the_same_guidance(path, w, part, seed):
    """Guiding eps, guiding the score, and the score of log p(x)^(1-w) p(x|c)^w by autodiff, as x_0."""
    with jax.enable_x64(True):
        t = part * path.t_noisy
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = np.random.default_rng(seed).standard_normal((4, 2)) * np.hypot(alpha, sigma)
        u, c, score_u, score_c, score_of_product = (
            np.asarray(value) for value in answers_and_scores(path)(x, t, w)
        )
    by_score = (x + sigma**2 * D.guide(score_u, score_c, w)) / alpha
    close = {"rtol": 1e-8, "atol": 1e-8 * max(1, np.abs(by_score).max())}
    np.testing.assert_allclose((x + sigma**2 * score_of_product) / alpha, by_score, **close)
    for prediction in predictions_on(path):
        guided = D.guide(*(D.from_x0(prediction, x_0, x, t) for x_0 in (u, c)), w)
        np.testing.assert_allclose(prediction.to_x0(guided, x, t), by_score, **close)


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
        ({"null_condition": jnp.zeros(2)}, "must broadcast"),
        ({"null_condition": {"label": 3}}, "same form"),
    ],
)
def test_impossible_guidance_is_refused(options, words):
    arguments = {"condition": LABELS, "null_condition": NULL, "guidance_scale": 2.0} | options
    with pytest.raises(InvalidArgumentError, match=words):
        D.classifier_free_guidance(network, **arguments)


def test_away_from_a_weak_network():
    def strong(x, t):
        return jnp.sin(3 * x)

    def weak(x, t):
        return 0.5 * x + t.reshape(-1, 1, 1, 1)

    scales = jnp.array([0.0, 1.0, 2.5])
    answers = [D.autoguidance(strong, weak, scale)(X, T) for scale in (0.0, 1.0, 2.5)]
    for k, scale in enumerate(scales):
        np.testing.assert_allclose(answers[k], D.guide(weak(X, T), strong(X, T), scale), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            D.autoguidance(strong, weak, scales)(X, T)[k], answers[k][k], rtol=1e-5, atol=1e-6
        )
    np.testing.assert_array_equal(answers[0], weak(X, T))
    np.testing.assert_array_equal(answers[1], strong(X, T))


def test_guided_networks_may_be_guided_again():
    """Autoguidance of a network under classifier-free guidance: both are affine, so scales multiply out."""
    labels = LABELS.astype(jnp.float32)
    inner = D.classifier_free_guidance(network, labels, NULL, 2.0)
    outer = D.autoguidance(inner, lambda x, t: network(x, t, jnp.full(3, 3.0)), 1.5)
    once = D.classifier_free_guidance(network, labels, NULL, 3.0)  # weak = unconditional: 2 x 1.5
    np.testing.assert_allclose(outer(X, T), once(X, T), rtol=1e-5, atol=1e-5)


def test_branches_become_denoisers():
    path = D.VP(D.linear_betas())
    labels, t = LABELS.astype(jnp.float32), 300 * T
    branches = D.condition_branches(network, labels, NULL)
    in_x0 = branches.map(lambda predict: D.denoiser(predict, D.v(path)))
    guided = D.Denoiser(D.guide_branches(in_x0, 4.0), path)
    expected = D.denoiser(D.classifier_free_guidance(network, labels, NULL, 4.0), D.v(path))
    np.testing.assert_allclose(guided(X, t), expected(X, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 4.0, np.array([1.0, 2.0, 4.0])])
def test_a_learned_variance_is_not_guided(scale):
    def with_variance(x, t, labels):
        return jnp.concatenate([network(x, t, labels), labels.reshape(-1, 1, 1, 1) + 0 * x], axis=-1)

    labels = LABELS.astype(jnp.float32)
    answer = D.classifier_free_guidance(with_variance, labels, NULL, scale, 0.7)(X, T)
    plain = D.classifier_free_guidance(network, labels, NULL, scale, 0.7)(X, T)
    np.testing.assert_allclose(answer[..., :2], plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(answer[..., 2:], labels.reshape(-1, 1, 1, 1) + jnp.zeros_like(X))


@jax.jit
def guided_by_time(w):
    labels = LABELS.astype(jnp.float32)
    by_time = D.classifier_free_guidance(network, labels, NULL, lambda t: w * t)
    return by_time(X, T), D.classifier_free_guidance(network, labels, NULL, w * T)(X, T)


@given(scales=st.lists(st.floats(0, 15), min_size=3, max_size=3))
def test_a_scale_may_be_a_function_of_time(scales):
    by_time, known = guided_by_time(jnp.array(scales, jnp.float32))
    np.testing.assert_allclose(by_time, known, rtol=1e-5, atol=1e-5)
