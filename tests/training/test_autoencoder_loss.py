import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import models
from jaxldm.data import ArrayRows
from jaxldm.errors import UnknownNameError
from jaxldm.metrics.health import check_channels, check_posterior_collapse
from jaxldm.models import DiagonalGaussian
from jaxldm.training.autoencoder import encode_all, latent_scale, posterior_moments
from jaxldm.training.autoencoder_losses import annealed_beta, autoencoder_loss, kl_per_channel
from jaxldm.training.autoencoder_players import make_loss
from jaxldm.training.recipes import AutoencoderRecipe


def posterior(shape=(6, 3, 3, 4), log_variance_shift=0.0):
    numbers = np.random.default_rng(0)
    mean, log_variance = numbers.normal(size=(2, *shape)).astype(np.float32)
    return DiagonalGaussian(mean, np.float32(0.5) * log_variance + np.float32(log_variance_shift))


def torch_kl(moments):
    """[B, h, w, c] nats by torch.distributions."""
    mean, log_variance = (torch.tensor(np.asarray(part)) for part in moments)
    one = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    return torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0)).numpy()


def test_kl_is_that_of_torch_distributions():
    np.testing.assert_allclose(
        kl_per_channel(posterior()), torch_kl(posterior()).sum((1, 2)).mean(0), rtol=1e-5
    )


def test_kl_is_zero_for_the_prior_and_half_the_square_of_a_shifted_mean():
    zeros = jnp.zeros((2, 5, 5, 3))
    np.testing.assert_allclose(kl_per_channel(DiagonalGaussian(zeros, zeros)), 0.0, atol=1e-6)
    np.testing.assert_allclose(
        kl_per_channel(DiagonalGaussian(zeros + 2.0, zeros)), 25 * 2.0**2 / 2, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize("free_bits", [0.0, 4.8])
def test_loss_written_out(kind, free_bits):
    images = jax.random.uniform(jax.random.key(1), (6, 4, 4, 1), minval=-1.0)
    moments, key = posterior(), jax.random.key(2)
    decode = lambda z: jnp.tanh(jnp.pad(z[..., :1], ((0, 0), (0, 1), (0, 1), (0, 0))))  # noqa: E731
    options = {"beta": 0.3, "free_bits": free_bits, "reconstruction": kind}
    loss, aux = jax.jit(lambda key, x: autoencoder_loss(key, lambda x: moments, decode, x, **options))(
        key, images
    )
    drawn = moments.mean + jnp.exp(moments.log_variance / 2) * jax.random.normal(key, moments.mean.shape)
    error = np.asarray(decode(drawn) - images)
    nats = torch_kl(moments).sum((1, 2)).mean(0)
    distance = np.mean(error**2) if kind == "mse" else np.mean(np.abs(error))
    assert free_bits == 0 or nats.min() < free_bits < nats.max()  # the bound bites on some channels only
    np.testing.assert_allclose(loss, distance + 0.3 / 16 * np.maximum(free_bits, nats).sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["reconstruction"], distance, rtol=1e-5)
    np.testing.assert_allclose(aux["kl"], nats.sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["kl_channel"], nats, rtol=1e-5)


def test_within_free_bits_the_kl_pulls_at_nothing():
    images = jnp.zeros((6, 3, 3, 4))

    def regulariser(scale, free_bits):
        moments = DiagonalGaussian(scale * posterior().mean, posterior().log_variance)
        return autoencoder_loss(
            jax.random.key(0), lambda x: moments, lambda z: 0.0 * z, images, beta=1.0, free_bits=free_bits
        )[0]

    slope = jax.jit(jax.grad(regulariser))
    assert float(slope(1.0, 1e6)) == 0.0 and float(slope(1.0, 0.0)) > 0.0


@given(st.floats(1e-6, 10), st.integers(0, 100), st.integers(0, 200))
def test_annealing_rises_in_a_straight_line_and_stays(beta, warmup, step):
    expected = beta * min(1.0, step / warmup) if warmup else beta
    np.testing.assert_allclose(annealed_beta(beta, warmup, step), expected, rtol=1e-5)


@pytest.mark.unchecked  # a stub of a network
def test_the_recipe_reaches_the_loss():
    """Bound, weight and annealing at a given step, on a stand-in network."""

    class Stub:
        def apply(self, variables, x, method):
            return posterior() if method == "encode" else x[..., :1] * variables["params"]

    recipe = AutoencoderRecipe(beta=0.2, free_bits=4.8, reconstruction="l1")
    batch, key = {"image": jnp.zeros((6, 3, 3, 1))}, jax.random.key(0)
    state = types.SimpleNamespace(step=jnp.int32(5))
    loss, aux = make_loss(recipe, Stub(), warmup_steps=10)(jnp.float32(1.0), state, batch, key)
    nats = np.maximum(4.8, torch_kl(posterior()).sum((1, 2)).mean(0)).sum()
    np.testing.assert_allclose(aux["beta"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(loss, aux["reconstruction"] + 0.1 * nats / 9, rtol=1e-5)
    np.testing.assert_allclose(
        aux["reconstruction"], jnp.mean(jnp.abs(posterior().sample(key)[..., :1])), rtol=1e-5
    )


def test_latent_scale_makes_drawn_latents_unit_normal():
    moments = posterior(shape=(400, 5, 5, 4), log_variance_shift=-1.0)
    moments = DiagonalGaussian(3.0 * moments.mean + 2.0, moments.log_variance)
    scale, shift = latent_scale(*moments)
    latents = (np.asarray(moments.sample(jax.random.key(3)), np.float64) - shift) * scale
    # 40 000 numbers: the standard errors are 0.005 and 0.0035
    assert abs(latents.mean()) < 0.02 and abs(latents.std() - 1) < 0.015
    scale, shift = latent_scale(moments.mean, None)
    means = (np.asarray(moments.mean, np.float64) - shift) * scale
    np.testing.assert_allclose([means.mean(), means.std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize("on_means", [True, False])
def test_moments_of_posteriors_are_those_of_all_of_them_at_once(on_means):
    """Seven pictures, three at a time: the same scale and KL as of the whole arrays."""
    module = models.build(
        "mini-autoencoder", block_out_channels=(4, 4, 4), latent_channels=2, norm_num_groups=2
    )
    params = models.init(module, jax.random.key(0))
    images = np.random.default_rng(0).uniform(-1, 1, (7, 28, 28, 1)).astype(np.float32)
    asked = []

    class Noted(ArrayRows):
        def take(self, rows):
            asked.append(len(rows))
            return super().take(rows)

    moments = posterior_moments(module, params, Noted({"image": images}), at_once=3)
    assert asked == [3, 3, 1]
    whole = encode_all(module, params, images)
    expected = latent_scale(whole.mean, None if on_means else whole.log_variance)
    np.testing.assert_allclose(moments.scale(on_means), expected, rtol=1e-5)
    assert check_channels(moments.kl)[0].seen == check_posterior_collapse(*whole)[0].seen


def test_an_unknown_reconstruction_loss_is_refused():
    with pytest.raises(UnknownNameError, match="mse, l1"):
        AutoencoderRecipe(reconstruction="mae")


def test_bfloat16_autoencoder_has_a_float32_loss_and_gradient():
    recipe = AutoencoderRecipe(dtype="bfloat16")
    module = models.build("mini-autoencoder", dtype="bfloat16")
    state = types.SimpleNamespace(step=jnp.int32(0))
    loss_fn = lambda params, batch, key: make_loss(recipe, module, 0)(params, state, batch, key)  # noqa: E731
    (loss, _), gradients = jax.eval_shape(
        jax.value_and_grad(loss_fn, has_aux=True),
        models.shapes(module),
        {"image": jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)},
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    assert loss.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {
        jnp.dtype("float32")
    }
