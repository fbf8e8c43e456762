"""Plans that cannot fit in memory are refused with their size, before anything is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import COMPILATIONS
from tiny_models import latent_pipeline, pixel_pipeline

from jaxldm import host, models, training
from jaxldm.data import Dataset
from jaxldm.errors import InvalidArgumentError
from jaxldm.memory import as_bytes, size_of
from jaxldm.nn.attention_kernels import MOST_LOGITS
from jaxldm.pipelines import encode_images
from jaxldm.training.mesh import make_mesh

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pipe():
    return latent_pipeline()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (dict(num_images=10**9), ["1000000000 images of 8x8 pixels", "at least 384 GB of memory"]),
        (dict(num_images=10**30), ["num_images must be a whole number from 1 to 2147483647"]),
        (dict(num_images=1, previews=10**9), ["steps of 16 images of 4x4 latents", "GB", "batch_size"]),
        (
            dict(num_images=1, num_inference_steps=10**9),
            ["num_inference_steps", "whole number from 1 to 1000000"],
        ),
        (dict(num_images=1, guidance_scale=1e39), ["guidance_scale", "finite"]),
    ],
)
def test_what_cannot_fit_is_refused(pipe, call, words):
    before = COMPILATIONS.count
    with pytest.raises(InvalidArgumentError) as error:
        pipe(KEY, **({"num_inference_steps": 2} | call))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value)) < 400 and COMPILATIONS.count - before <= 4  # keys, no network


def test_a_batch_of_many_is_refused(pipe):
    for many in (10**7, 10**12):
        with pytest.raises(InvalidArgumentError, match="batch_size"):
            pipe.replace(images_per_device=many)(KEY, num_images=1, num_inference_steps=2)


def test_a_step_and_a_decoding_that_do_not_fit_are_refused(monkeypatch):
    """A chunk of the attention of a DiT on 64x64 patches, and the autoencoder's convolutions."""
    large = pixel_pipeline(sample_size=256)
    monkeypatch.setattr(host, "memory_bytes", lambda device=None: 4 * MOST_LOGITS)  # in float32
    with pytest.raises(InvalidArgumentError, match=r"of 256x256 latents need at least 67\.\d MB.*has 67\.1"):
        large.replace(images_per_device=1)(KEY, num_images=1, num_inference_steps=2)
    small, images = latent_pipeline(), np.zeros((1, 8, 8, 1), np.float32)
    weights = size_of(small.autoencoder)
    monkeypatch.setattr(host, "memory_bytes", lambda device=None: weights + 200)
    with pytest.raises(InvalidArgumentError, match="decoding 1 images of 8x8 pixels needs"):
        small.decode(np.zeros((1, 4, 4, 2), np.float32))
    with pytest.raises(InvalidArgumentError, match="encoding 1 images of 8x8 pixels needs"):
        encode_images(small.autoencoder, images)


def test_a_training_that_does_not_fit_is_refused(monkeypatch):
    recipe = training.RECIPES["smoke-dit"]
    large = dataclasses.replace(
        recipe.diffusion, preset="tiny-dit", overrides={"hidden_size": 4096, "depth": 30}
    )
    monkeypatch.setattr(host, "memory_bytes", lambda device=None: 16 * 10**9)
    data = Dataset("digits", (28, 28, 1), tuple("0123456789"), {})
    with pytest.raises(InvalidArgumentError, match=r"its [\d,]+ parameters needs .* smaller preset"):
        training.check_recipe(dataclasses.replace(recipe, diffusion=large), data, make_mesh(1))


def test_the_largest_product_counts_those_inside_loops():
    def function(x):
        y = jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=3)[0]
        return jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: (y[:, :1] @ y[:1]) @ y, y).sum()

    assert models.largest_product(function, jnp.ones((8, 8))) == 8 * 8 * 4
    assert models.largest_product(lambda x: x + 1, jnp.ones(3)) == 0


def test_memory_of_this_machine():
    assert 2**28 < host.memory_bytes() == host.memory_bytes(jax.devices()[0]) < 2**50
    assert [as_bytes(n) for n in (0, 1500, 10**18, 2 * 10**9)] == ["0 bytes", "1.5 kB", "1 EB", "2 GB"]
