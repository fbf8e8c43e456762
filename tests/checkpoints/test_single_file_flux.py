"""FLUX's original files: the reference's converter reads what we write, and we read back every bit."""

import dataclasses

import diffusers
import jax
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

WIDTH = 128  # one head as wide as the published ones
TRANSFORMER = {
    "in_channels": 24,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 1,
    "num_attention_heads": 1,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
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
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}


def convert(state):
    """The reference's conversion; FLUX's width is written into its code."""
    code = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers.__code__
    small = code.replace(co_consts=tuple(WIDTH if const == 3072 else const for const in code.co_consts))
    assert small != code
    function = type(convert)(small, vars(single_file_utils))
    return function({name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()})


def as_preset(name, config):
    """With what no file tells, as in the preset that a loaded one is made of."""
    untold = ("sample_size", "force_upcast", "scaling_factor", "shift_factor", "hidden_act")
    untold += ("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim", "feed_forward_proj")
    fields = {field.name for field in dataclasses.fields(config)}
    preset = models.PRESETS[FAMILIES["FLUX"][name].preset]
    return dataclasses.replace(config, **{key: getattr(preset, key) for key in untold if key in fields})


@pytest.fixture(scope="module")
def theirs():
    clip = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 96}
    models = {
        "transformer": diffusers.FluxTransformer2DModel(**TRANSFORMER),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=40, **clip)),
        "text_encoder_2": transformers.T5EncoderModel(
            transformers.T5Config(feed_forward_proj="gated-gelu", **T5)
        ),
    }
    generator = torch.Generator().manual_seed(0)
    for model in models.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    return models


@pytest.fixture(scope="module")
def components(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    parts = {}
    for name, model in theirs.items():
        model.save_pretrained(folder / name)
        module, params = checkpoints.load(folder / name)
        parts[name] = (models.from_config(as_preset(name, module.config)), params)
    return parts


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, (module, params) in expected.items():
        assert found[name][0] == module, name
        jax.tree.map(np.testing.assert_array_equal, found[name][1], params)


def test_the_reference_converts_our_file_to_the_published_tensors(theirs, components, tmp_path):
    path = tmp_path / "flux1-dev.safetensors"
    save_single_file(path, {"transformer": components["transformer"]})
    state = read_safetensors(path)
    assert state["double_blocks.1.img_attn.qkv.weight"].shape == (3 * WIDTH, WIDTH)
    assert state["single_blocks.0.linear1.bias"].shape == (7 * WIDTH,)
    found, expected = convert(state), theirs["transformer"].state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), err_msg=name)
    assert_same(load_single_file(path), {"transformer": components["transformer"]})


def test_the_autoencoder_alone(theirs, components, tmp_path):
    path = tmp_path / "ae.safetensors"
    save_single_file(path, {"vae": components["vae"]})
    assert "decoder.up.1.block.0.conv1.weight" in read_safetensors(path)
    found = single_file_utils.convert_ldm_vae_checkpoint(
        {name: torch.from_numpy(np.array(tensor)) for name, tensor in read_safetensors(path).items()},
        dict(theirs["vae"].config),
    )
    expected = theirs["vae"].state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), err_msg=name)
    assert_same(load_single_file(path), {"vae": components["vae"]})


def test_all_in_one_file_as_comfyui_has_it(theirs, components, tmp_path):
    path = tmp_path / "all.safetensors"
    save_single_file(path, components)
    state = read_safetensors(path)
    for name in (
        "model.diffusion_model.double_blocks.0.txt_mlp.2.bias",
        "vae.encoder.down.0.downsample.conv.weight",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight",
    ):
        assert name in state
    converted = convert({name: tensor for name, tensor in state.items() if name.startswith("model.")})
    assert converted.keys() == theirs["transformer"].state_dict().keys()
    extra = {  # what such files hold besides
        "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight": state[
            "text_encoders.t5xxl.transformer.shared.weight"
        ],
        "text_encoders.clip_l.transformer.text_projection.weight": np.eye(3, dtype=np.float32),
        "text_encoders.clip_l.logit_scale": np.zeros((), np.float32),
    }
    path.write_bytes(safetensors_bytes(state | extra))
    assert_same(load_single_file(path), components)


# Tensors of the published file and their shapes; 780 tensors in dev's, 776 in schnell's.
PUBLISHED = {
    "img_in.weight": (3072, 64),
    "txt_in.weight": (3072, 4096),
    "vector_in.in_layer.weight": (3072, 768),
    "guidance_in.out_layer.bias": (3072,),
    "double_blocks.18.img_mod.lin.weight": (18432, 3072),
    "double_blocks.18.txt_attn.qkv.weight": (9216, 3072),
    "double_blocks.18.txt_attn.norm.query_norm.scale": (128,),
    "double_blocks.18.img_mlp.0.weight": (12288, 3072),
    "single_blocks.37.linear1.weight": (21504, 3072),
    "single_blocks.37.linear2.weight": (3072, 15360),
    "single_blocks.37.modulation.lin.bias": (9216,),
    "single_blocks.37.norm.key_norm.scale": (128,),
    "final_layer.linear.weight": (64, 3072),
    "final_layer.adaLN_modulation.1.weight": (6144, 3072),
}


@pytest.mark.parametrize(("preset", "tensors"), [("flux-dev", 780), ("flux-schnell", 776)])
def test_presets_stand_in_the_published_files(preset, tensors):
    """Names, shapes and number of tensors; and from them, the preset is found again."""
    config, part = models.PRESETS[preset], FAMILIES["FLUX"]["transformer"]
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel.from_config(models.config_to_dict(config))
    table, shapes = part.table(config), {}
    for name, tensor in theirs.state_dict().items():
        place, shape = place_of(name, table), tuple(tensor.shape)
        if not isinstance(place.form, str):
            which, sizes = (place.form, (1, 1, 1)) if isinstance(place.form, int) else place.form
            shape = (shape[0] // sizes[which] * sum(sizes), *shape[1:])
        assert shapes.setdefault(place.name, shape) == shape
    assert len(shapes) == tensors
    guided = config.guidance_embeds
    expected = {name: shape for name, shape in PUBLISHED.items() if guided or "guidance" not in name}
    assert {name: shapes.get(name) for name in expected} == expected
    assert part.config(shapes, models.PRESETS["flux-dev"]) == config
    stand_in = {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}
    assert single_file_utils.infer_diffusers_model_type(stand_in) == preset
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(meta)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("double_blocks.1.txt_mlp.2.bias", None, r"transformer: .*missing: .*ff_context\.net\.2\.bias"),
        ("single_blocks.0.linear1.weight", (7 * WIDTH + 7, WIDTH), r"attn\.to_q\.weight is \(129, 128\) in"),
        (
            "single_blocks.0.linear1.weight",
            (WIDTH, WIDTH),
            r"proj_mlp\.weight is \(128, 128\) in",
        ),
        ("double_blocks.0.surprise", (3,), r"left over: double_blocks\.0\.surprise \(3,\)"),
        ("img_in.weight", None, r"the transformer is not whole: it has no tensor img_in\.weight"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (64,), "shapes of no model: axes_dims_rope"),
    ],
)
def test_what_does_not_fit_is_named(components, tmp_path, name, change, message):
    path = tmp_path / "changed.safetensors"
    save_single_file(path, {"transformer": components["transformer"]})
    state = dict(read_safetensors(path))
    if change is None:
        del state[name]
    else:
        state[name] = np.zeros(change, np.float32)
    path.write_bytes(safetensors_bytes(state))
    with pytest.raises(CheckpointError, match=message):
        load_single_file(path)


def test_transformers_without_an_original_layout_are_refused(tmp_path):
    dit = models.build("tiny-dit", depth=1)
    with pytest.raises(CheckpointError, match="a DiT has no original single-file layout"):
        save_single_file(tmp_path / "x.safetensors", {"transformer": (dit, {})})


def test_an_autoencoder_alone_that_would_be_read_with_other_factors_is_refused(components, tmp_path):
    module, params = components["vae"]
    other = type(module)(dataclasses.replace(module.config, scaling_factor=1.5305, shift_factor=0.0609))
    with pytest.raises(CheckpointError, match=r"this one has \(1.5305, 0.0609\): save it as a folder"):
        save_single_file(tmp_path / "ae.safetensors", {"vae": (other, params)})
    assert not list(tmp_path.iterdir())
