"""EQ regularisation: nothing for a decoder that commutes with the transformations, more for others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import training
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.equivariance import rescaled, turned

Z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


def squared(a, b):
    return jnp.mean((a - b) ** 2)


def loss_of(decode, z=Z, factor=1, scales=(0.5, 0.75), keys=12):
    """The mean over many draws of tau; images are what z decodes to."""
    images = decode(z)
    each = jax.jit(jax.vmap(lambda key: training.equivariance_loss(key, decode, z, images, squared, scales)))
    return np.asarray(each(jax.random.split(jax.random.key(1), keys)))


def test_a_pointwise_linear_decoder_has_no_loss():
    assert loss_of(lambda z: z @ jnp.arange(6.0).reshape(3, 2)).max() < 1e-9


def test_a_decoder_that_knows_places_has_one_for_every_turn():
    def decode(z):  # the left half is dark
        return z * jnp.float32(jnp.arange(z.shape[2]) >= z.shape[2] // 2).reshape(1, 1, -1, 1)

    losses = loss_of(decode, scales=(1.0,), keys=24)
    still = losses < 1e-9  # a turn by 0
    assert 0 < still.sum() < 24 and losses[~still].min() > 0.1


def test_sides_stay_whole_and_images_follow_the_latents():
    images = jnp.zeros((1, 28, 28, 1))
    small, wanted = rescaled(jnp.zeros((1, 7, 7, 4)), 0.5, (7, 7)), rescaled(images, 0.5, (7, 7))
    assert small.shape == (1, 4, 4, 4) and wanted.shape == (1, 16, 16, 1)
    assert rescaled(images, 1.0, (7, 7)) is images
    # Averages stay: the filter is wide enough for the smaller size.
    image = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 32, 1)), jnp.float32)
    assert abs(float(rescaled(image, 0.25, (8, 8)).mean() - image.mean())) < 0.05


def test_turns():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    np.testing.assert_array_equal(turned(x, jnp.int32(2)), x[:, ::-1, ::-1])
    np.testing.assert_array_equal(turned(x, jnp.int32(0)), x)
    square = jnp.arange(4.0).reshape(1, 2, 2, 1)
    for k in range(4):
        expected = np.rot90(square, k, (1, 2))
        np.testing.assert_array_equal(turned(square, jnp.int32(k)), expected)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.5,), "half", (True,)])
def test_impossible_scales_are_refused(scales):
    with pytest.raises(InvalidArgumentError, match=r"scales must be numbers in \(0, 1\]"):
        training.equivariance_loss(jax.random.key(0), lambda z: z, Z, Z, squared, scales)


def test_images_of_another_grid_are_refused():
    with pytest.raises(InvalidArgumentError, match="multiple of the latents 8x8, got 12x8"):
        training.equivariance_loss(jax.random.key(0), lambda z: z, Z, jnp.zeros((2, 12, 8, 3)), squared)
