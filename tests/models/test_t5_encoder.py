import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch_reference import assert_agrees
from transformers.models.t5.modeling_t5 import T5Attention
from transformers_reference import saved_pair

from jaxldm import checkpoints, models
from jaxldm.models.t5_encoder import relative_position_buckets

SMALL = {"vocab_size": 40, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 10), (16, 100), (32, 512)])
def test_distances_fall_into_the_buckets_of_the_reference(buckets, farthest):
    length = 600
    places = torch.arange(length)
    expected = T5Attention._relative_position_bucket(
        places[None, :] - places[:, None], num_buckets=buckets, max_distance=farthest
    )
    np.testing.assert_array_equal(relative_position_buckets(length, buckets, farthest), expected.numpy())


def test_float16_survives_states_beyond_its_range(tmp_path):
    """The published XXL weights make sums beyond 65504: in float16 throughout they would be infinite."""
    config = transformers.T5Config(**SMALL, feed_forward_proj="gated-gelu")
    theirs, module, params = saved_pair(transformers.T5EncoderModel, config, tmp_path)
    with torch.no_grad():
        for block in theirs.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(4e4)
            block.layer[1].DenseReluDense.wi_1.weight.mul_(8)
    theirs.save_pretrained(tmp_path)
    module, params = checkpoints.load(tmp_path)
    half = models.from_config(dataclasses.replace(module.config, dtype="float16"))
    narrow = jax.tree.map(lambda x: x.astype(jnp.float16), jax.device_get(params))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(narrow))
    input_ids = np.random.default_rng(0).integers(0, 40, (2, 7)).astype(np.int32)
    ours = jax.jit(half.apply)({"params": narrow}, input_ids)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(input_ids).long(), output_hidden_states=True)
    assert max(state.abs().max() for state in expected.hidden_states[:-1]) > 2 * 65504
    assert ours.last_hidden_state.dtype == jnp.float16
    assert_agrees(ours.last_hidden_state, expected.last_hidden_state, tolerance=0.02)


def test_what_feeds_forward_stops_at_the_largest_float16(tmp_path):
    """Gate times linear part beyond float16 counts as the largest float16, not as infinite."""
    config = transformers.T5Config(**SMALL, feed_forward_proj="gated-gelu")
    _, module, params = saved_pair(transformers.T5EncoderModel, config, tmp_path)
    layer = params["encoder"]["block_0"]["layer_1"]["DenseReluDense"]
    layer |= {name: {"kernel": 300.0 * layer[name]["kernel"]} for name in ("wi_0", "wi_1")}
    half = models.from_config(dataclasses.replace(module.config, dtype="float16"))
    input_ids = np.random.default_rng(0).integers(0, 40, (2, 7)).astype(np.int32)
    ours = jax.jit(half.apply)({"params": params}, input_ids).last_hidden_state
    assert jnp.isfinite(ours).all()


def test_whole_checkpoints_give_their_encoder(tmp_path):
    """A folder of T5ForConditionalGeneration, decoder and all."""
    config = transformers.T5Config(**SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    module, params = checkpoints.load(tmp_path)
    input_ids = np.random.default_rng(0).integers(0, 40, (1, 5)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.encoder(torch.from_numpy(input_ids).long()).last_hidden_state
    assert_agrees(module.apply({"params": params}, input_ids).last_hidden_state, expected)


def test_the_embedding_may_bear_either_of_its_names(tmp_path):
    _, _, params = saved_pair(transformers.T5EncoderModel, transformers.T5Config(**SMALL), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    table = state["shared.weight"]
    for names in (["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        others = {name: tensor for name, tensor in state.items() if tensor.shape != table.shape}
        save_file(others | {name: table for name in names}, file)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.load(tmp_path)[1], params)
