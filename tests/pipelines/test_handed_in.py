"""Arrays that are handed to an autoencoder by hand."""

import jax
import numpy as np
import pytest

from jaxldm import models, pipelines
from jaxldm.errors import InvalidArgumentError


@pytest.fixture(scope="module", params=["mini-autoencoder", "sd-vae"])
def vae(request):
    small = {"block_out_channels": (4, 4), "norm_num_groups": 2, "sample_size": 8}
    if request.param == "sd-vae":
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        small |= {"layers_per_block": 1, **blocks}
    module = models.build(request.param, **small)
    return pipelines.Network(module, models.init(module, jax.random.key(0)))


@pytest.mark.unchecked
def test_other_channels_are_refused_in_one_line(vae):
    channels, latents = vae.config.in_channels, vae.config.latent_channels
    wrong = np.zeros((2, 8, 8, channels + 1), np.float32)
    with pytest.raises(InvalidArgumentError, match=rf"images must be \[N, H, W, {channels}\]"):
        pipelines.encode_images(vae, wrong)
    first = np.zeros((2, latents, 6, 8), np.float32)
    with pytest.raises(InvalidArgumentError, match=rf"latents.*looks like \[N, {latents}, H, W\]"):
        pipelines.decode_images(vae, first)


def test_pixels_of_8_bits_are_refused(vae):
    images = np.full((1, 8, 8, vae.config.in_channels), 255, np.float32)
    with pytest.raises(InvalidArgumentError, match=r"up to 255: write x / 127\.5 - 1"):
        pipelines.encode_images(vae, images)
    assert np.isfinite(pipelines.encode_images(vae, images / 127.5 - 1)).all()
