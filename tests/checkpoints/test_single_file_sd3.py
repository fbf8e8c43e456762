"""Stable Diffusion 3's original files: diffusers reads what we write, and we read back every bit."""

import dataclasses

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from jaxldm import checkpoints, models
from jaxldm.checkpoints.safetensors_file import read_safetensors, safetensors_bytes
from jaxldm.checkpoints.single_file import FAMILIES, load_single_file, save_single_file
from jaxldm.checkpoints.single_file_names import place_of
from jaxldm.errors import CheckpointError

COMMON = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 1,  # as wide as the published ones, 64
    "caption_projection_dim": 64,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 5,
}
TRANSFORMERS = {
    "3.5": COMMON | {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "3": COMMON | {"num_layers": 2, "patch_size": 1},
}
VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP = {"vocab_size": 40, "hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}


def random_models(transformer):
    clips = [
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(intermediate_size=96, projection_dim=width, **CLIP)
        )
        for width in (64, 24)
    ]
    found = {
        "transformer": diffusers.SD3Transformer2DModel(**transformer),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": clips[0],
        "text_encoder_2": clips[1],
        "text_encoder_3": transformers.T5EncoderModel(
            transformers.T5Config(feed_forward_proj="gated-gelu", **T5)
        ),
    }
    generator = torch.Generator().manual_seed(0)
    for model in found.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    torch.nn.init.normal_(found["transformer"].pos_embed.pos_embed, generator=generator)  # not computed
    torch.nn.init.eye_(clips[0].text_projection.weight)
    return found


def as_preset(name, config):
    """With what no file tells, as in the preset that a loaded one is made of."""
    untold = ("sample_size", "force_upcast", "scaling_factor", "shift_factor", "hidden_act")
    untold += ("bos_token_id", "eos_token_id", "pad_token_id", "feed_forward_proj")
    fields = {field.name for field in dataclasses.fields(config)}
    preset = models.PRESETS[FAMILIES["SD3"][name].preset]
    return dataclasses.replace(config, **{key: getattr(preset, key) for key in untold if key in fields})


@pytest.fixture(scope="module")
def theirs():
    return random_models(TRANSFORMERS["3.5"])


def as_ours(theirs, folder):
    parts = {}
    for name, model in theirs.items():
        model.save_pretrained(folder / name)
        module, params = checkpoints.load(folder / name)
        parts[name] = (models.from_config(as_preset(name, module.config)), params)
    return parts


@pytest.fixture(scope="module")
def components(theirs, tmp_path_factory):
    return as_ours(theirs, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def path(components, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "sd3.5_medium_incl_all.safetensors"
    save_single_file(path, components)
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (module, params) in expected.items():
        assert found[name][0] == module, name
        jax.tree.map(np.testing.assert_array_equal, found[name][1], params)


def assert_published(found, model):
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), err_msg=name)


def test_the_reference_converts_our_file_to_the_published_tensors(theirs, path):
    state = read_safetensors(path)
    for name in (
        "model.diffusion_model.joint_blocks.2.context_block.adaLN_modulation.1.bias",
        "first_stage_model.decoder.up.1.block.0.conv1.weight",
        "text_encoders.clip_g.transformer.text_projection.weight",
        "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight",
    ):
        assert name in state
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()}
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(own)
    assert_published(found, theirs["transformer"])
    found = single_file_utils.convert_ldm_vae_checkpoint(tensors, dict(theirs["vae"].config))
    assert_published(found, theirs["vae"])
    for name, prefix in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        prefix = f"text_encoders.{prefix}.transformer."
        found = single_file_utils.convert_ldm_clip_checkpoint(tensors, prefix)
        if name == "text_encoder":
            assert "text_projection.weight" not in found  # the reference takes the identity
            found["text_projection.weight"] = torch.eye(64)
        assert_published(found, theirs[name])
    found = single_file_utils.convert_sd3_t5_checkpoint_to_diffusers(tensors)
    found["encoder.embed_tokens.weight"] = found["shared.weight"]
    assert_published(found, theirs["text_encoder_3"])


def test_the_file_reads_back_as_it_was(components, path, tmp_path):
    """With what such files hold besides: T5's table twice, OpenAI's projection, which nothing uses."""
    state, encoders = read_safetensors(path), "text_encoders"
    extra = {
        f"{encoders}.t5xxl.transformer.encoder.embed_tokens.weight": state[
            f"{encoders}.t5xxl.transformer.shared.weight"
        ],
        f"{encoders}.clip_l.transformer.text_projection.weight": np.zeros((64, 64), np.float32),
        f"{encoders}.clip_g.logit_scale": np.zeros((), np.float32),
    }
    (tmp_path / "more.safetensors").write_bytes(safetensors_bytes(dict(state) | extra))
    assert_same(load_single_file(tmp_path / "more.safetensors"), components)


def test_a_t5_of_eight_bits(components, path, tmp_path):
    """As in sd3_medium_incl_clips_t5xxlfp8.safetensors."""
    state = dict(read_safetensors(path))
    for name in [name for name in state if ".t5xxl." in name]:
        state[name] = np.asarray(state[name]).astype(ml_dtypes.float8_e4m3fn)
    (tmp_path / "fp8.safetensors").write_bytes(safetensors_bytes(state))
    found = load_single_file(tmp_path / "fp8.safetensors", dtype="bfloat16")
    module, params = found["text_encoder_3"]
    expected = state["text_encoders.t5xxl.transformer.shared.weight"].astype(np.float32)
    assert module.config.dtype == "bfloat16" and found.keys() == components.keys()
    np.testing.assert_array_equal(params["shared"]["embedding"].astype(np.float32), expected)


def test_parts_of_it(components, tmp_path):
    """As published without the encoders, with the CLIPs alone, and the transformer under bare names."""
    path = tmp_path / "parts.safetensors"
    for names in (
        ("transformer", "vae"),
        ("transformer", "text_encoder", "text_encoder_2"),
        ("transformer",),
    ):
        parts = {name: components[name] for name in names}
        save_single_file(path, parts)
        assert_same(load_single_file(path), parts)
    bare = {key.removeprefix("model.diffusion_model."): t for key, t in read_safetensors(path).items()}
    path.write_bytes(safetensors_bytes(bare))
    assert_same(load_single_file(path), {"transformer": components["transformer"]})
    texts = {name: part for name, part in components.items() if name.startswith("text_encoder")}
    save_single_file(path, texts)
    assert_same(load_single_file(path), texts)


def test_the_first_generation_has_neither_norms_nor_a_second_attention(tmp_path):
    transformer = {"transformer": diffusers.SD3Transformer2DModel(**TRANSFORMERS["3"])}
    parts = as_ours(transformer, tmp_path / "published")
    save_single_file(tmp_path / "sd3.safetensors", parts)
    assert_same(load_single_file(tmp_path / "sd3.safetensors"), parts)
    found = {name: torch.from_numpy(t) for name, t in read_safetensors(tmp_path / "sd3.safetensors").items()}
    found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(found)
    assert_published(found, transformer["transformer"])


# Tensors in the published files of the transformer, and shapes of some.
PUBLISHED = {
    "sd3-medium": {
        "pos_embed": (1, 36864, 1536),
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
        "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
        "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
        "y_embedder.mlp.0.weight": (1536, 2048),
        "final_layer.linear.weight": (64, 1536),
    },
    "sd35-medium": {
        "pos_embed": (1, 147456, 1536),
        "joint_blocks.12.x_block.adaLN_modulation.1.weight": (13824, 1536),
        "joint_blocks.12.x_block.attn2.ln_q.weight": (64,),
        "joint_blocks.23.context_block.attn.qkv.weight": (4608, 1536),
    },
    "sd35-large": {
        "pos_embed": (1, 36864, 2432),
        "joint_blocks.37.x_block.mlp.fc1.weight": (9728, 2432),
        "joint_blocks.37.context_block.attn.ln_k.weight": (64,),
        "context_embedder.weight": (2432, 4096),
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_stand_in_the_published_files(preset):
    """Names and shapes; and from them, the preset is found again."""
    config, part = models.PRESETS[preset], FAMILIES["SD3"]["transformer"]
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel.from_config(models.config_to_dict(config))
    table, shapes = part.table(config), {}
    for name, tensor in theirs.state_dict().items():
        place, shape = place_of(name, table), tuple(tensor.shape)
        if isinstance(place.form, int):
            shape = (shape[0] * 3, *shape[1:])
        assert shapes.setdefault(place.name, shape) == shape
    assert {name: shapes.get(name) for name in PUBLISHED[preset]} == PUBLISHED[preset]
    assert part.config(shapes, models.PRESETS["sd3-medium"]) == config
    stand_in = {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}
    kind = single_file_utils.infer_diffusers_model_type(stand_in)
    assert kind == ("sd3" if preset == "sd3-medium" else preset.replace("-", "_"))
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(meta)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("joint_blocks.1.context_block.mlp.fc2.bias", None, r"missing: .*1\.ff_context\.net\.2\.bias"),
        ("joint_blocks.0.x_block.attn.qkv.weight", (195, 64), r"attn\.to_q\.weight is \(65, 64\) in"),
        ("joint_blocks.0.surprise", (3,), r"left over: model\.diffusion_model\.joint_blocks\.0\.surprise"),
        ("x_embedder.proj.weight", None, r"the transformer is not whole: .*x_embedder\.proj\.weight"),
    ],
)
def test_what_does_not_fit_is_named(components, tmp_path, name, change, message):
    path = tmp_path / "changed.safetensors"
    save_single_file(path, {"transformer": components["transformer"]})
    state = dict(read_safetensors(path))
    if change is None:
        del state[f"model.diffusion_model.{name}"]
    else:
        state[f"model.diffusion_model.{name}"] = np.zeros(change, np.float32)
    path.write_bytes(safetensors_bytes(state))
    with pytest.raises(CheckpointError, match=message):
        load_single_file(path)


def test_a_projection_that_the_original_does_not_have_is_refused(components, tmp_path):
    module, params = components["text_encoder"]
    turned = params | {"text_projection": {"kernel": params["text_projection"]["kernel"][::-1]}}
    parts = components | {"text_encoder": (module, turned)}
    with pytest.raises(CheckpointError, match=r"no place for text_projection\.weight, which is no identity"):
        save_single_file(tmp_path / "x.safetensors", parts)
