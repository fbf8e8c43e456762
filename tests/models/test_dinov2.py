import jax
import numpy as np
import pytest
import torch
import transformers
from torch_reference import assert_agrees, images, to_torch
from transformers_reference import opened_in_silence, perturbed, saved_pair

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
        layerscale_value=0.5,
    )  # fmt: skip
    return saved_pair(transformers.Dinov2Model, config, tmp_path_factory.mktemp("dinov2"))


@pytest.mark.parametrize("size", [(28, 28), (35, 21)])
def test_agrees_with_transformers_at_any_size(pair, size):
    theirs, module, params = pair
    x = images(2, *size, 3)
    ours = jax.jit(module.apply)({"params": params}, x)
    with torch.no_grad():
        expected = theirs(to_torch(x))
    assert_agrees(ours.pooled, expected.pooler_output, 1e-5)
    assert_agrees(ours.last_hidden_state, expected.last_hidden_state, 1e-5)


def test_transformers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    changed = perturbed(params)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_in_silence(type(theirs), tmp_path, caplog, recwarn)
    x = images(1, 28, 28, 3)
    with torch.no_grad():
        assert_agrees(jax.jit(module.apply)({"params": changed}, x).pooled, opened(to_torch(x)).pooler_output)


def test_the_preset_has_the_published_number_of_parameters():
    assert models.count_params("dinov2-large") == 304_368_640


def test_images_are_prepared_by_pillow_and_imagenets_statistics():
    pixels = np.random.default_rng(0).integers(0, 256, [1, 20, 30, 3], dtype=np.uint8)
    processor = transformers.BitImageProcessorPil if hasattr(transformers, "BitImageProcessorPil") else None
    found = models.dinov2_pixel_values(pixels, 14)
    assert found.shape == (1, 14, 14, 3) and found.dtype == np.float32
    if processor is not None:
        options = {"size": {"height": 14, "width": 14}, "do_center_crop": False, "resample": 3}
        options |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        expected = processor(**options)(images=pixels[0], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(found, np.asarray(expected).transpose(0, 2, 3, 1), atol=1e-6)


def test_images_that_cannot_be_cut_into_patches_are_refused(pair):
    with pytest.raises(InvalidArgumentError, match=r"multiples of 7, not \(1, 30, 28, 3\)"):
        pair[1].apply({"params": pair[2]}, np.zeros([1, 30, 28, 3], np.float32))
