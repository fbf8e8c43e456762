"""FLUX.2's transformer and autoencoder against diffusers, on small random models, and their sizes."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline as Klein
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch
from transformers_reference import perturbed

from jaxldm import checkpoints, models
from jaxldm.checkpoints.folder import load_as
from jaxldm.errors import CheckpointError, InvalidArgumentError

SMALL = {
    "in_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "axes_dims_rope": [2, 4, 4, 2],
    "joint_attention_dim": 10,
}
CONFIGS = {
    "klein": (SMALL | {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": False}, {}),
    "dev, other constants, blocks one by one": (
        SMALL
        | {
            "num_layers": 1,
            "num_single_layers": 2,
            "guidance_embeds": True,
            "out_channels": 4,
            "mlp_ratio": 2.7,
            "rope_theta": 50,
            "eps": 1e-2,
            "timestep_guidance_channels": 32,
        },
        {"_scan": False, "_remat": True},
    ),
}
VAE = {
    "block_out_channels": (4, 8),
    "decoder_block_out_channels": (8, 4),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 2,
    "sample_size": 16,
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    fields, own = CONFIGS[request.param]
    theirs = randomised(diffusers.Flux2Transformer2DModel(**fields))
    folder = tmp_path_factory.mktemp("flux2")
    theirs.save_pretrained(folder)
    module, params = load_as(checkpoints.read_config(folder) | own, folder)
    return theirs, module, params, jax.jit(module.apply)


def inputs(config, batch=2, picture=None):
    """(x, t, states, guidance, reference) for ours: an oblong image, and 5 tokens of text."""
    x, states = images(batch, 3, 5, 8), images(batch, 5, 10, seed=1)
    guidance = np.linspace(1.0, 3.5, batch, dtype=np.float32) if config.guidance_embeds else None
    t = np.linspace(0.13, 1.0, batch, dtype=np.float32)
    return x, t, states, guidance, None if picture is None else images(batch, *picture, 8, seed=2)


def theirs_of(model, x, t, states, guidance, picture):
    """Theirs on the same, packed and numbered as their pipeline does it: [B, C, H, W]."""
    tokens, numbers = Klein._pack_latents(to_torch(x)), Klein._prepare_latent_ids(to_torch(x))
    if picture is not None:
        tokens = torch.cat([tokens, Klein._pack_latents(to_torch(picture))], dim=1)
        ids = Klein._prepare_image_ids([to_torch(picture[:1])])
        numbers = torch.cat([numbers, ids.expand(len(x), -1, -1)], dim=1)
    with torch.no_grad():
        drawn = model(
            tokens,
            encoder_hidden_states=torch.from_numpy(states),
            timestep=torch.from_numpy(t),
            img_ids=numbers,
            txt_ids=Klein._prepare_text_ids(torch.from_numpy(states)),
            guidance=None if guidance is None else torch.from_numpy(guidance),
        ).sample
    height, width = x.shape[1:3]
    return drawn[:, : height * width].reshape(len(x), height, width, -1).permute(0, 3, 1, 2)


def test_the_transformer_agrees_with_diffusers(pair):
    """With a picture of another size to look at; without one, below."""
    theirs, module, params, apply = pair
    given = inputs(module.config, picture=(4, 2))
    assert_agrees(apply({"params": params}, *given), theirs_of(theirs, *given))


def test_diffusers_opens_the_transformer_that_we_change_and_save(pair, tmp_path, caplog, recwarn):
    theirs, module, params, apply = pair
    params = perturbed(params)
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    given = inputs(module.config)
    assert_agrees(apply({"params": params}, *given), theirs_of(opened, *given))
    again_module, again = checkpoints.load(tmp_path)
    assert again_module == module
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_eight_bits_stay_near_float32(pair):
    _, module, params, apply = pair
    if not module.config.scan:
        pytest.skip("the same numbers")
    given = inputs(module.config)
    exact = apply({"params": params}, *given)
    rounded = apply({"params": models.quantize(module, params, models.quantization("int8"))}, *given)
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def normalised(theirs, latents):
    """As their pipeline has them: 2x2 latents as one, without the mean, of variance 1."""
    mean, variance = (x.view(1, -1, 1, 1) for x in (theirs.bn.running_mean, theirs.bn.running_var))
    return (Klein._patchify_latents(latents) - mean) / torch.sqrt(variance + theirs.config.batch_norm_eps)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    theirs = randomised(diffusers.AutoencoderKLFlux2(**VAE))
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 2.5)
    folder = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder)


def test_the_autoencoder_agrees_with_diffusers_both_ways(autoencoder, tmp_path, caplog, recwarn):
    theirs, module, params = autoencoder
    x = images(2, 8, 12, 3)

    @jax.jit
    def both_ways(params, x):
        gaussian = module.apply({"params": params}, x, method="encode")
        latents = models.encode_latents(module, params, x)
        return gaussian, latents, models.decode_latents(module, params, latents)

    gaussian, latents, decoded = both_ways(params, x)
    with torch.no_grad():
        expected = theirs.encode(to_torch(x)).latent_dist
        assert_agrees(latents, normalised(theirs, expected.mode()))
        assert_agrees(decoded, theirs.decode(expected.mode()).sample)
        further = normalised(theirs, expected.mean + expected.std)
    np.testing.assert_array_equal(gaussian.mean, latents)
    assert_agrees(gaussian.mean + jnp.exp(0.5 * gaussian.log_variance), further)
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    assert models.count_params(module) == sum(p.numel() for p in theirs.parameters())


def test_tiles_of_latents_are_theirs(autoencoder):
    """A tile of 16 pixels is 4 latents; the next begins 3 after it."""
    theirs, module, params = autoencoder
    z = images(1, 7, 9, 12)
    ours = jax.jit(lambda z: models.decode_latents(module, params, z, tiling=models.Tiling()))(z)
    mean, variance = (x.view(1, -1, 1, 1) for x in (theirs.bn.running_mean, theirs.bn.running_var))
    raw = to_torch(z) * torch.sqrt(variance + theirs.config.batch_norm_eps) + mean
    theirs.enable_tiling()
    try:
        with torch.no_grad():
            expected = theirs.decode(Klein._unpatchify_latents(raw)).sample
    finally:
        theirs.disable_tiling()
    assert_agrees(ours, expected)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("flux2-dev", diffusers.Flux2Transformer2DModel, 32_223_281_152),
        ("flux2-klein-4b", diffusers.Flux2Transformer2DModel, 3_875_544_576),
        ("flux2-klein-9b", diffusers.Flux2Transformer2DModel, 9_078_581_248),
        ("flux2-vae", diffusers.AutoencoderKLFlux2, 84_046_115),
    ],
)
def test_the_presets_have_the_published_parameters(name, kind, count):
    """As diffusers' own converter of the published files has their configs."""
    config = models.config_to_dict(models.PRESETS[name])
    with torch.device("meta"):
        theirs = kind(**{key: value for key, value in config.items() if key[0] != "_"})
    assert models.count_params(name) == sum(p.numel() for p in theirs.parameters()) == count


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("flux2-dev", {"axes_dims_rope": (64, 64)}, "four numbers"),
        ("flux2-dev", {"axes_dims_rope": (31, 33, 32, 32)}, "even"),
        ("flux2-dev", {"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
        ("flux2-dev", {"rope_theta": -1.0}, "rope_theta must be positive"),
        ("flux2-dev", {"timestep_guidance_channels": 2}, "3 or more"),
        ("flux2-vae", {"decoder_block_out_channels": (128, 256)}, "each of 4 levels"),
        ("flux2-vae", {"decoder_block_out_channels": (128, 256, 512, 500)}, "500 channels"),
        ("flux2-vae", {"batch_norm_eps": -1.0}, "0 or more"),
    ],
)
def test_configs_that_cannot_be(name, fields, message):
    with pytest.raises(InvalidArgumentError, match=message):
        dataclasses.replace(models.PRESETS[name], **fields)
    entries = {"_class_name": "AutoencoderKLFlux2", "patch_size": [4, 4]}
    with pytest.raises(CheckpointError, match=r"patch_size must be \(2, 2\)"):
        models.config_from_dict(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (1, 4, 4, 3)}, "x has 3 channels"),
        ({"reference": (1, 4, 4, 3)}, "reference has 3 channels"),
        ({"states": (1, 4, 11)}, "11 wide"),
        ({"guidance": None}, "needs guidance"),
    ],
)
def test_inputs_of_the_transformer_that_do_not_fit(change, message):
    module = models.from_config(models.Flux2Transformer2DConfig.from_dict(SMALL))
    given = {"x": (1, 4, 4, 8), "t": (1,), "states": (1, 4, 10), "guidance": (1,), "reference": None} | change
    given = [shape if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in given.values()]
    with pytest.raises(InvalidArgumentError, match=message):
        jax.eval_shape(module.apply, {"params": models.shapes(module)}, *given)


def test_inputs_of_others_that_do_not_fit(pair, autoencoder):
    _, module, params, _ = pair
    if not module.config.guidance_embeds:
        x, t, states, *_ = inputs(module.config)
        with pytest.raises(InvalidArgumentError, match="no guidance_embeds"):
            module.apply({"params": params}, x, t, states, t)
    _, vae, params = autoencoder
    with pytest.raises(InvalidArgumentError, match="8x6: this autoencoder needs multiples of 4"):
        models.encode_latents(vae, params, images(1, 8, 6, 3))
    with pytest.raises(InvalidArgumentError, match=r"latents must be \[B, h, w, 12\]"):
        models.decode_latents(vae, params, images(1, 4, 4, 3))
