"""The patch discriminator against the layers of PyTorch with the same weights, in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from patch_gan_reference import patch_gan, trained_tensors
from torch_reference import assert_agrees, images, randomised, to_torch

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError

WIDTHS = (6, 8, 10)


@pytest.fixture(scope="module")
def pair():
    theirs = randomised(patch_gan(2, WIDTHS)).train()
    module = models.build("patch-gan", sample_size=16, in_channels=2, block_out_channels=WIDTHS)
    state = {name: tensor.numpy() for name, tensor in trained_tensors(theirs).items()}
    return theirs, module, checkpoints.from_state_dict(state, models.shapes(module))


def test_logits_and_gradients_agree_with_pytorch(pair):
    """Through the moments of the batch, too: the gradient of the images shows them."""
    theirs, module, params = pair
    x = images(3, 17, 14, 2)

    def total(params, x):
        logits = module.apply({"params": params}, x)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), (of_params, of_x) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x)
    seen = to_torch(x).requires_grad_()
    expected = theirs.main(seen)
    expected.sin().sum().backward()
    assert_agrees(logits, expected)
    assert_agrees(of_x, seen.grad)
    found = checkpoints.to_state_dict(of_params)
    for name, tensor in theirs.named_parameters():
        largest = max(1.0, tensor.grad.abs().max())
        np.testing.assert_allclose(found[name], tensor.grad, atol=1e-4 * largest, err_msg=name)


def test_the_moments_are_those_of_the_batch(pair):
    """The same picture has other logits among others."""
    _, module, params = pair
    x = images(4, 16, 16, 2)
    apply = jax.jit(module.apply)
    one, among = apply({"params": params}, x[:2])[0], apply({"params": params}, x)[0]
    assert np.abs(one - among).max() > 1e-2


def test_presets_have_the_published_parameters():
    for channels in (1, 3):
        theirs = patch_gan(channels, (64, 128, 256, 512))
        count = models.count_params(models.build("patch-gan", in_channels=channels))
        assert count == sum(p.numel() for p in theirs.parameters())
    assert models.count_params("patch-gan") == 2_765_633


def test_new_kernels_are_the_published_ones():
    params = models.init(models.build("patch-gan"), jax.random.key(0))
    kernels = [layer["kernel"] for layer in params.values() if "kernel" in layer]
    assert len(kernels) == 5
    for kernel in kernels:
        assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
    assert (params["main_3"]["scale"] == 1).all() and (params["main_3"]["bias"] == 0).all()


@pytest.mark.parametrize("side", [8, 16, 17, 28, 31])
def test_the_number_of_patches_is_what_the_network_gives(side):
    config = models.PRESETS["mini-patch-gan"]
    module, image = models.build("mini-patch-gan"), jax.ShapeDtypeStruct((1, side, 32, 1), jnp.float32)
    if config.patches(side) < 1:
        with pytest.raises(InvalidArgumentError, match=f"{side} pixels is too small"):
            models.build("mini-patch-gan", sample_size=side)
    else:
        logits = jax.eval_shape(lambda p, x: module.apply({"params": p}, x), models.shapes(module), image)
        assert logits.shape == (1, config.patches(side), 6, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        if config.patches(side) >= 1:
            theirs = patch_gan(1, config.block_out_channels).main(torch.zeros(1, 1, side, 32))
            assert theirs.shape[2] == config.patches(side)
