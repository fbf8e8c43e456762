import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch_reference import assert_agrees, images, to_torch
from transformers_reference import opened_in_silence, perturbed, saved_pair

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, projection_dim=9, num_hidden_layers=2, num_attention_heads=2,
        image_size=12, patch_size=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vision")
    return saved_pair(transformers.CLIPVisionModelWithProjection, config, folder)


def assert_encodes_alike(theirs, module, params, batch):
    x = images(batch, 12, 12, 3)
    ours = jax.jit(module.apply)({"params": params}, x)
    with torch.no_grad():
        expected = theirs(to_torch(x), output_hidden_states=True)
        assert_agrees(ours.pooled, theirs.vision_model(to_torch(x)).pooler_output)
    assert_agrees(ours.image_embeds, expected.image_embeds)
    assert_agrees(ours.last_hidden_state, expected.last_hidden_state)
    for state, reference in zip(ours.hidden_states, expected.hidden_states, strict=True):
        assert_agrees(state, reference)


@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_with_transformers(pair, batch):
    assert_encodes_alike(*pair, batch)


def test_transformers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    changed = perturbed(params)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_in_silence(type(theirs), tmp_path, caplog, recwarn)
    assert_encodes_alike(opened, module, changed, 3)
    again, same = checkpoints.load(tmp_path)
    assert again.config == module.config
    jax.tree.map(np.testing.assert_array_equal, same, changed)


def test_strangers_in_a_config_are_named(pair):
    entries = models.config_to_dict(pair[1].config)
    assert models.config_from_dict(entries | {"torch_dtype": "float32", "dropout": 0.0}) == pair[1].config
    with pytest.raises(CheckpointError, match="unknown key 'surprise'"):
        models.config_from_dict(entries | {"surprise": 1})


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (20, 20), (224, 300), (31, 100)])
def test_images_are_prepared_as_the_reference_prepares_them(size):
    """Larger and smaller than wanted, wide and high."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (2, 9, 7, 3), np.uint8)
    pictures = [Image.fromarray(picture).resize(size[::-1], Image.Resampling.NEAREST) for picture in small]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    expected = np.asarray(processor(pictures, return_tensors="np")["pixel_values"]).transpose(0, 2, 3, 1)
    ours = models.clip_pixel_values(np.stack([np.asarray(picture) for picture in pictures]), 32)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_other_images_are_refused(pair):
    _, module, params = pair
    with pytest.raises(InvalidArgumentError, match=r"uint8 \[B, H, W, 3\], not float32 \[1, 4, 4, 3\]"):
        models.clip_pixel_values(np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(InvalidArgumentError, match="clip_pixel_values"):
        module.apply({"params": params}, images(1, 12, 16, 3))
