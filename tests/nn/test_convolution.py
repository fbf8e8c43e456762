import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxldm import nn
from jaxldm.nn import convolution


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (4, 2, 1), (1, 1, 0), (3, 2, (0, 1))]
)
def test_conv2d_agrees_with_torch(size, stride, padding):
    module = nn.Conv2d(5, size, stride, padding)
    x = normal(2, 9, 6, 3)
    params = {"kernel": normal(size, size, 3, 5), "bias": normal(5, seed=1)}
    ours = module.apply({"params": params}, x)
    before, after = padding if isinstance(padding, tuple) else (padding, padding)
    padded = torch.nn.functional.pad(channels_first(x), (before, after, before, after))
    weight = torch.from_numpy(params["kernel"].transpose(3, 2, 0, 1).copy())
    expected = torch.nn.functional.conv2d(padded, weight, torch.from_numpy(params["bias"]), stride)
    np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def test_each_channel_by_itself_and_without_a_bias():
    x, kernel = normal(2, 4, 5, 6), normal(3, 3, 1, 6, seed=1)
    ours = nn.Conv2d(6, groups=6, use_bias=False).apply({"params": {"kernel": kernel}}, x)
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    expected = torch.nn.functional.conv2d(channels_first(x), weight, padding=1, groups=6)
    np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize(("size", "padding"), [(3, 1), (5, (2, 0)), (3, 0)])
def test_shifted_products_are_the_convolution_with_its_gradients(size, padding):
    """On a CPU they stand for XLA's own, which other devices run."""
    x, kernel = normal(2, 6, 5, 4), normal(size, size, 1, 4, seed=1)
    sides = (padding, padding) if isinstance(padding, int) else padding

    def grouped(x, kernel):
        options = {"dimension_numbers": convolution.DIMENSIONS, "feature_group_count": 4}
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), (sides, sides), **options)

    def shifted(x, kernel):
        return convolution.shifted_products(x, kernel, sides)

    def with_gradients(function):
        return jax.jit(lambda x, kernel: jax.vjp(function, x, kernel)[1](jnp.cos(function(x, kernel))))

    np.testing.assert_allclose(shifted(x, kernel), grouped(x, kernel), atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        with_gradients(shifted)(x, kernel),
        with_gradients(grouped)(x, kernel),
    )
    module = nn.Conv2d(4, size, padding=padding, groups=4, use_bias=False, dtype="bfloat16")
    rounded = module.apply({"params": {"kernel": kernel}}, x)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), grouped(x, kernel), atol=0.1)


@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 1)])
def test_transposed_convolution_of_pixels_that_do_not_meet(height, width):
    x, weight = normal(2, height, width, 3), normal(3, 5, 2, 2, seed=1)
    ours = nn.ConvTranspose2x2(5).apply({"params": {"weight": weight}}, x)
    expected = torch.nn.functional.conv_transpose2d(channels_first(x), torch.from_numpy(weight), stride=2)
    np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (1, 1), (4, 5), (2, 9)])
def test_transposed_convolution_is_that_of_torch_with_its_gradients(height, width):
    x, weight, bias = normal(2, height, width, 3), normal(3, 5, 4, 4, seed=1), normal(5, seed=2)
    direction = normal(2, 2 * height, 2 * width, 5, seed=3)
    module = nn.ConvTranspose4x4(5)

    def along(params, x):
        return jnp.vdot(module.apply({"params": params}, x), direction)

    params = {"weight": weight, "bias": bias}
    ours = module.apply({"params": params}, x)
    gradient, gradient_x = jax.jit(jax.grad(along, argnums=(0, 1)))(params, x)

    inputs = [channels_first(x), torch.from_numpy(weight), torch.from_numpy(bias)]
    for tensor in inputs:
        tensor.requires_grad_()
    expected = torch.nn.functional.conv_transpose2d(*inputs, stride=2, padding=1)
    expected.backward(channels_first(direction))
    np.testing.assert_allclose(ours, expected.detach().numpy().transpose(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(gradient_x, inputs[0].grad.numpy().transpose(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(gradient["weight"], inputs[1].grad.numpy(), atol=1e-3)
    np.testing.assert_allclose(gradient["bias"], inputs[2].grad.numpy(), atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 1), (2, 1)])
def test_convolution_of_the_doubled_image(monkeypatch, height, width, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, kernel = normal(2, height, width, 3), normal(3, 3, 3, 5, seed=1)
    doubled = torch.nn.functional.interpolate(channels_first(x), scale_factor=2)
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    expected = torch.nn.functional.conv2d(doubled, weight, padding=1).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(nn.conv_of_doubled(jnp.asarray(x), jnp.asarray(kernel)), expected, atol=1e-4)
