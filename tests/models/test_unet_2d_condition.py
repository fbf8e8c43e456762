import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from flax import traverse_util
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models, nn
from jaxldm.checkpoints.names import published_name
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

COMMON = {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 12}
SD1 = COMMON | {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
}
SD2 = SD1 | {"attention_head_dim": (2, 4), "use_linear_projection": True}
SDXL = COMMON | {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
    "upcast_attention": None,
}
CONFIGS = {
    "SD 1.5": SD1,
    "SD 2.1 inpainting": SD2 | {"upcast_attention": True, "in_channels": 9},
    "SDXL": SDXL,
    "SDXL refiner": SDXL
    | {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": 10 + 5 * 4,
    },
    "LCM": SD1 | {"time_cond_proj_dim": 6, "layers_per_block": (1, 2)},
    "instructions, no middle": SD1 | {"in_channels": 8, "mid_block_type": None},
    "other depths on the way up": SD1
    | {
        "layers_per_block": (2, 1),
        "transformer_layers_per_block": ((1, 2), 1),
        "reverse_transformer_layers_per_block": (1, (2, 1, 1)),
    },
    "x4 upscaler": SD2 | {"in_channels": 7, "num_class_embeds": 5, "only_cross_attention": (True, False)},
    "unCLIP": SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "a class behind the time": SD1
    | {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 10,
        "class_embeddings_concat": True,
        "cross_attention_dim": (12, 12),
    },
    "the rest": SD1
    | {
        "class_embed_type": "timestep",
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_dim": 24,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "out_channels": 3,
    },
}
TIMES = np.array([0.0, 17.5, 980.0], np.float32)


def inputs_for(config, batch, size, seed=0):
    """Random arrays of all that this network takes, the text of example i masked after 6 - 2 i tokens."""
    inputs = {
        "x": images(batch, *size, config.in_channels, seed=seed),
        "t": TIMES[-batch:],
        "encoder_hidden_states": images(batch, 6, config.context_dim, seed=seed + 1),
        "encoder_attention_mask": (np.arange(6)[None] < 6 - 2 * np.arange(batch)[:, None]).astype(np.int32),
    }
    if config.addition_embed_type:
        ids = np.array([[1024, 768, 0, 16, 512, 640], [300, 400, 8, 8, 6, 1], [64, 64, 0, 0, 2, 9]])
        count = (config.projection_class_embeddings_input_dim - 10) // config.addition_time_embed_dim
        inputs["text_embeds"] = images(batch, 10, seed=seed + 2)
        inputs["time_ids"] = ids[:batch, :count].astype(np.float32)
    if config.time_cond_proj_dim:
        w = jnp.array([0.0, 6.5, 14.0])[:batch]
        inputs["timestep_cond"] = np.asarray(nn.guidance_embedding(w, config.time_cond_proj_dim))
    if config.class_embed_type in ("projection", "simple_projection"):
        inputs["class_labels"] = images(batch, config.projection_class_embeddings_input_dim, seed=seed + 3)
    elif config.has_classes:
        inputs["class_labels"] = np.array([4, 0, 2])[:batch]
    return inputs


def output_of(theirs, inputs):
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    x, t = to_torch(inputs.pop("x")), inputs.pop("t")
    with torch.no_grad():
        return theirs(x, t, **inputs, added_cond_kwargs=added or None).sample


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random U-Net in diffusers and here, through a folder that diffusers wrote, compiled here."""
    theirs = randomised(diffusers.UNet2DConditionModel(**CONFIGS[request.param]))
    folder = tmp_path_factory.mktemp("unet")
    theirs.save_pretrained(folder)
    module, params = checkpoints.load(folder)
    return theirs, module, params, jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))


def odd_inputs(module):
    inputs = inputs_for(module.config, 3, (7, 5))
    if True in np.atleast_1d(module.config.only_cross_attention):
        inputs["encoder_attention_mask"][:] = 1  # diffusers masks one of the two attentions only, see below
    return inputs


def test_agrees_with_diffusers(pair):
    theirs, module, params, apply = pair
    inputs = odd_inputs(module)
    assert_agrees(apply(params, inputs), output_of(theirs, inputs))


@pytest.mark.parametrize("pair", ["SD 1.5"], indirect=True)
def test_agrees_with_diffusers_on_one_image_without_a_mask(pair):
    theirs, module, params, apply = pair
    inputs = inputs_for(module.config, 1, (8, 4), seed=7)
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
    inputs = odd_inputs(module)
    ours = apply(changed, inputs)
    assert_agrees(ours, output_of(opened, inputs))
    assert np.abs(np.asarray(ours) - np.asarray(apply(params, inputs))).max() > 1e-3 * np.abs(ours).max()

    module_again, params_again = checkpoints.load(tmp_path)
    assert module_again == module
    jax.tree.map(np.testing.assert_array_equal, params_again, changed)


@pytest.mark.parametrize("pair", ["x4 upscaler"], indirect=True)
def test_a_masked_token_is_seen_by_no_attention(pair):
    """Also not by the first attention of a block that looks at the text twice: diffusers masks the second."""
    _, module, params, apply = pair
    inputs = inputs_for(module.config, 3, (7, 5))
    padded = inputs["encoder_attention_mask"][:, :, None] == 0
    other = inputs | {"encoder_hidden_states": np.where(padded, 9.0, inputs["encoder_hidden_states"])}
    other["encoder_hidden_states"] = other["encoder_hidden_states"].astype(np.float32)
    np.testing.assert_array_equal(apply(params, inputs), apply(params, other))
    everything = inputs | {"encoder_attention_mask": np.ones((3, 6), np.int32)}
    assert not np.allclose(apply(params, everything)[1:], apply(params, inputs)[1:], rtol=1e-3)


def tiny(**overrides):
    fields = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    }
    return models.build("sd15-unet", **(SD1 | fields | overrides))


def test_16_bit_parameters_and_arithmetic_stay_near_float32():
    text_time = {name: value for name, value in SDXL.items() if name.startswith(("addition", "projection"))}
    module = tiny(**text_time)
    params = jax.device_get(models.init(module, jax.random.key(0)))
    inputs = inputs_for(module.config, 2, (4, 4))
    exact = jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))(params, inputs)
    for dtype, tolerance in (("bfloat16", 0.08), ("float16", 0.01)):
        half = tiny(**text_time, dtype=dtype)
        halved = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), (params, inputs))
        halved[1].update({name: inputs[name] for name in ("t", "time_ids")})
        rounded = jax.jit(lambda params, inputs, half=half: half.apply({"params": params}, **inputs))(*halved)
        assert rounded.dtype == dtype and np.isfinite(rounded).all()
        error = np.abs(np.asarray(rounded, np.float32) - exact).max() / np.abs(exact).max()
        assert 0 < error < tolerance


def test_large_activations_do_not_overflow_in_float16():
    """Logits of 1e6 and more: float16 ends at 65504, and SD 2.1's exceed it, hence its upcast_attention."""
    module = nn.CrossAttention(num_heads=1, dtype="float16")
    x = 100 * images(1, 4, 16)
    params = jax.device_get(jax.jit(module.init)(jax.random.key(0), x))
    params = jax.tree.map(lambda leaf: 20 * leaf, params)
    _, kept = jax.jit(lambda params: module.apply(params, x, mutable=["intermediates"]))(params)
    (weights,) = kept["intermediates"]["attention_weights"]
    assert np.isfinite(weights).all() and weights.max() > 0.999


def test_remat_changes_no_gradient():
    x, temb, text = images(1, 4, 4, 8), images(1, 5), images(1, 3, 12)
    options = {"out_channels": 8, "num_layers": 1, "num_groups": 4, "add_downsample": False}
    plain, again = (
        nn.DownBlock2D(**options, transformer=nn.TransformerOptions(2), remat=remat)
        for remat in (False, True)
    )
    params = jax.jit(plain.init, static_argnums=3)(jax.random.key(0), x, temb, False, text)

    def gradient(block):
        return jax.grad(lambda x: jnp.square(block.apply(params, x, temb, False, text)[0]).mean())

    assert "remat" not in str(jax.make_jaxpr(gradient(plain))(x))
    expected, ours = (jax.jit(gradient(block))(x) for block in (plain, again))
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
    module = tiny(mid_block_type="UNetMidBlock2DCrossAttn", remat=True)
    arrays = (images(1, 4, 4, 4), TIMES[:1], text)
    equations = str(jax.make_jaxpr(module.apply)({"params": models.shapes(module)}, *arrays))
    assert equations.count("remat") == 4 + 2 * 2 + 1  # residual blocks and transformers of all levels


def test_attention_maps_are_kept_for_whoever_asks():
    module = tiny(mid_block_type="UNetMidBlock2DCrossAttn")

    def maps(params, x, t, text):
        return module.apply({"params": params}, x, t, text, mutable=["intermediates"])[1]["intermediates"]

    shapes = jax.eval_shape(maps, models.shapes(module), images(2, 4, 6, 4), TIMES[:2], images(2, 3, 12))
    found = {
        "/".join(path): kept[0].shape
        for path, kept in traverse_util.flatten_dict(shapes).items()
        if path[-1] == "attention_weights"
    }
    block = "mid_block/attentions_0/transformer_blocks_0"
    assert found[f"{block}/attn1/attention_weights"] == (2, 2, 24, 24)
    assert found[f"{block}/attn2/attention_weights"] == (2, 2, 24, 3)
    assert len(found) == 2 * 4


# Counted in the published weights (SD 1.5: 860 M, SD 2: 866 M, SDXL: 2.6 B, as in their papers and cards).
PUBLISHED = {
    "sd15-unet": 859_520_964,
    "sd20-unet": 865_910_724,
    "sdxl-unet": 2_567_463_684,
    "sdxl-refiner-unet": 2_259_526_660,
    "lcm-unet": 859_602_884,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_tensors(preset):
    shapes = traverse_util.flatten_dict(models.shapes(models.build(preset)))
    assert sum(leaf.size for leaf in shapes.values()) == PUBLISHED[preset]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(models.config_to_dict(models.PRESETS[preset]))
    sizes = {published_name(path): leaf.size for path, leaf in shapes.items()}
    assert sizes == {name: tensor.numel() for name, tensor in theirs.state_dict().items()}


def test_presets_that_differ_in_their_weights_alone():
    presets = models.PRESETS
    assert presets["playground-unet"] == presets["sdxl-unet"]
    assert presets["sd21-unet"] == dataclasses.replace(presets["sd20-unet"], upcast_attention=True)


def test_published_config_files_are_the_presets():
    old = {  # as of diffusers 0.6
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    assert models.config_from_dict(old) == models.PRESETS["sd15-unet"]
    with torch.device("meta"):
        new = diffusers.UNet2DConditionModel.from_config(models.config_to_dict(models.PRESETS["sdxl-unet"]))
    entries = dict(new.config)  # every key that diffusers writes now
    assert {"addition_embed_type_num_heads", "resnet_out_scale_factor", "conv_in_kernel"} <= set(entries)
    entries = {key: list(value) if isinstance(value, tuple) else value for key, value in entries.items()}
    entries["_class_name"] = "UNet2DConditionModel"
    assert models.config_from_dict(entries) == models.PRESETS["sdxl-unet"]
    with pytest.raises(CheckpointError, match="dual_cross_attention = True; only False"):
        models.config_from_dict(old | {"dual_cross_attention": True})
    with pytest.raises(CheckpointError, match="unknown up_block_types 'UpBlock2D': choose one of KUpBlock2D"):
        models.config_from_dict(old | {"down_block_types": ["KCrossAttnDownBlock2D"] * 4})


def test_our_own_fields_survive_the_folder():
    config = dataclasses.replace(models.PRESETS["sdxl-unet"], dtype="bfloat16", remat=True)
    entries = models.config_to_dict(config)
    assert entries["_remat"] is True and "remat" not in entries
    assert models.config_from_dict(entries) == config


def test_guidance_embedding_is_that_of_lcm():
    w = np.array([0.0, 1.5, 7.0], np.float32)
    reference = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for dim in (256, 9):
        expected = reference(None, torch.from_numpy(w), embedding_dim=dim).numpy()
        np.testing.assert_allclose(nn.guidance_embedding(w, dim), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ({"attention_head_dim": (2, 2, 2)}, InvalidArgumentError),
        ({"transformer_layers_per_block": ((1, 2),)}, InvalidArgumentError),
        ({"reverse_transformer_layers_per_block": ((1,),)}, InvalidArgumentError),
        ({"reverse_transformer_layers_per_block": (1, 1)}, InvalidArgumentError),
        ({"block_out_channels": (10,)}, InvalidArgumentError),
        ({"up_block_types": ("AttnUpBlock2D",)}, UnknownNameError),
        ({"mid_block_type": "UNetMidBlock2D"}, UnknownNameError),
        ({"addition_embed_type": "text_time"}, InvalidArgumentError),
        ({"addition_embed_type": "image"}, UnknownNameError),
        ({"class_embed_type": "identity"}, UnknownNameError),
        ({"class_embed_type": "projection"}, InvalidArgumentError),
        ({"class_embeddings_concat": True}, InvalidArgumentError),
        ({"cross_attention_dim": (768, 1024)}, InvalidArgumentError),
        ({"resnet_time_scale_shift": "spatial"}, UnknownNameError),
        ({"downsample_padding": 2}, InvalidArgumentError),
    ],
)
def test_impossible_configs_are_refused(overrides, error):
    with pytest.raises(error):
        tiny(**overrides)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SD1, {"x": images(1, 4, 4, 9)}, "9 channels; this U-Net takes 4"),
        (SD1, {"encoder_hidden_states": images(1, 3, 16)}, "16 wide; this U-Net takes 12"),
        (SD1, {"text_embeds": images(1, 10)}, "text_embeds given to a U-Net that has no addition_embed_type"),
        (SD1, {"timestep_cond": images(1, 256)}, "timestep_cond given .* no time_cond_proj_dim"),
        (SD1, {"class_labels": np.zeros(1, int)}, "class_labels given .* no class_embed_type"),
        (SD1 | {"attention_head_dim": 3}, {}, "8 channels cannot be split into 3 heads"),
        (SD1 | {"downsample_padding": 0}, {"x": images(1, 7, 4, 4)}, "3x2 .* cannot be doubled to 7x4"),
        (SDXL, {}, "needs text_embeds"),
        (SDXL, {"text_embeds": images(1, 10)}, "needs time_ids"),
        (
            SDXL,
            {"text_embeds": images(1, 10), "time_ids": images(1, 5)},
            "10 wide and 5 time_ids .* takes 34",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(config, changes, message):
    module = models.from_config(models.UNet2DConditionConfig(**config))
    inputs = {"x": images(1, 4, 4, 4), "t": TIMES[:1], "encoder_hidden_states": images(1, 3, 12)} | changes
    with pytest.raises(InvalidArgumentError, match=message):
        jax.eval_shape(lambda inputs: module.init(jax.random.key(0), **inputs), inputs)
