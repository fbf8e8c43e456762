"""The learned weight, the tokens that stay and the alignment, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxldm import training
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.denoiser_terms import learned_log_variance, new_log_variance, new_projector, project

KEY = jax.random.key(0)


def test_the_head_learns_the_logarithm_of_the_error_at_every_noise():
    """error(noise) = exp(1 + sin(noise)): the least of error / exp(u) + u is u = 1 + sin(noise)."""
    log_snr = jnp.linspace(-8.0, 8.0, 256)
    wanted = 1 + jnp.sin(log_snr / 2)

    def loss(params):
        u = learned_log_variance(params, log_snr)
        return jnp.mean(jnp.exp(wanted - u) + u)

    adam = training.optimizer(3e-2, total_steps=600, max_grad_norm=None)

    def step(carry, _):
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params), state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    start = new_log_variance()
    assert (learned_log_variance(start, log_snr) == 0).all()
    (params, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=600))((start, adam.init(start)))
    np.testing.assert_allclose(learned_log_variance(params, log_snr), wanted, atol=0.1)
    assert np.isfinite(learned_log_variance(params, jnp.float32([-jnp.inf, jnp.inf]))).all()


def test_kept_tokens_are_different_and_each_is_kept_alike():
    kept = np.asarray(training.kept_tokens(KEY, 2000, 10, 0.35))
    assert kept.shape == (2000, 4) and (np.diff(kept, axis=1) > 0).all()  # round(3.5) = 4, in order
    shares = np.bincount(kept.ravel(), minlength=10) / 2000
    np.testing.assert_allclose(shares, 0.4, atol=4 * (0.4 * 0.6 / 2000) ** 0.5)
    assert training.kept_tokens(KEY, 1, 10, 0.01).shape == (1, 1)
    np.testing.assert_array_equal(training.kept_tokens(KEY, 1, 5, 1.0), [[0, 1, 2, 3, 4]])


def test_alignment_is_the_cosine_of_pytorch_and_leaves_the_features_alone():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    loss = lambda a, b: training.alignment_loss(a, b)  # noqa: E731
    value, (of_a, of_b) = jax.value_and_grad(loss, (0, 1))(a, b)
    theirs = torch.tensor(a, requires_grad=True)
    expected = -torch.nn.functional.cosine_similarity(theirs, torch.tensor(b), dim=-1).mean()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(of_a, theirs.grad, atol=1e-6)
    assert (of_b == 0).all()
    np.testing.assert_allclose(training.alignment_loss(3 * b, b), -1, rtol=1e-6)
    with pytest.raises(InvalidArgumentError, match="features"):
        training.alignment_loss(a, b[:, :4])


def test_the_projector_is_the_published_mlp():
    params = new_projector(KEY, 5, hidden=6, features=4)
    x = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    h = torch.tensor(x)
    for place in range(3):
        kernel, bias = (
            torch.tensor(np.asarray(params[f"layer_{place}"][part])) for part in ("kernel", "bias")
        )
        h = torch.nn.functional.silu(h) if place else h
        h = h @ kernel + bias
    assert h.shape == (2, 3, 4)
    np.testing.assert_allclose(project(params, x), h, atol=1e-5)
