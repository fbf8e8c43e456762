"""Tiles and slices agree with diffusers, and with the whole image where there is no context to lose."""

import os

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.tiling import tiled_decoder, tiled_encoder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    theirs = randomised(
        diffusers.AutoencoderKL(
            sample_size=16,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=2,
            scaling_factor=1.0,
        )
    )
    folder = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    theirs.enable_tiling()
    return theirs, *checkpoints.load(folder)


def test_tiles_blend_as_those_of_diffusers(pair):
    """11 x 14 latents: squares of 8, 6 apart, that end in strips of 5 rows and of 2 columns."""
    theirs, module, params = pair
    x, z = images(1, 22, 28, 3), images(1, 11, 14, 2)
    tiling = models.Tiling()
    encoded = jax.jit(lambda p, x: models.encode_latents(module, p, x, tiling=tiling))(params, x)
    decoded = jax.jit(lambda p, z: models.decode_latents(module, p, z, tiling=tiling))(params, z)
    with torch.no_grad():
        assert_agrees(encoded, theirs.encode(to_torch(x)).latent_dist.mean)
        assert_agrees(decoded, theirs.decode(to_torch(z)).sample)


def test_slices_are_the_batch_one_by_one(pair):
    _, module, params = pair
    z = images(3, 2, 3, 2)
    whole, slices = (
        jax.jit(lambda p, z, s=slicing: models.decode_latents(module, p, z, slicing=s))(params, z)
        for slicing in (False, True)
    )
    # Optimized, a convolution of one image adds in another order than one of three.
    atol = 1e-6 if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" else 4e-6
    np.testing.assert_allclose(slices, whole, rtol=0, atol=atol * np.abs(whole).max())


def test_slicing_draws_the_noise_of_the_whole(pair):
    _, module, params = pair
    x, key = images(2, 8, 12, 3), jax.random.key(3)
    whole, slices = (
        jax.jit(lambda p, x, s=slicing: models.encode_latents(module, p, x, key, slicing=s))(params, x)
        for slicing in (False, True)
    )
    np.testing.assert_allclose(slices, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


FACTOR = 4
CONFIG = models.ConvAutoencoderConfig(sample_size=32, block_out_channels=(8, 8, 8))


def enlarged(z):
    return jnp.repeat(jnp.repeat(z, FACTOR, axis=1), FACTOR, axis=2)


def averaged(x):
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels).mean((2, 4))


@settings(max_examples=8)  # each is compiled
@given(
    st.tuples(st.integers(1, 15), st.integers(1, 15)),
    st.integers(4, 7),
    st.floats(0, 0.5),
)
def test_functions_without_context_lose_nothing(sides, tile, overlap):
    """Whatever the sizes, an output pixel that depends on its own latent alone is the same in every tile."""
    z = images(2, *sides, 1)
    tiling = models.Tiling(tile * FACTOR, overlap)
    whole = enlarged(z)
    tiled = jax.jit(tiled_decoder(enlarged, CONFIG, tiling))(z)
    np.testing.assert_allclose(tiled, whole, atol=1e-6)
    back = jax.jit(tiled_encoder(averaged, CONFIG, tiling))(whole)
    np.testing.assert_allclose(back, z, atol=1e-6)


def test_seams_fade_linearly():
    """A function that marks squares by their width, 8 and 7: the second takes over within 8 pixels."""
    image = tiled_decoder(lambda z: jnp.full_like(enlarged(z), z.shape[2]), CONFIG, models.Tiling(32))(
        jnp.zeros((1, 4, 13, 1))
    )
    expected = [8] * 8 + [8 - i / 8 for i in range(8)] + [7] * 8
    np.testing.assert_allclose(image[0, 0, 16:40, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "tiling", [{"overlap": 0.6}, {"overlap": -0.1}, {"size": 30}, {"size": 4, "overlap": 0.5}]
)
def test_tiles_that_cannot_be(tiling):
    with pytest.raises(InvalidArgumentError, match="overlap"):
        tiled_decoder(enlarged, CONFIG, models.Tiling(**tiling))


def test_sides_without_whole_latents_are_refused_with_the_nearest():
    encode = tiled_encoder(averaged, CONFIG, models.Tiling(16))
    with pytest.raises(InvalidArgumentError, match=r"width must be a multiple of 4, got 27; nearest is 28"):
        encode(np.zeros((1, 32, 27, 1), np.float32))
