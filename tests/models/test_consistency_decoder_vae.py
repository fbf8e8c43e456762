"""The consistency decoder against diffusers' `ConsistencyDecoderVAE`, both ways, with the same noise."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import consistency_decoder_vae
from diffusers.schedulers import scheduling_consistency_decoder
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError, UnknownNameError

FIELDS = {
    "encoder_block_out_channels": (4, 4),
    "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
    "encoder_layers_per_block": 1,
    "encoder_norm_num_groups": 2,
    "decoder_block_out_channels": (4, 8),
    "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "decoder_layers_per_block": 1,
    "decoder_norm_num_groups": 2,
    "sample_size": 8,
}


def test_agrees_with_diffusers_both_ways(tmp_path, caplog, recwarn, monkeypatch):
    theirs = randomised(diffusers.ConsistencyDecoderVAE(**FIELDS))
    theirs.save_pretrained(tmp_path / "theirs")
    module, params = checkpoints.load(tmp_path / "theirs")
    x, noise = images(2, 8, 12, 3), images(2, 2, 8, 12, 3)
    queue = [to_torch(each) for each in noise]
    for where in (consistency_decoder_vae, scheduling_consistency_decoder):
        monkeypatch.setattr(where, "randn_tensor", lambda *shape, **options: queue.pop(0))

    @jax.jit
    def both_ways(params, x, noise):
        z = module.apply({"params": params}, x, method="encode").mean
        return z, module.apply({"params": params}, z, noise, method="decode")

    z, decoded = both_ways(params, x, noise)
    with torch.no_grad():
        expected = theirs.encode(to_torch(x)).latent_dist.mean
        assert_agrees(z, expected)
        assert_agrees(decoded, theirs.decode(expected).sample)
    one, other = (models.decode_latents(module, params, 0.18215 * z[:count]) for count in (1, 2))
    np.testing.assert_allclose(one, other[:1], atol=1e-4)  # noise of a fixed key, the same for every image
    checkpoints.save(tmp_path / "ours", module, params)
    opened = opened_by_diffusers(theirs, tmp_path / "ours", caplog, recwarn)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


def test_the_preset_has_the_published_parameters():
    with torch.device("meta"):
        theirs = diffusers.ConsistencyDecoderVAE()
    assert models.count_params("consistency-decoder") == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"latent_channels": 8}, InvalidArgumentError, "for latents of 4 channels, not 8"),
        ({"decoder_in_channels": 6}, InvalidArgumentError, "takes 3 \\+ 4 channels"),
        ({"decoder_num_train_timesteps": 1000}, InvalidArgumentError, "more than 1008"),
        ({"decoder_up_block_types": ("UpBlock2D",) * 2}, UnknownNameError, "UpBlock2D"),
    ],
)
def test_configs_that_cannot_be(changes, kind, words):
    with pytest.raises(kind, match=words):
        dataclasses.replace(models.ConsistencyDecoderVAEConfig(**FIELDS), **changes)
