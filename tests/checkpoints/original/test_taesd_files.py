"""TAESD's original files against the original network, and both ways."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x):
        return (x + self.conv(x)).relu()


class Clamp(nn.Module):
    def forward(self, z):
        return 3 * torch.tanh(z / 3)


def original_encoder(width, channels, blocks):
    """Pixels in [0, 1] -> latents."""
    layers = []
    for level, count in enumerate(blocks):
        inputs, halving = (3, {}) if level == 0 else (width, {"stride": 2, "bias": False})
        layers += [nn.Conv2d(inputs, width, 3, padding=1, **halving), *(Block(width) for _ in range(count))]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


def original_decoder(width, channels, blocks):
    """Latents -> pixels in [0, 1]."""
    layers = [Clamp(), nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for count in blocks[:-1]:
        layers += [Block(width) for _ in range(count)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(
        *layers, *(Block(width) for _ in range(blocks[-1])), nn.Conv2d(width, 3, 3, padding=1)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taesd")
    networks = randomised(original_encoder(4, 2, (1, 2, 1))), randomised(original_decoder(6, 2, (2, 1, 1)))
    paths = folder / "taesd_encoder.pth", folder / "taesd_decoder.safetensors"
    torch.save(networks[0].state_dict(), paths[0])
    save_file(networks[1].state_dict(), paths[1])
    return networks, paths, checkpoints.load_taesd_files(*paths)


def test_agrees_with_the_original_network(files):
    (encoder, decoder), _, (module, params) = files
    assert module.config == models.AutoencoderTinyConfig(
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(6, 6, 6),
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=2,
    )
    x = np.tanh(images(1, 8, 12, 3))
    latents = jax.jit(lambda p, x: models.encode_latents(module, p, x))(params, x)
    decoded = jax.jit(lambda p, z: models.decode_latents(module, p, z))(params, latents)
    with torch.no_grad():
        expected = encoder((to_torch(x) + 1) / 2)
        assert_agrees(latents, expected)
        assert_agrees(decoded, 2 * decoder(expected) - 1)


def test_both_ways_bit_for_bit(files, tmp_path):
    networks, _, (module, params) = files
    paths = tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"
    checkpoints.save_taesd_files(*paths, module, params)
    for network, path in zip(networks, paths, strict=True):
        state = load_file(path)
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("name", "channels"), [("taesd", 4), ("taef1", 16)])
def test_presets_have_the_published_sizes(name, channels):
    with torch.device("meta"):
        networks = (
            original_encoder(64, channels, (1, 3, 3, 3)),
            original_decoder(64, channels, (3, 3, 3, 1)),
        )
    theirs = sorted(tuple(tensor.shape) for network in networks for tensor in network.state_dict().values())
    ours = checkpoints.published(models.shapes(models.build(name)))
    assert sorted(tuple(tensor.shape) for tensor in ours.values()) == theirs


def test_what_cannot_be_read_or_written(files, tmp_path):
    _, (encoder, decoder), (module, params) = files
    with pytest.raises(CheckpointError, match="this is no encoder of TAESD, whose first tensor is 0"):
        checkpoints.load_taesd_files(decoder, encoder)
    save_file(load_file(decoder) | {"4.pool.0.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"left over: decoder\.4\.pool\.0\.weight"):
        checkpoints.load_taesd_files(encoder, tmp_path / "more.safetensors")
    scaled = models.from_config(dataclasses.replace(module.config, scaling_factor=0.5))
    with pytest.raises(InvalidArgumentError, match=r"of scaling_factor 1\.0, not 0\.5"):
        checkpoints.save_taesd_files(encoder, decoder, scaled, params)
