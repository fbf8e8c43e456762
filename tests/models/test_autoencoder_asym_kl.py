"""The autoencoder with a decoder for inpainting against diffusers' `AsymmetricAutoencoderKL`, both ways."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers_reference import opened_by_diffusers
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError

FIELDS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "down_block_out_channels": (4, 4, 4, 4),
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "up_block_out_channels": (4, 8, 16, 16),
    "norm_num_groups": 4,
    "sample_size": 16,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    theirs = randomised(diffusers.AsymmetricAutoencoderKL(**FIELDS))
    folder = tmp_path_factory.mktemp("asymmetric")
    theirs.save_pretrained(folder)
    return theirs, *checkpoints.load(folder)


def test_agrees_with_diffusers_both_ways(pair, tmp_path, caplog, recwarn):
    theirs, module, params = pair
    x = images(2, 16, 24, 3)
    mask = np.zeros((2, 16, 24, 1), np.float32)
    mask[:, 3:9, 5:] = 1

    @jax.jit
    def both_ways(params, x, mask):
        latents = models.encode_latents(module, params, x)
        plain = models.decode_latents(module, params, latents)
        return latents, plain, models.decode_latents(module, params, latents, image=x, mask=mask)

    latents, plain, kept = both_ways(params, x, mask)
    with torch.no_grad():
        z = theirs.encode(to_torch(x)).latent_dist.mean
        assert_agrees(latents, 0.18215 * z)
        assert_agrees(plain, theirs.decode(z).sample)
        assert_agrees(kept, theirs.decode(z, image=to_torch(x), mask=to_torch(mask)).sample)
    checkpoints.save(tmp_path, module, params)
    opened = opened_by_diffusers(theirs, tmp_path, caplog, recwarn)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["asymmetric-vae-x1.5", "asymmetric-vae-x2"])
def test_presets_have_the_published_parameters(name):
    config = models.config_to_dict(models.PRESETS[name])
    with torch.device("meta"):
        theirs = diffusers.AsymmetricAutoencoderKL(**{k: v for k, v in config.items() if k[0] != "_"})
    assert models.count_params(name) == sum(p.numel() for p in theirs.parameters())


def test_what_cannot_be_is_refused(pair):
    _, module, params = pair
    z, x, mask = np.zeros((1, 2, 2, 4)), np.zeros((1, 16, 16, 3)), np.zeros((1, 16, 16, 1))
    z, x, mask = (value.astype(np.float32) for value in (z, x, mask))
    for words, options in {
        "come together": {"image": x},
        r"mask must be \[1, 16, 16, 1\]": {"image": x, "mask": mask[:, :8]},
        "tiling and slicing cannot be combined": {"image": x, "mask": mask, "slicing": True},
    }.items():
        with pytest.raises(InvalidArgumentError, match=words):
            models.decode_latents(module, params, z, **options)
    plain = models.build("mini-autoencoder")
    with pytest.raises(InvalidArgumentError, match="for the decoder of AsymmetricAutoencoderKL"):
        models.decode_latents(plain, models.shapes(plain), z, image=x, mask=mask)
    with pytest.raises(InvalidArgumentError, match="they must be as many"):
        dataclasses.replace(module.config, down_block_out_channels=(4,))
    flat = dataclasses.replace(module.config, up_block_out_channels=(4, 16, 16, 16))
    with pytest.raises(InvalidArgumentError, match="must double over four levels"):
        models.shapes(models.from_config(flat))
