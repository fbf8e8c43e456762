"""Mistral as the files of its publishers have it; other agreement with transformers: test_text_encoders."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch_reference import assert_agrees, randomised
from transformers_reference import opened_in_silence, perturbed, saved_pair

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

TEXT = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "sliding_window": None,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"model_type": "pixtral", "head_dim": 4, "image_size": 28, "patch_size": 14}
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
LEFT = (np.arange(9)[None] >= np.array([[0], [4]])).astype(np.int32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The whole Mistral 3, as a folder has it, and what ours reads of it."""
    folder = tmp_path_factory.mktemp("text_encoder")
    text = TEXT | {"model_type": "mistral", "rope_parameters": ROPE}
    config = transformers.Mistral3Config(text_config=text, vision_config=VISION, tie_word_embeddings=False)
    theirs = randomised(transformers.Mistral3ForConditionalGeneration(config))
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder), folder


def assert_encodes_alike(theirs, module, params):
    """At padding in front of a text, which attends to nothing, as well."""
    ours = jax.jit(module.apply)({"params": params}, TOKENS, LEFT)
    given = {"input_ids": torch.from_numpy(TOKENS).long(), "attention_mask": torch.from_numpy(LEFT)}
    with torch.no_grad():
        expected = theirs(**given, output_hidden_states=True).hidden_states
    assert len(ours.hidden_states) == len(expected) == 3
    for state, reference in zip(ours.hidden_states, expected, strict=True):
        assert_agrees(state, reference)
    np.testing.assert_array_equal(ours.hidden_states[-1], ours.last_hidden_state)


def test_a_text_filled_on_the_left_is_encoded_as_by_the_whole_model(whole):
    theirs, module, params, _ = whole
    assert any("vision_tower" in name for name in theirs.state_dict()) and params.keys() == {
        *("embed_tokens", "layers_0", "layers_1", "norm")
    }
    assert_encodes_alike(theirs, module, params)


def test_the_language_model_alone_is_saved(whole, tmp_path, caplog, recwarn):
    _, module, params, _ = whole
    changed = perturbed(params)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_in_silence(transformers.MistralModel, tmp_path, caplog, recwarn)
    assert_encodes_alike(opened, module, changed)
    assert opened.config.rope_parameters == ROPE and opened.config.sliding_window is None
    again, same = checkpoints.load(tmp_path)
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, same, changed)


def test_folders_of_transformers_4_are_read_alike(whole, tmp_path):
    """The rotary settings at their old place, and both namings of tensors."""
    _, module, params, folder = whole
    entries = json.loads((folder / "config.json").read_text())
    text = {key: value for key, value in entries["text_config"].items() if key != "rope_parameters"}
    old = entries | {"text_config": text | {"rope_theta": 5000, "rope_scaling": None}}
    assert models.config_from_dict(old) == models.config_from_dict(entries) == module.config
    (tmp_path / "config.json").write_text(json.dumps(old))
    state = load_file(folder / "model.safetensors")
    parts = ("model.", "language_model.", "model.")
    bare = {}
    for name, tensor in state.items():
        for part in parts:
            name = name.removeprefix(part)
        bare[name] = tensor
    images, head = ("vision_tower", "multi_modal_projector"), "lm_head.weight"
    before = {
        name if name.startswith(images) else f"language_model.{'model.' * (name != head)}{name}": bare[name]
        for name in bare
    }
    now = {
        name if name == head else f"model.{'language_model.' * (not name.startswith(images))}{name}": bare[
            name
        ]
        for name in bare
    }
    assert {"language_model.model.norm.weight", "language_model.lm_head.weight"} <= before.keys()
    assert {"model.language_model.norm.weight", "model.multi_modal_projector.norm.weight"} <= now.keys()
    for tensors in (before, now):
        save_file(tensors, tmp_path / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, checkpoints.load(tmp_path)[1], params)
    save_file(now | {"model.surprise.weight": bare["norm.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"left over: model.surprise.weight"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"text_config": {"surprise": 1}}, "unknown key 'surprise'"),
        ({"text_config": {}, "surprise": 1}, "unknown key 'surprise'"),
        ({"text_config": {"model_type": "ministral3"}}, "model_type 'ministral3'; only 'mistral'"),
        ({"num_attention_heads": 7}, "7 heads"),
        ({"head_dim": 5}, "5 channels must be even"),
    ],
)
def test_what_is_not_supported_is_named(entries, message):
    with pytest.raises(CheckpointError, match=message):
        models.config_from_dict({"architectures": ["Mistral3ForConditionalGeneration"]} | entries)


def test_texts_longer_than_the_window_are_refused(tmp_path):
    """Up to it, it has no effect."""
    config = transformers.MistralConfig(**TEXT | {"sliding_window": 9})
    theirs, module, params = saved_pair(transformers.MistralModel, config, tmp_path)
    assert_encodes_alike(theirs, module, params)
    with pytest.raises(InvalidArgumentError, match=r"10 tokens per text.* positions for 9"):
        jax.eval_shape(module.apply, {"params": params}, np.zeros((1, 10), np.int32))
