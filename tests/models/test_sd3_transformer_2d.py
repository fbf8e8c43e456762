import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers_reference import opened_by_diffusers
from flax import traverse_util
from torch_reference import assert_agrees, images, randomised, to_torch
from transformers_reference import perturbed

from jaxldm import checkpoints, models
from jaxldm.checkpoints.names import published
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.models import sd3_transformer_2d

COMMON = {
    "sample_size": 12,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}
CONFIGS = {
    "SD 3": COMMON | {"num_layers": 3},
    "SD 3.5 medium": COMMON | {"num_layers": 5, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "SD 3.5 medium, written out": COMMON
    | {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm", "_scan": False},
    "dual to the last": COMMON
    | {"num_layers": 1, "dual_attention_layers": (0,), "out_channels": None, "patch_size": 1}
    | {"pos_embed_max_size": 11},
}
TIMES = np.array([0.0, 17.5, 980.0], np.float32)


def inputs_for(config, batch, size, seed=0):
    return {
        "x": images(batch, *size, config.in_channels, seed=seed),
        "t": TIMES[-batch:],
        "encoder_hidden_states": images(batch, 5, config.joint_attention_dim, seed=seed + 1),
        "pooled_projections": images(batch, config.pooled_projection_dim, seed=seed + 2),
    }


def output_of(theirs, inputs):
    x, t, text, pooled = inputs.values()
    with torch.no_grad():
        return theirs(to_torch(x), *map(torch.from_numpy, (text, pooled, t))).sample


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same random network in diffusers and here, through a folder that diffusers wrote."""
    own = {key: value for key, value in CONFIGS[request.param].items() if key.startswith("_")}
    fields = {key: value for key, value in CONFIGS[request.param].items() if key not in own}
    theirs = randomised(diffusers.SD3Transformer2DModel(**fields))
    folder = tmp_path_factory.mktemp("mmdit")
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | own))
    module, params = checkpoints.load(folder)
    return theirs, module, params, jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))


def test_agrees_with_diffusers(pair):
    theirs, module, params, apply = pair
    inputs = inputs_for(module.config, 3, (6, 10))
    assert_agrees(apply(params, inputs), output_of(theirs, inputs))


def test_diffusers_opens_what_we_changed_and_saved(pair, tmp_path, caplog, recwarn):
    theirs, module, params, apply = pair
    changed = perturbed(params)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    inputs = inputs_for(module.config, 3, (6, 10), seed=5)
    assert_agrees(apply(changed, inputs), output_of(opened, inputs))
    module_again, params_again = checkpoints.load(tmp_path)
    assert module_again == module
    jax.tree.map(np.testing.assert_array_equal, params_again, changed)


@pytest.mark.parametrize("pair", ["dual to the last"], indirect=True)
def test_one_image_in_bfloat16_stays_near_float32(pair):
    theirs, module, params, _ = pair
    inputs = inputs_for(module.config, 1, (4, 6))
    half = models.from_config(dataclasses.replace(module.config, dtype="bfloat16"))
    lower = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), jax.device_get(params))
    rounded = jax.jit(lambda params, inputs: half.apply({"params": params}, **inputs))(lower, inputs)
    expected = output_of(theirs, inputs).numpy().transpose(0, 2, 3, 1)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - expected).max() < 0.1 * np.abs(expected).max()


def test_no_gradient_reaches_the_positions():
    embed = sd3_transformer_2d.PatchEmbed(models.SD3Transformer2DConfig(**CONFIGS["SD 3"]))
    x = images(1, 4, 4, 4)
    params = embed.init(jax.random.key(0), x)["params"]
    gradient = jax.grad(lambda params: (embed.apply({"params": params}, x) ** 2).sum())(params)
    assert gradient["proj"]["bias"].any() and not gradient["pos_embed"].any()


def test_remat_reaches_every_run_of_blocks():
    for remat in (False, True):
        module = models.from_config(models.SD3Transformer2DConfig(**CONFIGS["SD 3"], remat=remat))
        shapes, inputs = models.shapes(module), inputs_for(module.config, 1, (4, 4))
        equations = str(jax.make_jaxpr(lambda p, x, m=module: m.apply({"params": p}, **x))(shapes, inputs))
        assert equations.count("remat") == 2 * remat


def test_fresh_networks_have_the_positions_of_diffusers_and_predict_nothing():
    config = models.SD3Transformer2DConfig(**CONFIGS["SD 3"] | {"num_layers": 1})
    module = models.from_config(config)
    params = models.init(module, jax.random.key(0))
    expected = get_2d_sincos_pos_embed(16, 8, base_size=6, output_type="pt").numpy()
    np.testing.assert_allclose(params["pos_embed"]["pos_embed"][0], expected, atol=1e-6)
    assert models.count_params(module) == sum(leaf.size for leaf in jax.tree.leaves(params)) - expected.size
    out = jax.jit(module.apply)({"params": params}, *inputs_for(config, 1, (4, 4)).values())
    np.testing.assert_array_equal(out, 0)


# 2 B, 2.5 B (with the table of positions, 226 M) and 8.1 B on the model cards.
PUBLISHED = {"sd3-medium": 2_028_328_000, "sd35-medium": 2_243_171_520, "sd35-large": 8_056_627_520}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_tensors(preset):
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel.from_config(models.config_to_dict(models.PRESETS[preset]))
    assert models.count_params(preset) == sum(p.numel() for p in theirs.parameters()) == PUBLISHED[preset]
    ours = published(models.shapes(models.build(preset)))
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()
    }


def test_all_parts_without_t5_are_as_many_as_keras_publishes():
    """Of its preset stable_diffusion_3_medium, which counts the table of positions, too."""
    clips = models.count_params("clip-l") + 768**2 + models.count_params("openclip-bigg")
    parts = clips + models.count_params("sd3-vae") + models.count_params("sd3-medium")
    assert parts + 192 * 192 * 1536 == 2_987_080_931


def test_published_config_files_are_the_presets():
    large = {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": "0.31.0.dev0",
        "attention_head_dim": 64,
        "caption_projection_dim": 2432,
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": 38,
        "num_layers": 38,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
        "sample_size": 128,
    }
    assert models.config_from_dict(large) == models.PRESETS["sd35-large"]
    medium = {"num_attention_heads": 24, "num_layers": 24, "caption_projection_dim": 1536}
    assert models.config_from_dict(large | medium | {"qk_norm": None}) == models.PRESETS["sd3-medium"]
    medium |= {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13))}
    assert models.config_from_dict(large | medium) == models.PRESETS["sd35-medium"]
    with pytest.raises(CheckpointError, match="unknown key 'num_single_layers'"):
        models.config_from_dict(large | {"num_single_layers": 38})


def test_a_block_less_in_the_file_is_named(tmp_path):
    theirs = diffusers.SD3Transformer2DModel(**CONFIGS["SD 3"])
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 4, "pos_embed_max_size": 9}))
    with pytest.raises(CheckpointError, match=r"missing: transformer_blocks\.2\.attn\.to_add_out") as error:
        checkpoints.load(tmp_path)
    assert "pos_embed.pos_embed is (1, 64, 16) in the file, (1, 81, 16) in the model" in str(error.value)


def test_attention_maps_are_kept_for_whoever_asks():
    module = models.from_config(models.SD3Transformer2DConfig(**CONFIGS["SD 3.5 medium"]))

    def maps(params, inputs):
        return module.apply({"params": params}, **inputs, mutable=["intermediates"])[1]["intermediates"]

    kept = jax.eval_shape(maps, models.shapes(module), inputs_for(module.config, 2, (4, 6)))
    leaves = traverse_util.flatten_dict(kept, sep="/").items()
    found = {path: leaf[0].shape for path, leaf in leaves if path.endswith("attention_weights")}
    assert found == {
        "transformer_blocks_0to1/attn/attention_weights": (2, 2, 2, 11, 11),
        "transformer_blocks_0to1/attn2/attention_weights": (2, 2, 2, 6, 6),
        "transformer_blocks_2to3/attn/attention_weights": (2, 2, 2, 11, 11),
        "transformer_blocks_4/attn/attention_weights": (2, 2, 11, 11),
    }


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ({"sample_size": (12, 12)}, InvalidArgumentError),
        ({"num_layers": 0}, InvalidArgumentError),
        ({"caption_projection_dim": 32}, InvalidArgumentError),
        ({"dual_attention_layers": (3,)}, InvalidArgumentError),
        ({"pos_embed_max_size": None}, InvalidArgumentError),
        ({"attention_head_dim": 1, "caption_projection_dim": 2}, InvalidArgumentError),
        ({"qk_norm": "layer_norm"}, UnknownNameError),
        ({"dtype": "float64"}, UnknownNameError),
    ],
)
def test_impossible_configs_are_refused(overrides, error):
    with pytest.raises(error):
        models.SD3Transformer2DConfig(**CONFIGS["SD 3"] | overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": images(1, 4, 4, 16)}, "x of width 16; this transformer takes 4"),
        ({"x": images(1, 5, 4, 4)}, "5x4 cannot be cut into whole 2x2 patches"),
        ({"x": images(1, 4, 18, 4)}, "4x18 are too large: .* positions for 16x16"),
        ({"encoder_hidden_states": images(1, 5, 16)}, "encoder_hidden_states of width 16; .* takes 12"),
        ({"pooled_projections": images(1, 12)}, "pooled_projections of width 12; .* takes 10"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes, message):
    module = models.from_config(models.SD3Transformer2DConfig(**CONFIGS["SD 3"]))
    inputs = inputs_for(module.config, 1, (4, 4)) | changes
    with pytest.raises(InvalidArgumentError, match=message):
        jax.eval_shape(lambda inputs: module.init(jax.random.key(0), **inputs), inputs)
