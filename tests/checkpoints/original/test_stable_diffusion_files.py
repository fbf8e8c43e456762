"""Original files of Stable Diffusion 1.x, 2.x and XL: diffusers reads ours, and we read back every bit."""

import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from jaxldm import models
from jaxldm.checkpoints.names import from_state_dict, to_state_dict
from jaxldm.checkpoints.original import load_single_file, save_single_file, single_file
from jaxldm.checkpoints.original.layout import to_original
from jaxldm.checkpoints.original.single_file import FAMILIES
from jaxldm.checkpoints.safetensors_file import read_safetensors, safetensors_bytes
from jaxldm.errors import CheckpointError, UnknownNameError

XL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "cross_attention_dim": 48,
}
UNETS = {
    "1.x": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
        "in_channels": 9,  # inpainting
    },
    "2.x": {
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
    },
    "XL": XL
    | {
        "block_out_channels": (64, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 1, 2),
        "projection_class_embeddings_input_dim": 6 * 256 + 24,
    },
    "XL refiner": XL
    | {
        "block_out_channels": (64, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "attention_head_dim": (1, 1, 2),
        "projection_class_embeddings_input_dim": 5 * 256 + 24,
    },
}
CLIP = {"hidden_act": "quick_gelu", "hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2}
OPENCLIP = CLIP | {"hidden_act": "gelu", "hidden_size": 128, "num_attention_heads": 2, "projection_dim": 24}
TEXT_ENCODERS = {
    "1.x": {"text_encoder": (transformers.CLIPTextModel, CLIP)},
    "2.x": {"text_encoder": (transformers.CLIPTextModel, OPENCLIP)},
    "XL": {
        "text_encoder": (transformers.CLIPTextModel, CLIP),
        "text_encoder_2": (transformers.CLIPTextModelWithProjection, OPENCLIP),
    },
    "XL refiner": {"text_encoder_2": (transformers.CLIPTextModelWithProjection, OPENCLIP)},
}


def references(family):
    """Small random models of the reference, all of a family's components."""
    theirs = {
        "unet": diffusers.UNet2DConditionModel(**UNETS[family]),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 64, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            scaling_factor=0.13025 if family.startswith("XL") else 0.18215,
        ),
    }
    for name, (kind, fields) in TEXT_ENCODERS[family].items():
        config = transformers.CLIPTextConfig(vocab_size=100, intermediate_size=96, **fields)
        theirs[name] = kind(config)
    generator = torch.Generator().manual_seed(0)
    for model in theirs.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    return theirs


def published_tensors(model):
    """Its tensors under their published names, which transformers keeps in files alone."""
    prefix = "text_model." if type(model) is transformers.CLIPTextModel else ""
    return {prefix + name: tensor for name, tensor in model.named_parameters()}


def published_state(model):
    return {name: tensor.detach().numpy() for name, tensor in published_tensors(model).items()}


def published_shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in published_tensors(model).items()}


def ours(model, preset):
    """The same model here."""
    if isinstance(model, transformers.PreTrainedModel):
        entries = model.config.to_dict() | {"architectures": [type(model).__name__]}
    else:
        entries = {key: value for key, value in model.config.items() if key[0] != "_"}
        entries["_class_name"] = type(model).__name__
    config = models.config_from_dict({k: list(v) if isinstance(v, tuple) else v for k, v in entries.items()})
    # What files do not hold, a loaded model takes from the preset of its family.
    not_in_files = (
        "sample_size",
        "upcast_attention",
        "force_upcast",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    fields = {field.name for field in dataclasses.fields(config)}
    kept = {name: getattr(models.PRESETS[preset], name) for name in not_in_files if name in fields}
    if not type(model).__name__.endswith("WithProjection") and "projection_dim" in fields:
        kept["projection_dim"] = models.PRESETS[preset].projection_dim
    module = models.from_config(dataclasses.replace(config, **kept))
    return module, from_state_dict(published_state(model), models.shapes(module))


@pytest.fixture(scope="module", params=UNETS)
def written(request, tmp_path_factory):
    """(family, the reference's models, ours, the file that we wrote of them)."""
    theirs = references(request.param)
    components = {
        name: ours(model, FAMILIES[request.param].components[name].preset) for name, model in theirs.items()
    }
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(path, components)
    return request.param, theirs, components, path


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(tensor), err_msg=name)


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_diffusers_loads_the_file(written, tmp_path, name):
    _, theirs, _, path = written
    theirs[name].save_config(tmp_path)
    opened = type(theirs[name]).from_single_file(str(path), config=str(tmp_path))
    assert_same_tensors(opened.state_dict(), theirs[name].state_dict())


def test_diffusers_finds_the_text_encoders_in_the_file(written, tmp_path):
    family, theirs, _, path = written
    prefixes = {name: part.prefix for name, part in FAMILIES[family].components.items()}
    for name in TEXT_ENCODERS[family]:
        checkpoint = {key: torch.from_numpy(tensor) for key, tensor in read_safetensors(path).items()}
        if theirs[name].config.hidden_act == "gelu":
            found = single_file_utils.convert_open_clip_checkpoint(theirs[name], checkpoint, prefixes[name])
        else:
            found = single_file_utils.convert_ldm_clip_checkpoint(checkpoint)
        assert_same_tensors(found, published_state(theirs[name]))


def test_the_file_reads_back_as_it_was(written):
    _, _, components, path = written
    loaded = load_single_file(path)
    assert loaded.keys() == components.keys()
    for name, (module, params) in components.items():
        assert loaded[name][0] == module, name
        jax.tree.map(np.testing.assert_array_equal, loaded[name][1], params)


def test_a_random_file_of_that_layout_is_read_as_diffusers_reads_it(written, tmp_path):
    """With what the published files hold besides: buffers, averages, schedules, an unused last layer."""
    family, theirs, components, path = written
    generator = np.random.default_rng(7)
    state = {
        name: generator.standard_normal(tensor.shape).astype(np.float16)
        for name, tensor in read_safetensors(path).items()
    }
    extra = {"alphas_cumprod": np.ones(1000, np.float32), "model_ema.decay": np.ones((), np.float32)}
    if family == "2.x":
        last = "cond_stage_model.model.transformer.resblocks."
        extra |= {last + key.removeprefix(last).replace("1", "2", 1): tensor for key, tensor in state.items()
                  if key.startswith(last + "1.")}  # fmt: skip
        extra["cond_stage_model.model.text_projection"] = np.ones((128, 128), np.float16)
        extra["cond_stage_model.model.logit_scale"] = np.ones((), np.float16)
    if family == "1.x":
        positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        extra[positions] = np.arange(77)[None]
    (tmp_path / "random.safetensors").write_bytes(safetensors_bytes(state | extra))
    loaded = load_single_file(tmp_path / "random.safetensors", dtype="float16")

    checkpoint = {key: torch.from_numpy(tensor) for key, tensor in state.items()}
    converters = {
        "unet": functools.partial(
            single_file_utils.convert_ldm_unet_checkpoint, config=theirs["unet"].config
        ),
        "vae": functools.partial(single_file_utils.convert_ldm_vae_checkpoint, config=theirs["vae"].config),
        "clip": single_file_utils.convert_ldm_clip_checkpoint,
    }
    for name, (module, params) in loaded.items():
        assert module.config == dataclasses.replace(components[name][0].config, dtype="float16")
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float16")}
        convert = converters.get(name, converters["clip"])
        if getattr(module.config, "hidden_act", None) == "gelu":
            convert = functools.partial(
                single_file_utils.convert_open_clip_checkpoint,
                theirs[name],
                prefix=FAMILIES[family].components[name].prefix,
            )
        assert_same_tensors(to_state_dict(params), convert(dict(checkpoint)))


# Names and shapes in the published files: v1-5-pruned-emaonly, v2-1_768-ema-pruned, sd_xl_base_1.0,
# sd_xl_refiner_1.0.
PUBLISHED = {
    "1.x": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.time_embed.2.weight": (1280, 1280),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "model.diffusion_model.middle_block.1.norm.weight": (1280,),
        "model.diffusion_model.middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.encoder.norm_out.weight": (512,),
        "first_stage_model.encoder.conv_out.weight": (8, 512, 3, 3),
        "first_stage_model.decoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.mid.attn_1.proj_out.bias": (512,),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    },
    "2.x": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.transformer.resblocks.22.attn.out_proj.weight": (1024, 1024),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.weight": (1024, 4096),
        "cond_stage_model.model.transformer.resblocks.22.ln_2.weight": (1024,),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
    "XL": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.label_emb.0.2.weight": (1280, 1280),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.2.weight": (1280, 5120),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
    },
    "XL refiner": {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.3.attn2.to_v.weight": (768, 1280),
        "model.diffusion_model.label_emb.0.0.weight": (1536, 2560),
        "model.diffusion_model.middle_block.1.transformer_blocks.3.norm3.weight": (1536,),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1536, 1536, 3, 3),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (768, 768, 3, 3),
        "conditioner.embedders.0.model.text_projection": (1280, 1280),
        "conditioner.embedders.0.model.ln_final.bias": (1280,),
    },
}
TENSORS = {  # of U-Net, autoencoder and text encoders in those files, without buffers and unused layers
    "1.x": {"unet": 686, "vae": 248, "text_encoder": 196},
    "2.x": {"unet": 686, "vae": 248, "text_encoder": 4 + 12 * 23},
    "XL": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 5 + 12 * 32},
    "XL refiner": {"unet": 1220, "vae": 248, "text_encoder_2": 5 + 12 * 32},
}


def original_shapes(part, config):
    """original name -> shape, of a preset too large to be built: the reference's model, without memory."""
    entries = {key: value for key, value in models.config_to_dict(config).items() if key[0] != "_"}
    kind = getattr(transformers if config.library == "transformers" else diffusers, models.class_name(config))
    with torch.device("meta"):
        model = kind(transformers.CLIPTextConfig(**entries)) if "hidden_act" in entries else kind(**entries)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in published_shapes(model).items()}
    return {name: tensor.shape for name, tensor in to_original(tensors, part.table(config)).items()}


@pytest.mark.parametrize("family", UNETS)
def test_presets_stand_in_the_published_files(family):
    """Names, shapes and number of tensors; and from them, the presets are found again."""
    everything = {}
    for name, part in FAMILIES[family].components.items():
        preset = models.PRESETS[part.preset]
        shapes = original_shapes(part, preset)
        assert len(shapes) == TENSORS[family][name]
        assert part.config(shapes, preset) == preset
        everything |= {part.prefix + key: shape for key, shape in shapes.items()}
    assert {name: everything.get(name) for name in PUBLISHED[family]} == PUBLISHED[family]
    stand_in = {key: np.broadcast_to(np.float16(0), shape) for key, shape in everything.items()}
    kind = {"1.x": "v1", "2.x": "v2", "XL": "xl_base", "XL refiner": "xl_refiner"}[family]
    assert single_file_utils.infer_diffusers_model_type(stand_in) == kind


@functools.cache
def small():
    """Components of the first family, and what is in their file."""
    theirs = references("1.x")
    return {name: ours(model, FAMILIES["1.x"].components[name].preset) for name, model in theirs.items()}


def rewritten(tmp_path, change):
    path = tmp_path / "changed.safetensors"
    save_single_file(path, small())
    state = read_safetensors(path)
    change(state)
    path.write_bytes(safetensors_bytes(state))
    return path


def test_what_does_not_fit_is_named(tmp_path):
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    path = rewritten(tmp_path, lambda state: state.pop(conv))
    with pytest.raises(CheckpointError, match=r"changed.*unet: .*missing: down_blocks\.0\.resnets\.0\.conv1"):
        load_single_file(path)
    path = rewritten(tmp_path, lambda state: state.update({conv: np.zeros((32, 32, 1, 1), np.float32)}))
    with pytest.raises(
        CheckpointError, match=r"conv1\.weight is \(32, 32, 1, 1\) in the file, \(32, 32, 3, 3\)"
    ):
        load_single_file(path)
    path = rewritten(tmp_path, lambda state: state.update({"first_stage_model.surprise": np.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"left over: first_stage_model\.surprise \(3,\)"):
        load_single_file(path)
    path = rewritten(tmp_path, lambda state: state.pop("model.diffusion_model.out.2.weight"))
    with pytest.raises(CheckpointError, match=r"the unet is not whole.*out\.2\.weight"):
        load_single_file(path)


def test_other_layouts_of_the_same_weights_are_read(tmp_path):
    """CLIP without `text_model.`, and attention of the autoencoder as linear layers."""

    def rewrite(state):
        for name in list(state):
            if name.startswith("cond_stage_model."):
                state[name.replace("transformer.text_model.", "transformer.")] = state.pop(name)
            elif ".attn_1." in name and name.endswith("weight") and state[name].ndim == 4:
                state[name] = state[name][:, :, 0, 0]

    loaded = load_single_file(rewritten(tmp_path, rewrite))
    for name, (module, params) in small().items():
        assert loaded[name][0] == module
        jax.tree.map(np.testing.assert_array_equal, loaded[name][1], params)


@pytest.mark.parametrize(
    ("width", "family"), [(768, "1.x"), (1024, "2.x"), (2048, "XL"), (1280, "XL refiner")]
)
def test_a_unet_alone_is_known_by_the_text_it_takes(width, family):
    name = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    found, bare = single_file._family_of_file({name: np.zeros((640, width), np.int8)})
    assert found.name == family and bare is None


def test_tensors_outside_the_components_are_warned_of(tmp_path):
    path = rewritten(tmp_path, lambda state: state.update({"embedding_manager.x": np.zeros(3)}))
    with pytest.warns(UserWarning, match=r"not loaded, of no component: embedding_manager\.x"):
        assert load_single_file(path).keys() == small().keys()


def test_files_of_other_models_are_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(safetensors_bytes({"lora_unet_down.alpha": np.zeros(1)}))
    with pytest.raises(
        CheckpointError, match=r"not a single file of Stable Diffusion.*lora_unet_down\.alpha"
    ):
        load_single_file(path)
    with pytest.raises(CheckpointError, match="pickle"):
        load_single_file(_named(path, tmp_path / "model.ckpt"))
    with pytest.raises(CheckpointError, match="there is no weight file"):
        load_single_file(tmp_path / "nowhere.safetensors")


def _named(path, other):
    path.rename(other)
    return other


def test_what_has_no_place_is_refused(tmp_path):
    unet = models.build("lcm-unet", block_out_channels=(32,), down_block_types=("DownBlock2D",),
                        up_block_types=("UpBlock2D",), layers_per_block=1)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"no place for time_embedding\.cond_proj"):
        save_single_file(tmp_path / "x.safetensors", {"unet": (unet, models.init(unet, jax.random.key(0)))})
    with pytest.raises(UnknownNameError, match="tokenizer"):
        save_single_file(tmp_path / "x.safetensors", {"tokenizer": (unet, {})})


def test_an_autoencoder_alone_has_the_factors_of_its_family(written, tmp_path):
    """4 channels and `quant_conv` are Stable Diffusion's; the file says more only in its metadata."""
    family, _, components, _ = written
    module, params = components["vae"]
    path = tmp_path / "vae.safetensors"
    save_single_file(path, {"vae": components["vae"]})
    tensors = read_safetensors(path)
    assert "quant_conv.weight" in tensors and not any(name.startswith("first_stage") for name in tensors)
    sample_size = models.PRESETS["sd-vae"].sample_size  # no file holds it
    assert load_single_file(path)["vae"][0].config == dataclasses.replace(
        module.config, sample_size=sample_size
    )
    of_sd = dataclasses.replace(models.PRESETS["sd-vae"], scaling_factor=0.18215, shift_factor=None)
    for prefix in ("", "first_stage_model."):  # as it is published, and as earlier versions wrote it
        path.write_bytes(safetensors_bytes({prefix + name: tensor for name, tensor in tensors.items()}))
        found, found_params = load_single_file(path)["vae"]
        assert found.config.scaling_factor == of_sd.scaling_factor and found.config.shift_factor is None
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found_params, params)), family


def test_names_of_blocks_that_are_not_there_are_refused_at_once(written, tmp_path):
    path = tmp_path / "huge.safetensors"
    tensors = read_safetensors(written[3])
    name = next(name for name in tensors if ".input_blocks.1." in name)
    for number in ("1000000000", "9" * 5000):
        other = {**tensors, name.replace(".1.", f".{number}.", 1): np.zeros(3)}
        path.write_bytes(safetensors_bytes(other))
        with pytest.raises(CheckpointError, match=r"huge\.safetensors.*named as of block") as caught:
            load_single_file(path)
        assert len(str(caught.value)) < 600


def test_playground_keeps_its_latent_statistics(tmp_path):
    theirs, path = references("XL"), tmp_path / "playground.safetensors"
    components = {name: ours(model, FAMILIES["XL"].components[name].preset) for name, model in theirs.items()}
    module, params = components["vae"]
    statistics = {"latents_mean": (1.5, -2.0, 0.25, 3.0), "latents_std": (8.0, 4.0, 2.0, 0.5)}
    vae = models.from_config(dataclasses.replace(module.config, scaling_factor=0.5, **statistics))
    save_single_file(path, components | {"vae": (vae, params)})
    assert load_single_file(path)["vae"][0] == vae
    assert {"edm_mean", "edm_std"} <= read_safetensors(path).keys()
    theirs_too = single_file_utils.infer_diffusers_model_type(
        {key: torch.from_numpy(tensor) for key, tensor in read_safetensors(path).items()}
    )
    assert theirs_too == "playground-v2-5"
