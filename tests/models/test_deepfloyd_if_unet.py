"""The U-Nets of DeepFloyd IF compared with diffusers, through folders that diffusers wrote."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from flax import traverse_util
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.checkpoints.names import published_name
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.nn.added_kv_attention import AddedKVAttention, AddedKVOptions

STAGE_1 = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (8, 16),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "norm_eps": 1e-3,
    "act_fn": "gelu",
    "cross_attention_dim": 32,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 8,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 3,
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm",
}
STAGE_2 = STAGE_1 | {
    "in_channels": 6,
    "block_out_channels": (8, 8, 16),
    "down_block_types": (*("ResnetDownsampleBlock2D",) * 2, "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", *("ResnetUpsampleBlock2D",) * 2),
    "layers_per_block": (1, 1, 2),
    "mid_block_scale_factor": 1 / 0.7071,
    "mid_block_only_cross_attention": True,
    "class_embed_type": "timestep",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "time_embedding_dim": 24,
    "time_embedding_act_fn": "gelu",
}
CONFIGS = {
    "stage I": STAGE_1,
    "stage II": STAGE_2,
    "text alone, among other blocks": STAGE_1
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "mid_block_scale_factor": 2.0,
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        "only_cross_attention": True,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "addition_embed_type_num_heads": 4,
        "cross_attention_norm": None,
        "act_fn": "silu",
        "resnet_time_scale_shift": "default",
    },
}


def inputs_for(config, batch, size, seed=0):
    inputs = {
        "x": images(batch, *size, config.in_channels, seed=seed),
        "t": np.array([0.0, 17.5, 980.0], np.float32)[-batch:],
        "encoder_hidden_states": images(batch, 6, config.text_dim, seed=seed + 1),
    }
    if config.has_classes:
        inputs["class_labels"] = np.array([250, 0, 999])[:batch]
    return inputs


def odd_inputs(config):
    """Stage II: one image, 3x1 on the lowest level. The others: three, 3x5 pixels; stage I with a mask."""
    if config.has_classes:
        return inputs_for(config, 1, (12, 4))
    inputs = inputs_for(config, 3, (6, 10))
    if config.cross_attention_norm is not None:
        inputs["encoder_attention_mask"] = np.array([[1, 1, 0, 1, 0, 0], [1] * 6, [0, 1] * 3], np.int32)
    return inputs


def output_of(theirs, inputs):
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    with torch.no_grad():
        return theirs(to_torch(inputs.pop("x")), inputs.pop("t"), **inputs).sample


def compiled(module):
    return jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random U-Net in diffusers and here, through a folder that diffusers wrote, compiled here."""
    theirs = randomised(diffusers.UNet2DConditionModel(**CONFIGS[request.param]))
    folder = tmp_path_factory.mktemp("unet")
    theirs.save_pretrained(folder)
    module, params = checkpoints.load(folder)
    return theirs, module, params, compiled(module)


def test_agrees_with_diffusers(pair):
    theirs, module, params, apply = pair
    inputs = odd_inputs(module.config)
    ours = apply(params, inputs)
    assert_agrees(ours, output_of(theirs, inputs))
    if "encoder_attention_mask" in inputs:
        inputs["encoder_attention_mask"] = np.ones((3, 6), np.int32)
        moved = np.abs(ours - apply(params, inputs)).max((1, 2, 3))
        assert moved[1] == 0 and min(moved[0], moved[2]) > 1e-3 * np.abs(ours).max()


def test_a_mask_where_pixels_look_at_the_text_alone():
    """A masked token has no effect; diffusers fails: it counts the pixels among the keys."""
    block = AddedKVAttention(AddedKVOptions(head_dim=4, only_cross_attention=True), num_groups=4)
    x, text = images(2, 3, 4, 8), images(2, 6, 12)
    params = block.init(jax.random.key(0), x, text)
    masked = block.apply(params, x, text, np.array([[1, 1, 1, 1, 0, 0]] * 2))
    np.testing.assert_allclose(masked, block.apply(params, x, text[:, :4]), atol=1e-6)
    assert np.abs(masked - block.apply(params, x, text)).max() > 1e-3
    theirs = diffusers.UNet2DConditionModel(**STAGE_1 | {"only_cross_attention": True})
    inputs = inputs_for(models.UNet2DConditionConfig(**STAGE_1), 2, (4, 4))
    with pytest.raises(RuntimeError):
        output_of(theirs, inputs | {"encoder_attention_mask": np.ones((2, 6), np.int32)})


@pytest.mark.parametrize("pair", ["stage I", "stage II"], indirect=True)
def test_diffusers_opens_what_we_changed_and_saved(pair, tmp_path, caplog, recwarn):
    theirs, module, params, apply = pair
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    rng = np.random.default_rng(0)
    leaves = [leaf + 0.02 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    changed = jax.tree.unflatten(tree, leaves)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    inputs = odd_inputs(module.config)
    ours = apply(changed, inputs)
    assert_agrees(ours, output_of(opened, inputs))
    assert np.abs(np.asarray(ours) - np.asarray(apply(params, inputs))).max() > 1e-3 * np.abs(ours).max()

    module_again, params_again = checkpoints.load(tmp_path)
    assert module_again == module
    jax.tree.map(np.testing.assert_array_equal, params_again, changed)


def test_16_bit_parameters_and_arithmetic_stay_near_float32():
    one_level = {
        "block_out_channels": (8,),
        "down_block_types": ("SimpleCrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("ResnetUpsampleBlock2D",),
        "layers_per_block": 1,
    }
    config = models.UNet2DConditionConfig(**STAGE_2 | one_level)
    module, half = (
        models.from_config(dataclasses.replace(config, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    params, inputs = models.init(module, jax.random.key(0)), inputs_for(config, 3, (4, 2))
    exact = compiled(module)(params, inputs)
    halved = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), jax.device_get(params))
    floats = {name: inputs[name].astype("bfloat16") for name in ("x", "encoder_hidden_states")}
    rounded = compiled(half)(halved, inputs | floats)
    assert rounded.dtype == "bfloat16" and np.isfinite(rounded).all()
    error = np.abs(np.asarray(rounded, np.float32) - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.1


def test_remat_keeps_nothing_inside_blocks():
    module = models.from_config(models.UNet2DConditionConfig(**STAGE_1, remat=True))
    inputs = inputs_for(module.config, 1, (4, 4))
    equations = str(jax.make_jaxpr(compiled(module))(models.shapes(module), inputs))
    changes_of_size, residual_blocks, attentions = 2, 1 + 1 + 2 + 2 + 2, 1 + 1 + 2
    assert equations.count("remat") == changes_of_size + residual_blocks + attentions


# According to their model cards 4.3 B, 900 M and 400 M; 1.2 B and 450 M.
NUMBERS = {
    "if-i-xl": 4_304_695_110,
    "if-i-l": 935_365_830,
    "if-i-m": 371_605_830,
    "if-ii-l": 1_243_277_190,
    "if-ii-m": 482_483_334,
}


@pytest.mark.parametrize("preset", NUMBERS)
def test_presets_have_the_tensors_of_the_reference(preset):
    shapes = traverse_util.flatten_dict(models.shapes(models.build(preset)))
    assert sum(leaf.size for leaf in shapes.values()) == NUMBERS[preset]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(models.config_to_dict(models.PRESETS[preset]))
    sizes = {published_name(path): leaf.size for path, leaf in shapes.items()}
    assert sizes == {name: tensor.numel() for name, tensor in theirs.state_dict().items()}


IF_I_XL = {  # as of diffusers 0.19
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_head_dim": 64,
    "block_out_channels": [704, 1408, 2112, 2816],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2816,
    "cross_attention_norm": "group_norm",
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 3,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 6,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": False,
}
IF_II_L = {  # where it differs
    "block_out_channels": [160, 320, 640, 960, 1280],
    "class_embed_type": "timestep",
    "cross_attention_dim": 1280,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
    "in_channels": 6,
    "layers_per_block": [2, 2, 3, 5, 5],
    "mid_block_scale_factor": 1.4142271248762552,
    "resnet_out_scale_factor": 1.4142271248762552,
    "resnet_skip_time_act": True,
    "sample_size": 256,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 1280,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
}


def test_published_config_files_are_the_presets():
    assert models.config_from_dict(IF_I_XL) == models.PRESETS["if-i-xl"]
    assert models.config_from_dict(IF_I_XL | IF_II_L) == models.PRESETS["if-ii-l"]
    with pytest.raises(CheckpointError, match="text_image_proj"):
        models.config_from_dict(IF_I_XL | {"encoder_hid_dim_type": "text_image_proj"})


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ({"attention_head_dim": (8, 4)}, InvalidArgumentError),
        ({"act_fn": "mish"}, UnknownNameError),
        ({"time_embedding_act_fn": "swiglu"}, UnknownNameError),
        ({"cross_attention_norm": "layer_norm"}, UnknownNameError),
        ({"encoder_hid_dim": None}, InvalidArgumentError),
        ({"encoder_hid_dim_type": "image_proj"}, UnknownNameError),
        ({"up_block_types": ("UpBlock2D",) * 2, "resnet_skip_time_act": True}, InvalidArgumentError),
        ({"mid_block_type": "UNetMidBlock2D"}, UnknownNameError),
    ],
)
def test_impossible_configs_are_refused(overrides, error):
    with pytest.raises(error):
        models.UNet2DConditionConfig(**STAGE_1 | overrides)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"x": images(1, 6, 7, 3)}, "6x7; .* multiples of 2"),
        ({}, {"encoder_hidden_states": images(1, 3, 32)}, "32 wide; this U-Net takes 24"),
        ({}, {"text_embeds": images(1, 10)}, "text_embeds given"),
        ({"class_embed_type": "timestep"}, {}, "needs class_labels"),
        ({"attention_head_dim": 5}, {}, "16 channels cannot be split into heads of 5"),
        ({"cross_attention_dim": 24}, {}, "24 wide cannot be normalised in 32 groups"),
        ({"addition_embed_type_num_heads": 64}, {}, "24 wide cannot be split into the 64 heads"),
    ],
)
def test_inputs_that_do_not_fit_are_named(config, changes, message):
    module = models.from_config(models.UNet2DConditionConfig(**STAGE_1 | config))
    inputs = {"x": images(1, 6, 6, 3), "t": np.zeros(1, np.float32)}
    inputs |= {"encoder_hidden_states": images(1, 3, 24)} | changes
    with pytest.raises(InvalidArgumentError, match=message):
        jax.eval_shape(lambda inputs: module.init(jax.random.key(0), **inputs), inputs)
