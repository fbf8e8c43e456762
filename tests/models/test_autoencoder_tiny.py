"""TAESD against diffusers' `AutoencoderTiny`: both ways, and which autoencoders cannot be."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

FIELDS = {
    "encoder_block_out_channels": (4, 4, 4),
    "decoder_block_out_channels": (6, 6, 6),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
    "latent_channels": 3,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    theirs = randomised(diffusers.AutoencoderTiny(**FIELDS, act_fn="silu", scaling_factor=0.5))
    folder = tmp_path_factory.mktemp("tiny")
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder)


def test_agrees_with_diffusers_both_ways(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    x = np.tanh(images(2, 8, 12, 3))

    @jax.jit
    def both_ways(params, x):
        latents = models.encode_latents(module, params, x)
        return latents, models.decode_latents(module, params, 9 * latents)  # beyond what the tanh leaves

    latents, decoded = both_ways(params, x)
    with torch.no_grad():
        expected = 0.5 * theirs.encode(to_torch(x)).latents
        assert_agrees(latents, expected)
        assert_agrees(decoded, theirs.decode(2 * 9 * expected).sample)
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


@pytest.mark.parametrize(("name", "channels"), [("taesd", 4), ("taef1", 16)])
def test_presets_have_the_published_parameters(name, channels):
    with torch.device("meta"):
        theirs = diffusers.AutoencoderTiny(latent_channels=channels)
    assert models.count_params(name) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder_block_out_channels": (6, 6)}, "num_decoder_blocks has 3 levels"),
        ({"decoder_block_out_channels": (6, 4, 4)}, "must all be equal"),
        (
            {"encoder_block_out_channels": (4,), "num_encoder_blocks": (1,)},
            "an encoder of 1 levels and a decoder of 3",
        ),
        ({"latent_magnitude": -1.0}, "latent_magnitude must be positive"),
    ],
)
def test_configs_that_cannot_be(changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        dataclasses.replace(models.AutoencoderTinyConfig(**FIELDS), **changes)


def test_another_kind_of_upsampling_is_refused():
    entries = models.config_to_dict(models.PRESETS["taesd"]) | {"upsample_fn": "bilinear"}
    with pytest.raises(CheckpointError, match="upsample_fn"):
        models.config_from_dict(entries)
