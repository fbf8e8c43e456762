"""PixArt's transformer against diffusers, through folders, both ways."""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from flax import traverse_util
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.checkpoints.names import published
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

SIGMA = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "sample_size": 8,
    "caption_channels": 10,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
CONFIGS = {
    "Sigma": SIGMA,
    "Alpha, with sizes": SIGMA
    | {"sample_size": 128, "use_additional_conditions": None, "interpolation_scale": None},
    "the rest": SIGMA
    | {
        "caption_channels": None,
        "cross_attention_dim": 14,
        "attention_bias": False,
        "in_channels": 3,
        "out_channels": None,
        "patch_size": 1,
        "norm_eps": 1e-3,
        "interpolation_scale": 0.5,
        "num_layers": 1,
    },
}
TIMES = np.array([0.0, 17.5, 980.0], np.float32)


def inputs_for(config, batch, size, seed=0):
    """Random arrays of all that this network takes, the text of example i masked after 6 - 2 i tokens."""
    inputs = {
        "x": images(batch, *size, config.in_channels, seed=seed),
        "t": TIMES[-batch:],
        "encoder_hidden_states": images(batch, 6, config.text_width, seed=seed + 1),
        "encoder_attention_mask": (np.arange(6)[None] < 6 - 2 * np.arange(batch)[:, None]).astype(np.int32),
    }
    if config.has_additional_conditions:
        inputs["resolution"] = np.array([[1024, 768], [32, 48], [7, 9]], np.float32)[:batch]
        inputs["aspect_ratio"] = inputs["resolution"][:, :1] / inputs["resolution"][:, 1:]
    return inputs


def output_of(theirs, inputs):
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    added = {name: inputs.pop(name) for name in ("resolution", "aspect_ratio") if name in inputs}
    with torch.no_grad():
        return theirs(
            to_torch(inputs.pop("x")), timestep=inputs.pop("t"), added_cond_kwargs=added or None, **inputs
        ).sample


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random transformer in diffusers and here, through a folder that diffusers wrote."""
    theirs = randomised(diffusers.PixArtTransformer2DModel(**CONFIGS[request.param]))
    folder = tmp_path_factory.mktemp("pixart")
    theirs.save_pretrained(folder)
    module, params = checkpoints.load(folder)
    assert module.config.scan
    return theirs, module, params, jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))


@pytest.mark.parametrize(("batch", "size"), [(3, (6, 10)), (1, (8, 8))])
def test_agrees_with_diffusers(pair, batch, size):
    """At the size that it was made for without a mask, and at another with one."""
    theirs, module, params, apply = pair
    inputs = inputs_for(module.config, batch, size, seed=batch)
    if batch == 1:
        del inputs["encoder_attention_mask"]
    assert_agrees(apply(params, inputs), output_of(theirs, inputs))


def test_diffusers_opens_what_we_changed_and_saved(pair, tmp_path, caplog, recwarn):
    theirs, module, params, apply = pair
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    rng = np.random.default_rng(0)
    leaves = [leaf + 0.02 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    changed = jax.tree.unflatten(tree, leaves)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    inputs = inputs_for(module.config, 3, (6, 10))
    ours = np.asarray(apply(changed, inputs))
    assert_agrees(ours, output_of(opened, inputs))
    assert np.abs(ours - np.asarray(apply(params, inputs))).max() > 1e-3 * np.abs(ours).max()

    module_again, params_again = checkpoints.load(tmp_path)
    assert module_again == module
    jax.tree.map(np.testing.assert_array_equal, params_again, changed)


@pytest.mark.parametrize("pair", ["Sigma"], indirect=True)
def test_blocks_written_out_hold_the_same_tensors_and_draw_the_same(pair, tmp_path):
    theirs, module, params, _ = pair
    checkpoints.save(tmp_path, module, params)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | {"_scan": False, "_remat": True}))
    written_out, separate = checkpoints.load(tmp_path)
    assert {"transformer_blocks_0", "transformer_blocks_1"} <= set(separate)
    inputs = inputs_for(module.config, 1, (6, 6))
    ours = jax.jit(lambda params: written_out.apply({"params": params}, **inputs))(separate)
    assert_agrees(ours, output_of(theirs, inputs))


@pytest.mark.parametrize("pair", ["Sigma"], indirect=True)
def test_a_masked_token_is_not_looked_at(pair):
    _, module, params, apply = pair
    inputs = inputs_for(module.config, 3, (6, 10))
    padded = inputs["encoder_attention_mask"][:, :, None] == 0
    other = inputs["encoder_hidden_states"] + np.float32(9) * padded
    np.testing.assert_array_equal(
        apply(params, inputs), apply(params, inputs | {"encoder_hidden_states": other})
    )
    everything = inputs | {"encoder_attention_mask": np.ones((3, 6), np.int32)}
    assert not np.allclose(apply(params, everything)[1:], apply(params, inputs)[1:], rtol=1e-3)


@pytest.mark.parametrize("pair", ["Sigma"], indirect=True)
def test_16_bit_parameters_and_arithmetic_stay_near_float32(pair):
    _, module, params, apply = pair
    inputs = inputs_for(module.config, 3, (6, 10))
    exact = np.asarray(apply(params, inputs))
    half = models.from_config(dataclasses.replace(module.config, dtype="bfloat16"))
    halved = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), jax.device_get(params))
    given = inputs | {name: inputs[name].astype("bfloat16") for name in ("x", "encoder_hidden_states")}
    rounded = jax.jit(lambda params, inputs: half.apply({"params": params}, **inputs))(halved, given)
    assert rounded.dtype == "bfloat16" and np.isfinite(rounded).all()
    error = np.abs(np.asarray(rounded, np.float32) - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.08


PRESETS = {"pixart-sigma": 1024, "pixart-sigma-256": 256, "pixart-sigma-512": 512, "pixart-sigma-2k": 2048}


def test_presets_have_the_published_tensors():
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel.from_config(
            models.config_to_dict(models.PRESETS["pixart-sigma"])
        )
    sizes = {
        name: tensor.shape for name, tensor in published(models.shapes(models.build("pixart-sigma"))).items()
    }
    assert sizes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    for name, pixels in PRESETS.items():  # 0.6 B in the paper
        assert models.count_params(name) == 610_856_096
        config = models.PRESETS[name]
        assert config.sample_size == pixels // 8 and config.interpolation_scale == pixels / 512


def test_published_config_files_are_the_presets():
    """As the folder of the 1024-pixel model has it, under the name of a class that diffusers since split."""
    entries = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.28.0.dev0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 72,
        "attention_type": "default",
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
        "double_self_attention": False,
        "dropout": 0.0,
        "in_channels": 4,
        "interpolation_scale": 2,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": 16,
        "num_embeds_ada_norm": 1000,
        "num_layers": 28,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 128,
        "upcast_attention": False,
        "use_additional_conditions": False,
        "use_linear_projection": False,
    }
    assert models.config_from_dict(entries) == models.PRESETS["pixart-sigma"]
    assert models.config_to_dict(models.PRESETS["pixart-sigma"])["_class_name"] == "PixArtTransformer2DModel"
    with pytest.raises(CheckpointError, match=r"norm_type 'layer_norm'; known: .*ada_norm_single"):
        models.config_from_dict(entries | {"norm_type": "layer_norm"})
    with pytest.raises(CheckpointError, match="activation_fn = 'geglu'; only 'gelu-approximate'"):
        models.config_from_dict(entries | {"activation_fn": "geglu"})
    with pytest.raises(CheckpointError, match="unknown key 'kv_compress'"):
        models.config_from_dict(entries | {"kv_compress": True})


def tiny(**overrides):
    return models.build("pixart-sigma", **(SIGMA | overrides))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda params: params.pop("proj_out"), "missing: proj_out.weight"),
        (lambda params: params.update(extra={"kernel": np.zeros((2, 2))}), "left over: extra.weight"),
        (lambda params: params.update(scale_shift_table=np.zeros((2, 7))), "another shape: scale_shift_tab"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, damage, message):
    module = tiny(num_layers=1)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), models.shapes(module))
    damage(params)
    checkpoints.save(tmp_path, module, params)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"sample_size": 9}, InvalidArgumentError, "side of 9"),
        ({"num_layers": 0}, InvalidArgumentError, "num_layers"),
        ({"attention_head_dim": 13}, InvalidArgumentError, "width 26 must be a multiple of 4"),
        ({"cross_attention_dim": 10}, InvalidArgumentError, "must be the width of the projected text"),
        (
            {"attention_head_dim": 10, "cross_attention_dim": 20, "use_additional_conditions": True},
            InvalidArgumentError,
            "width 20 must be a multiple of 3",
        ),
        ({"dtype": "float8"}, UnknownNameError, "float8"),
    ],
)
def test_impossible_configs_are_refused(overrides, error, message):
    with pytest.raises(error, match=message):
        tiny(**overrides)


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        ({}, {"x": images(1, 4, 4, 8)}, "8 channels; this transformer takes 4"),
        ({}, {"x": images(1, 5, 4, 4)}, "5x4 cannot be cut into whole 2x2"),
        ({}, {"encoder_hidden_states": images(1, 3, 16)}, "16 wide; this transformer takes 10"),
        ({}, {"resolution": images(1, 2)}, "resolution given .* without use_additional_conditions"),
        ({"use_additional_conditions": True}, {}, "resolution is missing"),
        (
            {"use_additional_conditions": True},
            {"resolution": images(1, 2), "aspect_ratio": images(1, 2)},
            r"aspect_ratio is \(1, 2\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(overrides, changes, message):
    inputs = {"x": images(1, 4, 4, 4), "t": TIMES[:1], "encoder_hidden_states": images(1, 3, 10)} | changes
    with pytest.raises(InvalidArgumentError, match=message):
        jax.eval_shape(lambda inputs: tiny(**overrides).init(jax.random.key(0), **inputs), inputs)


def test_attention_maps_are_kept_for_whoever_asks():
    module = tiny(scan=False)

    def maps(params, *inputs):
        return module.apply({"params": params}, *inputs, mutable=["intermediates"])[1]["intermediates"]

    shapes = jax.eval_shape(maps, models.shapes(module), images(2, 4, 6, 4), TIMES[:2], images(2, 3, 10))
    found = {
        "/".join(path): kept[0].shape
        for path, kept in traverse_util.flatten_dict(shapes).items()
        if path[-1] == "attention_weights"
    }
    assert found["transformer_blocks_1/attn1/attention_weights"] == (2, 2, 6, 6)
    assert found["transformer_blocks_1/attn2/attention_weights"] == (2, 2, 6, 3)
