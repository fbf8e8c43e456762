"""The networks of Qwen-Image against diffusers and transformers: transformer, autoencoder, text encoder."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers_reference import opened_by_diffusers
from safetensors.numpy import load_file, save_file
from torch_reference import assert_agrees, images, randomised, to_torch
from transformers_reference import opened_in_silence, perturbed

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

SMALL = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "axes_dims_rope": (2, 4, 6),
}
VAE = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "temperal_downsample": (False, True),
    "latents_mean": (-0.5, 0.1, 1.5, 0.0),
    "latents_std": (2.0, 0.7, 1.3, 1.0),
}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 24}
ROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 1, 1]}
TIMES = np.array([0.3, 1.0], np.float32)


# ---------------------------------------------------------------- transformer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    theirs = randomised(diffusers.QwenImageTransformer2DModel(**SMALL))
    theirs.save_pretrained(folder)
    module, params = checkpoints.load(folder)
    return theirs, module, params, jax.jit(module.apply)


def theirs_of(model, x, t, text, mask=None):
    """Of packed latents, as their pipeline gives them, unpacked again."""
    pipe = diffusers.QwenImagePipeline
    count, height, width, channels = x.shape
    with torch.no_grad():
        tokens = model(
            pipe._pack_latents(to_torch(x), count, channels, height, width),
            encoder_hidden_states=torch.from_numpy(text),
            encoder_hidden_states_mask=None if mask is None else torch.from_numpy(mask),
            timestep=torch.from_numpy(t),
            img_shapes=[[(1, height // 2, width // 2)]] * count,
        ).sample
    return pipe._unpack_latents(tokens, 8 * height, 8 * width, 8)[:, :, 0]


def test_the_transformer_agrees_with_diffusers(pair):
    """Odd numbers of rows and columns of tokens, and texts of 9 and 4 tokens; padding has no effect."""
    theirs, _, params, apply = pair
    x, text = images(2, 6, 10, 4), images(2, 9, 10, seed=1)
    expected = theirs_of(theirs, x, TIMES, text)
    assert_agrees(apply({"params": params}, x, TIMES, text), expected)
    mask = np.arange(9)[None] < np.array([[9], [4]])
    drawn = apply({"params": params}, x, TIMES, text, mask)
    assert_agrees(drawn, theirs_of(theirs, x, TIMES, text, mask))
    assert np.abs(drawn[1] - to_channels_last(expected)[1]).max() > 0.01
    again = apply({"params": params}, x, TIMES, np.where(mask[..., None], text, 7.0), mask)
    np.testing.assert_array_equal(again, drawn)


def to_channels_last(tensor):
    return tensor.numpy().transpose(0, 2, 3, 1)


def test_diffusers_opens_the_transformer_that_we_change_and_save(pair, tmp_path, caplog, recwarn):
    """With blocks one by one: the same tensors."""
    theirs, module, params, _ = pair
    params = perturbed(params)
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    x, text = images(1, 4, 4, 4), images(1, 3, 10, seed=1)
    expected = theirs_of(opened, x, TIMES[:1], text)
    again_module, again = checkpoints.load(tmp_path)
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)
    entries = checkpoints.read_config(tmp_path) | {"_scan": False}
    written_out = checkpoints.folder.load_as(entries, tmp_path)
    assert_agrees(jax.jit(written_out[0].apply)({"params": written_out[1]}, x, TIMES[:1], text), expected)


def test_bfloat16_stays_near_float32(pair):
    _, module, params, apply = pair
    low = models.from_config(dataclasses.replace(module.config, dtype="bfloat16"))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax.device_get(params))
    x, text = images(1, 4, 4, 4), images(1, 3, 10, seed=1)
    rounded = jax.jit(low.apply)({"params": narrow}, x, TIMES[:1], text)
    exact = apply({"params": params}, x, TIMES[:1], text)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("x", "text", "mask", "message"),
    [
        ((1, 8, 6, 3), (1, 4, 10), None, "x has 3 channels; this transformer takes 4"),
        ((1, 8, 7, 4), (1, 4, 10), None, "8x7"),
        ((1, 8, 6, 4), (1, 4, 11), None, "11 wide; this transformer takes 10"),
        ((1, 8, 6, 4), (1, 4, 10), (1, 5), r"must be \[1, 4\].* got \[1, 5\]"),
    ],
)
def test_inputs_that_do_not_fit(x, text, mask, message):
    module = models.from_config(models.QwenImageTransformer2DConfig.from_dict(SMALL))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, (1,), text, mask) if shape]
    with pytest.raises(InvalidArgumentError, match=message):
        jax.eval_shape(module.apply, {"params": models.shapes(module)}, *arguments)


# ---------------------------------------------------------------- autoencoder


def test_the_autoencoder_agrees_with_diffusers_both_ways(tmp_path, caplog, recwarn):
    """It is one of videos there, and sees a single frame; every tensor comes back as it was."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in VAE.items()}
    theirs = randomised(diffusers.AutoencoderKLQwenImage(**fields))
    theirs.save_pretrained(tmp_path / "theirs")
    module, params = checkpoints.load(tmp_path / "theirs")
    x = 0.5 * images(2, 8, 12, 3)

    @jax.jit
    def both_ways(params, x):
        posterior = module.apply({"params": params}, x, method="encode")
        latents = models.encode_latents(module, params, x)
        return posterior, latents, models.decode_latents(module, params, latents)

    posterior, latents, decoded = both_ways(params, np.clip(x, -1, 1))
    with torch.no_grad():
        expected = theirs.encode(to_torch(np.clip(x, -1, 1))[:, :, None]).latent_dist
        images_again = theirs.decode(expected.mean).sample[:, :, 0]
    assert_agrees(posterior.mean, expected.mean[:, :, 0])
    assert_agrees(posterior.log_variance, expected.logvar[:, :, 0])
    mean, std = (np.array(VAE[name], np.float32) for name in ("latents_mean", "latents_std"))
    np.testing.assert_allclose(latents, (np.asarray(posterior.mean) - mean) / std, atol=1e-5)
    assert_agrees(decoded, images_again)
    assert images_again.std() > 0.1 and (images_again.abs() < 1).float().mean() > 0.5  # not flat or clipped
    checkpoints.save(tmp_path / "ours", module, params)
    opened = opened_by_diffusers(theirs, tmp_path / "ours", caplog, recwarn)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperal_downsample": (True,)}, "needs one number more"),
        ({"latents_std": (1.0, 1.0)}, "latents_std must have z_dim = 4 numbers, not 2"),
        ({"latents_std": (1.0, 1.0, 0.0, 1.0)}, "latents_std must be numbers above 0"),
        ({"base_dim": 3, "dim_mult": (1, 3, 3)}, "must be even"),
    ],
)
def test_autoencoders_that_cannot_be(changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        dataclasses.replace(models.AutoencoderKLQwenImageConfig(**VAE), **changes)


# ---------------------------------------------------------------- text encoder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The whole Qwen2.5-VL, as a folder has it, and what ours reads of it."""
    folder = tmp_path_factory.mktemp("text_encoder")
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": ROPE}, vision_config=VISION, tie_word_embeddings=False
    )
    theirs = randomised(transformers.Qwen2_5_VLForConditionalGeneration(config))
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder), folder


def encoded_by(model, tokens, mask=None):
    with torch.no_grad():
        given = {"input_ids": torch.from_numpy(tokens).long(), "output_hidden_states": True}
        return model(**given, attention_mask=None if mask is None else torch.from_numpy(mask))


def assert_encodes_alike(theirs, module, params, apply):
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
    mask = (np.arange(9)[None] < np.array([[9], [6]])).astype(np.int32)
    expected = encoded_by(theirs, tokens, mask).hidden_states
    ours = apply({"params": params}, tokens, mask)
    assert len(ours.hidden_states) == len(expected)
    for state, reference in zip(ours.hidden_states, expected, strict=True):
        assert_agrees(state[mask == 1], reference[torch.from_numpy(mask) == 1])
    np.testing.assert_array_equal(ours.hidden_states[-1], ours.last_hidden_state)
    assert_agrees(
        apply({"params": params}, tokens).last_hidden_state, encoded_by(theirs, tokens).hidden_states[-1]
    )


def test_a_text_is_encoded_as_by_the_whole_model(whole):
    """In 16 bits as well; the tower of images is not read."""
    theirs, module, params, _ = whole
    assert any("visual" in name for name in theirs.state_dict()) and "visual" not in params
    assert_encodes_alike(theirs, module, params, jax.jit(module.apply))


def test_the_language_model_alone_is_saved(whole, tmp_path, caplog, recwarn):
    _, module, params, _ = whole
    changed = perturbed(params)
    checkpoints.save(tmp_path, module, changed)
    opened = opened_in_silence(transformers.Qwen2_5_VLTextModel, tmp_path, caplog, recwarn)
    assert_encodes_alike(opened, module, changed, jax.jit(module.apply))
    assert opened.config.rope_parameters == ROPE
    again, same = checkpoints.load(tmp_path)
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, same, changed)


def test_folders_of_transformers_4_are_read_alike(whole, tmp_path):
    """Flat or doubled configs, the rotary settings in two places, and other names of tensors."""
    _, module, params, folder = whole
    entries = json.loads((folder / "config.json").read_text())
    rope = {"rope_theta": 5000, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}
    flat = TEXT | rope | {key: entries[key] for key in ("architectures", "vision_config", "image_token_id")}
    flat |= {"model_type": "qwen2_5_vl", "use_sliding_window": False, "sliding_window": 32768}
    doubled = flat | {"text_config": TEXT | rope | {"model_type": "qwen2_5_vl_text", "vision_token_id": 5}}
    for config in (flat, doubled, entries):
        assert models.config_from_dict(config) == module.config
    (tmp_path / "config.json").write_text(json.dumps(flat))
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model.").removeprefix("language_model."): state[name] for name in state}
    old = {name if name.startswith(("visual", "lm_head")) else f"model.{name}": bare[name] for name in bare}
    new = {
        name if name.startswith("lm_head") else f"model.language_model.{name}": bare[name] for name in bare
    }
    new = {name.replace("language_model.visual", "visual"): tensor for name, tensor in new.items()}
    assert "visual.merger.ln_q.weight" in old and "model.visual.merger.ln_q.weight" in new
    for tensors in (old, new):
        save_file(tensors, tmp_path / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, checkpoints.load(tmp_path)[1], params)


# ---------------------------------------------------------------- published sizes and configs


def published(name):
    entries = models.config_to_dict(models.PRESETS[name])
    kind = entries.pop("_class_name", None) or entries.pop("architectures")[0]
    return kind, {key: value for key, value in entries.items() if key[0] != "_" and key != "model_type"}


@pytest.mark.parametrize(
    ("preset", "count"),
    [("qwen-image", 20_430_401_088), ("qwen-image-vae", 126_892_531), ("qwen2.5-vl-7b", 7_070_619_136)],
)
def test_presets_have_the_tensors_of_their_class(preset, count):
    """The transformer's number is that of the published files, 40.86 GB in 16 bits."""
    kind, entries = published(preset)
    with torch.device("meta"):
        if kind.startswith("Qwen2_5"):
            theirs = transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**entries))
        else:
            theirs = getattr(diffusers, kind)(**entries)
    wanted = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    ours = checkpoints.names.published(models.shapes(models.build(preset)))
    assert {name: tensor.shape for name, tensor in ours.items()} == wanted
    assert models.count_params(preset) == count


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": True}, "zero_cond_t = True"),
        ({"_class_name": "QwenImageTransformer2DModel", "use_layer3d_rope": True}, "use_layer3d_rope"),
        ({"_class_name": "QwenImageTransformer2DModel", "axes_dims_rope": [16, 56, 55]}, "add up to the 128"),
        ({"_class_name": "QwenImageTransformer2DModel", "axes_dims_rope": [16, 55, 57]}, "even"),
        ({"_class_name": "QwenImageTransformer2DModel", "in_channels": 10}, "10 channels"),
        ({"_class_name": "AutoencoderKLQwenImage", "attn_scales": [1.0]}, "attn_scales"),
        ({"architectures": ["Qwen2_5_VLTextModel"], "use_sliding_window": True}, "use_sliding_window"),
        ({"architectures": ["Qwen2_5_VLTextModel"], "rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"architectures": ["Qwen2_5_VLTextModel"], "num_attention_heads": 7}, "7 heads"),
        ({"architectures": ["Qwen2_5_VLTextModel"], "num_key_value_heads": 5}, "cannot share 5"),
        (
            {"architectures": ["Qwen2_5_VLTextModel"], "text_config": {"surprise": 1}},
            "unknown key 'surprise'",
        ),
    ],
)
def test_what_is_not_supported_is_named(entries, message):
    with pytest.raises(CheckpointError, match=message):
        models.config_from_dict(entries)
