import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

CONFIGS = {
    "learned variance, blocks in a scan": {
        "num_layers": 3,
        "out_channels": 6,
        "sample_size": 6,
        "norm_eps": 1e-5,
    },
    "odd sides, written-out blocks": {
        "num_layers": 2,
        "sample_size": 5,
        "patch_size": 1,
        "attention_bias": False,
        "_scan": False,
    },
}


def reference(**fields):
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_embeds_ada_norm": 5}
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    return randomised(diffusers.DiTTransformer2DModel(**(small | fields)))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The reference and ours, every block with embedders of its own."""
    fields, folder = CONFIGS[request.param], tmp_path_factory.mktemp("dit")
    theirs = reference(**fields)
    theirs.save_pretrained(folder)
    if "_scan" in fields:
        entries = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(entries | {"_scan": fields["_scan"]}))
    module, params = checkpoints.load(folder)
    return theirs, module, params, jax.jit(lambda p, *x: module.apply({"params": p}, *x))


def answers(theirs, x, t, labels):
    with torch.no_grad():
        return theirs(to_torch(x), torch.from_numpy(t), torch.from_numpy(labels)).sample


def inputs(module, batch=3, side=None):
    side = side or module.config.sample_size
    t = np.array([0.0, 17.5, 980.0], np.float32)[:batch]
    return images(batch, side, side, 3), t, np.array([3, 5, 0])[:batch]


def test_agrees_with_diffusers(pair):
    theirs, module, params, apply = pair
    given = inputs(module)
    assert_agrees(apply(params, *given), answers(theirs, *given))
    stacked = any(name.startswith("transformer_blocks_1to") for name in params)
    assert stacked == module.config.scan


@pytest.mark.parametrize("pair", ["learned variance, blocks in a scan"], indirect=True)
def test_positions_are_stretched_to_other_sides(pair):
    theirs, module, params, apply = pair
    given = inputs(module, batch=1, side=8)
    assert_agrees(apply(params, *given), answers(theirs, *given))


def test_diffusers_opens_what_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params, apply = pair
    params = jax.tree.map(
        lambda leaf: leaf + 0.01 * np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape),
        jax.device_get(params),
    )
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    given = inputs(module)
    assert_agrees(apply(params, *given), answers(opened, *given))
    again_module, again = checkpoints.load(tmp_path)
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("pair", ["odd sides, written-out blocks"], indirect=True)
def test_without_labels_it_is_the_null_class(pair):
    _, module, params, apply = pair
    x, t, _ = inputs(module)
    np.testing.assert_array_equal(apply(params, x, t, None), apply(params, x, t, np.full(3, 5)))


@pytest.mark.parametrize("pair", ["odd sides, written-out blocks"], indirect=True)
def test_bfloat16_stays_near_float32(pair):
    _, module, params, apply = pair
    low = models.from_config(dataclasses.replace(module.config, dtype="bfloat16"))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax.device_get(params))
    given = inputs(module)
    exact, rounded = apply(params, *given), jax.jit(low.apply)({"params": half}, *given)
    assert rounded.dtype == jnp.float32 and np.isfinite(rounded).all()
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


PUBLISHED = {  # transformer/config.json of DiT-XL/2, of the class that diffusers had at that time
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}


def test_the_published_config_is_read_and_counted():
    config = models.config_from_dict(PUBLISHED)
    assert config == models.DiTTransformer2DConfig(out_channels=8)
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel(out_channels=8)
    count = models.count_params(models.from_config(config))
    assert count == sum(p.numel() for p in theirs.parameters())
    repeated = 27 * (257 * 1152 + 1153 * 1152 + 1001 * 1152)
    assert count - repeated == models.count_params("dit-xl-2") == 674_834_720


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"norm_type": "ada_norm"}, "norm_type"),
        ({"cross_attention_dim": 768}, "cross_attention_dim"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm must be a whole number, not None"),
        ({"patch_size": 3}, "patches of 3"),
        ({"activation_fn": "relu"}, "gelu-approximate"),
        ({"num_layers": 0}, "num_layers"),
        ({"heads": 3}, "unknown key 'heads'"),
    ],
)
def test_configs_that_cannot_be(wrong, words):
    with pytest.raises(CheckpointError, match=words):
        models.config_from_dict(PUBLISHED | wrong)


def test_inputs_that_do_not_fit():
    module = models.DiTTransformer2DModel(models.DiTTransformer2DConfig(num_layers=1))
    shapes, t = models.shapes(module), np.zeros(1, np.float32)
    for shape, words in (((1, 8, 8, 3), "3 channels"), ((1, 7, 8, 4), "7x8")):
        with pytest.raises(InvalidArgumentError, match=words):
            jax.eval_shape(module.apply, {"params": shapes}, np.zeros(shape, np.float32), t)


def test_weights_that_do_not_fit(tmp_path):
    reference(num_layers=1).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | {"num_layers": 2, "in_channels": 4}))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(tmp_path)
    assert "missing: transformer_blocks.1." in str(caught.value)
    assert "pos_embed.proj.weight is (16, 3, 2, 2) in the file, (16, 4, 2, 2) in the model" in str(
        caught.value
    )
