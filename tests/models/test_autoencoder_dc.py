"""SANA's deep compression autoencoder against diffusers' `AutoencoderDC`, both ways."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError, UnknownNameError

KINDS = ("ResBlock", "ResBlock", "EfficientViTBlock")
SANA = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": KINDS,
    "decoder_block_types": KINDS,
    "encoder_block_out_channels": (4, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 2, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (3, 5)),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
CONFIGS = {
    "SANA": SANA,
    "pixels as channels, batch norms, no first level, no shortcuts at the latents": SANA
    | {
        "encoder_layers_per_block": (0, 1, 1),
        "decoder_layers_per_block": (0, 1, 1),
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
        "decoder_act_fns": ("relu", "relu", "silu"),
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
    },
}


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    theirs = randomised(diffusers.AutoencoderDC(**CONFIGS[request.param]))
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, *checkpoints.load(tmp_path / "theirs")


def test_agrees_with_diffusers_both_ways(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    x = images(2, 8, 12, 3)

    @jax.jit
    def both_ways(params, x):
        latents = models.encode_latents(module, params, x)
        return latents, models.decode_latents(module, params, latents)

    latents, decoded = both_ways(params, x)
    with torch.no_grad():
        expected = theirs.encode(to_torch(x)).latent
        assert_agrees(latents, 0.41407 * expected)
        assert_agrees(decoded, theirs.decode(expected).sample)
    checkpoints.save(tmp_path / "ours", module, params)
    opened = opened_by_diffusers(theirs, tmp_path / "ours", caplog, recwarn)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    trained = sum(p.numel() for p in theirs.parameters())
    assert models.count_params(module) == trained


def test_the_preset_has_the_published_parameters():
    config = models.config_to_dict(models.PRESETS["sana-dc-ae"])
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**{key: value for key, value in config.items() if key[0] != "_"})
    state = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    shapes = checkpoints.names.published(models.shapes(models.build("sana-dc-ae")))
    assert {name: tensor.shape for name, tensor in shapes.items()} == state


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"encoder_layers_per_block": (1, 0, 1)}, InvalidArgumentError, "can be 0 for the first level alone"),
        ({"decoder_qkv_multiscales": ((), ())}, InvalidArgumentError, "has 2 levels"),
        ({"decoder_norm_types": ()}, InvalidArgumentError, "decoder_norm_types has 0 levels"),
        ({"decoder_act_fns": ("silu",)}, InvalidArgumentError, "decoder_act_fns has 1 levels"),
        ({"decoder_norm_types": "layer_norm"}, UnknownNameError, "layer_norm"),
        ({"attention_head_dim": 3}, InvalidArgumentError, "8 channels cannot be split into heads of 3"),
        ({"latent_channels": 3}, InvalidArgumentError, "no multiple of 3 latent channels"),
        ({"encoder_block_out_channels": (4, 6, 8)}, InvalidArgumentError, "four pixels must become whole"),
    ],
)
def test_configs_that_cannot_be(changes, kind, words):
    with pytest.raises(kind, match=words):
        dataclasses.replace(models.AutoencoderDCConfig(**SANA), **changes)


def test_linear_attention_is_the_quadratic_one_of_few_pixels(pair):
    """diffusers takes another formula below `attention_head_dim` pixels; ours is one."""
    theirs, module, params = pair
    x = images(1, 4, 4, 3)
    with torch.no_grad():
        expected = theirs.encode(to_torch(x)).latent
    ours = module.apply({"params": params}, x, method="encode")
    assert ours.shape == (1, 1, 1, 4)
    np.testing.assert_allclose(ours[0, 0, 0], expected[0, :, 0, 0], atol=1e-4 * expected.abs().max())
