"""Pixels of 0 to 255 are told from images in [-1, 1] wherever these are wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.faults.small_folders import zeros
from jaxldm import data, metrics, models, pipelines
from jaxldm import training as T
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.metrics import health
from jaxldm.pixels import check_not_pixels

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
PIXELS = np.float32(127.5) * (IMAGES + 1)
POSTERIOR = models.DiagonalGaussian(IMAGES, IMAGES)


def encode(images):
    config = models.AutoencoderKLConfig(
        sample_size=8,
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    network = zeros(models.from_config(config))
    return models.encode_latents(network.module, network.params, images)


def loss(images):
    return T.autoencoder_loss(jax.random.key(0), lambda images: POSTERIOR, lambda z: z, images)


TAKERS = {
    "to_uint8": data.to_uint8,
    "image_grid": metrics.image_grid,
    "labelled_grid": lambda images: metrics.labelled_grid(images, 2),
    "nearest_neighbour_panel": lambda images: metrics.nearest_neighbour_panel(images, images),
    "reconstruction_error": lambda images: metrics.reconstruction_error(images, images),
    "check_reconstruction": lambda images: health.check_reconstruction(images, images),
    "check_blank": health.check_blank,
    "check_saturation": lambda images: health.check_saturation(images, images),
    "encode_latents": encode,
    "autoencoder_loss": loss,
}


@pytest.mark.parametrize("name", TAKERS)
def test_pixels_are_refused_in_one_line(name):
    if name != "encode_latents":  # which takes seconds to compile
        TAKERS[name](IMAGES)
    with pytest.raises(InvalidArgumentError, match=r"images must lie in \[-1, 1\], got .* x / 127\.5 - 1"):
        TAKERS[name](PIXELS)


def test_saved_samples_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"\[-1, 1\]"):
        pipelines.save_samples(tmp_path / "out", PIXELS)
    assert not (tmp_path / "out").exists()


def test_noise_is_drawn_and_networks_may_go_beyond():
    noise = 80 * np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    assert set(np.unique(data.to_uint8(noise))) >= {0, 255}
    check_not_pixels("images", 3 * IMAGES)
    with pytest.raises(InvalidArgumentError):  # no network was trained on it
        check_not_pixels("images", noise)
    jax.jit(lambda x: check_not_pixels("images", x) or x)(jnp.asarray(PIXELS))  # cannot be seen


@pytest.mark.unchecked
def test_pixels_of_more_than_8_bits_are_no_pixels():
    np.testing.assert_array_equal(data.from_uint8(np.array([0, 255], np.int32)), [-1, 1])
    for wrong in ([0, 256], [-1, 255]):
        with pytest.raises(DataError, match=r"0 to 255, got"):
            data.from_uint8(np.array(wrong, np.int32))


@pytest.mark.unchecked
@pytest.mark.parametrize(("labels", "message"), [([1], "one for each of 2"), ([0, -1], "from 0 to")])
def test_labels_of_samples_are_one_for_each_and_classes(labels, message, tmp_path):
    with pytest.raises((DataError, InvalidArgumentError), match=message):
        pipelines.save_samples(tmp_path, IMAGES, labels)
    assert not list(tmp_path.iterdir())
