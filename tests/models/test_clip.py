import functools
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from torch_reference import assert_agrees, images, to_torch
from transformers_reference import opened_in_silence, perturbed, saved_pair

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    config = transformers.CLIPConfig(
        text_config=TOWER | {"vocab_size": 60, "max_position_embeddings": 9, "eos_token_id": 2},
        vision_config=TOWER | {"hidden_size": 12, "image_size": 8, "patch_size": 4},
        projection_dim=7,
    )
    return saved_pair(transformers.CLIPModel, config, tmp_path_factory.mktemp("clip"))


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, input_ids, x):
    """(logits of every image for every text, embeddings of texts, of images)."""
    logits, texts, pictures = (
        module.apply({"params": params}, *inputs, method=method)
        for inputs, method in (((input_ids, x), None), ((input_ids,), "encode_text"), ((x,), "encode_image"))
    )
    return logits, texts.text_embeds, pictures.image_embeds


def assert_compares_alike(theirs, module, params):
    input_ids, x = np.random.default_rng(0).integers(0, 60, (2, 9)).astype(np.int32), images(3, 8, 8, 3)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(input_ids).long(), to_torch(x))
    logits, texts, pictures = apply(module, params, input_ids, x)
    assert_agrees(logits, expected.logits_per_image)
    for ours, reference in ((texts, expected.text_embeds), (pictures, expected.image_embeds)):
        assert_agrees(ours / np.linalg.norm(ours, axis=-1, keepdims=True), reference)


def test_texts_and_images_are_compared_as_in_transformers(pair):
    assert_compares_alike(*pair)


def test_transformers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    changed = perturbed(params)
    checkpoints.save(tmp_path, module, changed)
    assert_compares_alike(opened_in_silence(type(theirs), tmp_path, caplog, recwarn), module, changed)
    again, same = checkpoints.load(tmp_path)
    assert again.config == module.config
    jax.tree.map(np.testing.assert_array_equal, same, changed)


def test_strangers_in_a_tower_are_named(pair, tmp_path):
    entries = json.loads(json.dumps(models.config_to_dict(pair[1].config)))
    old = entries | {"text_config_dict": {"hidden_size": 16}, "vision_config_dict": None}
    assert models.config_from_dict(old) == pair[1].config
    for tower in ("text_config", "vision_config"):
        with pytest.raises(CheckpointError, match="unknown key 'surprise'"):
            models.config_from_dict(entries | {tower: entries[tower] | {"surprise": 1}})
        with pytest.raises(CheckpointError, match="no object under"):
            models.config_from_dict(entries | {tower: "clip-l"})


def test_the_published_whole_has_428_million_parameters():
    config = models.CLIPConfig(
        text_config=models.PRESETS["clip-l"],
        vision_config=models.PRESETS["clip-l-vision"],
        projection_dim=768,
    )
    assert models.count_params(models.from_config(config)) == 427_616_513
