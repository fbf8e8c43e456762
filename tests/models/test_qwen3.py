"""Qwen3 as the files of its publishers have it; that it agrees with transformers is in test_text_encoders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch_reference import assert_agrees
from transformers_reference import saved_pair

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

SMALL = {
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)


@pytest.mark.parametrize("tied", [True, False])
def test_whole_language_models_give_their_encoder(tmp_path, tied):
    """As Z-Image's folder has it: the tensors of Qwen3ForCausalLM, named Qwen3Model in model_index.json."""
    config = transformers.Qwen3Config(**SMALL, tie_word_embeddings=tied)
    theirs, module, params = saved_pair(transformers.Qwen3ForCausalLM, config, tmp_path)
    assert "model.norm.weight" in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = theirs.model(torch.from_numpy(TOKENS).long()).last_hidden_state
    assert_agrees(jax.jit(module.apply)({"params": params}, TOKENS).last_hidden_state, expected)


def test_configs_of_transformers_4_mean_the_same(tmp_path):
    """rope_theta next to rope_scaling, and keys of a window that is not used."""
    config = transformers.Qwen3Config(**SMALL, rope_theta=5000.0)
    _, module, _ = saved_pair(transformers.Qwen3Model, config, tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    del entries["rope_parameters"], entries["layer_types"]
    old = {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 36}
    read = models.config_from_dict(entries | old | {"rope_theta": 5000})
    assert read == module.config and read.rope_theta == 5000.0
    written = models.config_to_dict(read)
    again = transformers.Qwen3Config(**{k: v for k, v in written.items() if k[0] != "_"})
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_what_is_not_supported_is_named(entries, message):
    with pytest.raises(CheckpointError, match=message):
        models.config_from_dict({"architectures": ["Qwen3Model"]} | entries)


def test_texts_longer_than_the_positions_are_refused():
    module = models.build("qwen3-4b", **SMALL, max_position_embeddings=8)
    with pytest.raises(InvalidArgumentError, match="9 tokens per text"):
        jax.eval_shape(module.apply, {"params": models.shapes(module)}, TOKENS)


def test_states_beyond_float16_stay_finite(tmp_path):
    theirs, _, _ = saved_pair(transformers.Qwen3Model, transformers.Qwen3Config(**SMALL), tmp_path)
    with torch.no_grad():
        theirs.layers[0].mlp.down_proj.weight.mul_(3e6)
        expected = theirs(torch.from_numpy(TOKENS).long(), output_hidden_states=True)
    assert expected.hidden_states[1].abs().max() > 2 * 65504
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    state["layers.0.mlp.down_proj.weight"] /= 3e3
    state["layers.0.mlp.up_proj.weight"] *= 3e3
    save_file(state, tmp_path / "model.safetensors")
    module, params = checkpoints.load(tmp_path, dtype="float16")
    ours = jax.jit(module.apply)({"params": params}, TOKENS)
    assert ours.last_hidden_state.dtype == jnp.float16
    assert_agrees(ours.last_hidden_state, expected.last_hidden_state, tolerance=0.02)
