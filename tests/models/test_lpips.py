"""LPIPS against the package lpips, with the same random networks and the published heads."""

import types

import jax
import numpy as np
import pytest
import torch
from torch_fidelity_reference import reference
from torch_reference import images, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError

VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16(pretrained):
    """torchvision's `vgg16().features`."""
    layers, channels = [], 3
    for width in VGG:
        if width == "M":
            layers.append(torch.nn.MaxPool2d(2, 2))
        else:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
            channels = width
    return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


def alexnet(pretrained):
    """torchvision's `alexnet().features`."""
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    layers = [conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, padding=2), relu(), pool(3, 2)]
    for inside, out in ((192, 384), (384, 256), (256, 256)):
        layers += [conv(inside, out, 3, padding=1), relu()]
    layers.append(pool(3, 2))
    return types.SimpleNamespace(features=torch.nn.Sequential(*layers))


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_distances_agree_with_the_package(net, tmp_path, monkeypatch):
    package = reference("lpips")
    networks = reference("lpips.pretrained_networks")
    monkeypatch.setattr(networks, "tv", types.SimpleNamespace(vgg16=vgg16, alexnet=alexnet))
    torch.manual_seed(0)
    theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = {}
    for part in range(1, 6):
        for name, tensor in getattr(theirs.net, f"slice{part}").state_dict().items():
            state[f"features.{name}"] = 2 * tensor  # so that something is left behind so many layers
            tensor *= 2
    state["classifier.6.bias"] = torch.zeros(1000)  # in torchvision's file, and not used
    torch.save(state, tmp_path / "net.pth")
    loaded = checkpoints.load_lpips(tmp_path / "net.pth")
    assert loaded.module.net == net
    x, y = np.tanh(images(2, 40, 36, 3)), np.tanh(images(2, 40, 36, 3, seed=1))
    with torch.no_grad():
        expected = theirs(to_torch(x), to_torch(y)).flatten().numpy()
    found = jax.jit(loaded.module.apply)({"params": loaded.params}, x, y)
    assert (expected > 0.01).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_heads_are_the_published_ones():
    for net in ("vgg", "alex"):
        heads = models.lpips_heads(net)
        assert list(heads) == [f"lin{n}.model.1.weight" for n in range(5)]
        assert all((head >= 0).all() and head.dtype == np.float32 for head in heads.values())


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"vgg16-397923af\.pth"):
        torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
        checkpoints.load_lpips(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"first features\.0\.bias"):
        torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "x.pth")
        checkpoints.load_lpips(tmp_path / "x.pth")
    with pytest.raises(UnknownNameError, match="'squeeze'"):
        models.lpips_heads("squeeze")
    small = np.zeros([1, 8, 8, 3], np.float32)
    with pytest.raises(InvalidArgumentError, match="at least 16 pixels"):
        jax.eval_shape(lambda: models.LPIPS("vgg").init(jax.random.key(0), small, small))
