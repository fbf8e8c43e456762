"""The U-ViT of aMUSEd against that of diffusers."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised
from transformers_reference import perturbed

from jaxldm import checkpoints, models
from jaxldm.checkpoints import names
from jaxldm.errors import CheckpointError, InvalidArgumentError

TINY = {
    "hidden_size": 24,
    "cond_embed_dim": 10,
    "micro_cond_encode_dim": 4,
    "micro_cond_embed_dim": 20,
    "encoder_hidden_size": 18,
    "vocab_size": 24,
    "codebook_size": 20,
    "in_channels": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "block_num_heads": 2,
    "intermediate_size": 40,
    "sample_size": 6,
}
# Where the convolutions are as wide as the transformer the text goes to both of them as it is.
CONFIGS = {
    "256": TINY | {"block_out_channels": 16, "num_res_blocks": 1},
    "512": TINY | {"block_out_channels": 24, "num_res_blocks": 2, "downsample": True, "upsample": True},
}


def inputs(batch, height, width, seed=0):
    tokens = np.random.default_rng(seed).integers(0, TINY["vocab_size"], (batch, height, width), np.int32)
    micro = np.tile(np.float32([96, 64, 5, 3, 6]), (batch, 1)) + np.arange(batch, dtype=np.float32)[:, None]
    return tokens, images(batch, 7, 18, seed=seed), images(batch, 10, seed=seed + 1), micro


def reference_logits(theirs, tokens, states, pooled, micro):
    rest = [torch.from_numpy(array) for array in (states, pooled, micro)]
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens).long(), *rest)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    theirs = randomised(diffusers.UVit2DModel(**CONFIGS[request.param]))
    folder = tmp_path_factory.mktemp("uvit")
    theirs.save_pretrained(folder)
    module, params = checkpoints.load(folder)
    if module.config.downsample:  # the layers written out, and computed twice in training
        module = models.from_config(dataclasses.replace(module.config, scan=False, remat=True))
        params = checkpoints.from_state_dict(checkpoints.to_state_dict(params), models.shapes(module))
    return theirs, module, params, jax.jit(lambda params, *args: module.apply({"params": params}, *args))


def test_logits_agree_with_diffusers(pair):
    """Of three images, and in the next test of one."""
    theirs, module, params, apply = pair
    shape = (3, 2, 8) if module.config.downsample else (3, 5, 3)
    given = inputs(*shape)
    ours = apply(params, *given)
    assert ours.dtype == jnp.float32 and ours.shape == (*shape, 20)
    assert_agrees(ours, reference_logits(theirs, *given))


def test_diffusers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params, apply = pair
    params = perturbed(params)
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    assert {k: v for k, v in opened.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    given = inputs(1, 6, 4, seed=3)
    assert_agrees(apply(params, *given), reference_logits(opened, *given))
    again_module, again = checkpoints.load(tmp_path)
    assert again_module == module
    assert ("transformer_layers_0to2" in again) == module.config.scan
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("pair", ["256"], indirect=True)
def test_sixteen_bits_stay_near_float32(pair):
    _, module, params, apply = pair
    low = models.from_config(dataclasses.replace(module.config, dtype="bfloat16"))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax.device_get(params))
    given = inputs(3, 5, 3)
    rounded, expected = jax.jit(low.apply)({"params": half}, *given), apply(params, *given)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - expected).max() < 0.1 * np.abs(expected).max()


PUBLISHED_COUNTS = {"amused-256": 603, "amused-512": 608}  # millions


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_presets_have_the_published_parameters(name):
    config = models.config_to_dict(models.PRESETS[name])
    with torch.device("meta"):
        theirs = diffusers.UVit2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    count = models.count_params(name)
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count // 10**6 == PUBLISHED_COUNTS[name]
    shapes = names.published(models.shapes(models.build(name)))
    assert {key: tensor.shape for key, tensor in shapes.items()} == {
        key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()
    }


def test_inputs_that_do_not_fit():
    module = models.from_config(models.UVit2DConfig(**CONFIGS["512"]))
    tokens, states, pooled, micro = inputs(1, 4, 4)
    ask = jax.eval_shape
    params = models.shapes(module)
    for given, words in (
        ((tokens, states[..., :9], pooled, micro), "encoder_hidden_states are 9 wide.* takes 18"),
        ((tokens, states, pooled[:, :4], micro), "pooled_text_emb is 4 wide"),
        ((tokens, states, pooled, micro[:, :3]), "micro_conds are 3 wide.* takes 5"),
        ((tokens[:, :3], states, pooled, micro), "3x4 tokens cannot be halved"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            ask(module.apply, {"params": params}, *given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"upsample": True}, "must be equal"),
        ({"codebook_size": 25}, "must hold the 25 tokens"),
        ({"num_attention_heads": 5}, "24 cannot be split into 5 heads"),
        ({"block_num_heads": 5}, "16 cannot be split into 5 heads"),
        ({"micro_cond_embed_dim": 21}, "multiple of micro_cond_encode_dim"),
        ({"use_bias": True}, "use_bias = True; only False"),
        ({"num_layers": 3}, "unknown key 'num_layers'"),
    ],
)
def test_configs_that_cannot_be(changes, words):
    entries = models.config_to_dict(models.UVit2DConfig(**CONFIGS["256"]))
    with pytest.raises(CheckpointError, match=words):
        models.config_from_dict(entries | changes)


def test_tensors_that_do_not_fit(pair):
    *_, params, _ = pair
    state = checkpoints.to_state_dict(params)
    name = "transformer_layers.1.norm1.norm.weight"
    for wrong, words in (
        ({key: value for key, value in state.items() if key != name}, f"missing: {name}"),
        (state | {"extra.weight": np.zeros(3)}, "left over: extra.weight"),
        (state | {name: state[name][:-1]}, f"another shape: {name}"),
    ):
        with pytest.raises(CheckpointError, match=words):
            checkpoints.from_state_dict(wrong, params)
