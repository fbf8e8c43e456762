"""An image to noise and back: `pipelines.invert`, on a tiny random model of texts."""

import jax
import numpy as np
import pytest
from picture_checks import picture
from tiny_models import text_parts

from jaxldm import pipelines
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION

KEY = jax.random.key(1)
OPTIONS = {"num_inference_steps": 8, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """With a network that answers gently: a random one bends more than any that was trained."""
    parts = text_parts(tmp_path_factory.mktemp("inversion") / "tokenizer")
    params = jax.tree.map(lambda weight: 0.3 * weight, parts["unet"].params)
    parts["unet"] = pipelines.Network(parts["unet"].module, params)
    return pipelines.Pipeline(STABLE_DIFFUSION, parts)


def test_an_inverted_image_is_drawn_again(pipe):
    image = picture()
    code = pipelines.encode_images(pipe.autoencoder, pipelines.as_images(image))
    errors = []
    for iterations in (1, 12):
        noise = pipelines.invert(pipe, image, "a cat", iterations=iterations, **OPTIONS)
        again = pipe(KEY, "a cat", latents=noise, solver="ddim", output="latents", **OPTIONS)
        errors.append(np.abs(again - code).max() / np.abs(code).max())
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 5, errors
    other = pipe(KEY, "a dog", latents=noise, solver="ddim", output="latents", **OPTIONS)
    assert np.abs(other - code).max() > 0


def test_one_noise_for_each_image(pipe):
    images = np.stack([picture(0), picture(1)])
    both = pipelines.invert(pipe, images, ["a cat", "a dog"], iterations=2, **OPTIONS)
    alone = pipelines.invert(pipe, images[1], "a dog", iterations=2, **OPTIONS)
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "dpmpp_2m"}, "an inversion has no solver"),
        ({"strength": 0.5}, "an inversion has no strength"),
        ({"iterations": 0}, "iterations"),
    ],
)
def test_refusals(pipe, options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        pipelines.invert(pipe, picture(), "a cat", **options)
