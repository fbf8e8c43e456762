import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.normalization import GlobalResponseNorm

from jaxldm import nn


@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_group_norm_and_its_gradient_agree_with_torch(groups, offset):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 5, 3, 12)) + offset).astype(np.float32)
    scale, bias, direction = rng.standard_normal(12), rng.standard_normal(12), rng.standard_normal(x.shape)
    scale, bias, direction = (value.astype(np.float32) for value in (scale, bias, direction))

    def along(x, scale, bias):
        y = nn.group_norm(x, scale, bias, groups, 1e-5)
        return jnp.vdot(y, direction), y

    gradients, ours = jax.jit(jax.grad(along, argnums=(0, 1, 2), has_aux=True))(x, scale, bias)
    inputs = [
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(scale),
        torch.from_numpy(bias),
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    expected = torch.nn.functional.group_norm(inputs[0], groups, inputs[1], inputs[2], 1e-5)
    expected.backward(torch.from_numpy(direction.transpose(0, 3, 1, 2).copy()))
    tolerance = 1e-4 if offset == 0 else 3e-4
    np.testing.assert_allclose(ours, expected.detach().numpy().transpose(0, 2, 3, 1), atol=tolerance)
    np.testing.assert_allclose(gradients[0], inputs[0].grad.numpy().transpose(0, 2, 3, 1), atol=tolerance)
    for ours, tensor in zip(gradients[1:], inputs[1:], strict=True):
        np.testing.assert_allclose(ours, tensor.grad.numpy(), atol=tolerance)


def test_group_norm_takes_its_statistics_in_float32():
    """Mean 100 and spread 1: bfloat16 sums of such numbers lose the spread altogether."""
    x = jnp.asarray(100 + np.random.default_rng(0).standard_normal((1, 16, 16, 8)), jnp.bfloat16)
    y = nn.group_norm(x, jnp.ones(8), jnp.zeros(8), 2, 1e-5).astype(jnp.float32)
    assert abs(float(y.mean())) < 0.02 and abs(float(y.std()) - 1) < 0.02


def test_group_norm_takes_parameters_of_16_bits():
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 8)).astype(np.float32)
    scale, bias = jnp.linspace(0.5, 2, 8, dtype=jnp.bfloat16), jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16)
    ours = nn.GroupNorm(2).apply({"params": {"scale": scale, "bias": bias}}, x)
    expected = nn.group_norm(x, scale.astype(jnp.float32), bias.astype(jnp.float32), 2, 1e-5)
    np.testing.assert_array_equal(ours, expected)


def test_constant_images_become_the_bias():
    y = nn.group_norm(jnp.full((1, 4, 4, 8), 3.7), jnp.ones(8), jnp.arange(8.0), 2, 1e-5)
    np.testing.assert_allclose(y, np.broadcast_to(np.arange(8.0), (1, 4, 4, 8)), atol=5e-3)


def test_layer_norm_agrees_with_torch():
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype(np.float32)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (12,), eps=1e-6).numpy()
    np.testing.assert_allclose(nn.layer_norm(jnp.asarray(x), 1e-6), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_learned_norms_agree_with_torch_with_parameters_of_16_bits(kind):
    rng = np.random.default_rng(0)
    x = (3 + rng.standard_normal((2, 3, 12))).astype(np.float32)
    params = {"scale": jnp.asarray(rng.standard_normal(12), jnp.bfloat16)}
    theirs = getattr(torch.nn, kind)(12, eps=1e-6)
    if kind == "LayerNorm":
        params["bias"] = jnp.asarray(rng.standard_normal(12), jnp.bfloat16)
        theirs.bias.data = torch.from_numpy(np.asarray(params["bias"], np.float32))
    theirs.weight.data = torch.from_numpy(np.asarray(params["scale"], np.float32))
    ours = getattr(nn, kind)(eps=1e-6).apply({"params": params}, x)
    np.testing.assert_allclose(ours, theirs(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_global_response_norm_and_its_gradient_agree_with_diffusers():
    rng = np.random.default_rng(0)
    x, direction = (rng.standard_normal((2, 3, 5, 6)).astype(np.float32) for _ in range(2))
    x[1, :, :, 2] = 0  # a channel that is zero for this image
    params = {name: rng.standard_normal((1, 1, 1, 6)).astype(np.float32) for name in ("gamma", "beta")}
    theirs = GlobalResponseNorm(6)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    inputs = torch.from_numpy(x).requires_grad_()
    expected = theirs(inputs)
    expected.backward(torch.from_numpy(direction))

    def along(x):
        y = nn.GlobalResponseNorm().apply({"params": params}, x)
        return jnp.vdot(y, direction), y

    gradient, ours = jax.jit(jax.grad(along, has_aux=True))(x)
    np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(gradient, inputs.grad.numpy(), atol=1e-4)


def test_modulation_is_per_example_and_the_identity_at_zero():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)))
    np.testing.assert_array_equal(nn.modulate(x, jnp.zeros((2, 4)), jnp.zeros((2, 4))), x)
    shift, scale = jnp.asarray([[1.0] * 4, [2.0] * 4]), jnp.asarray([[0.0] * 4, [1.0] * 4])
    np.testing.assert_allclose(nn.modulate(x, shift, scale), jnp.stack([x[0] + 1, 2 * x[1] + 2]), rtol=1e-6)
