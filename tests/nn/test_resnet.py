import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxldm import nn
from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.initialization import init_params
from jaxldm.nn.resnet import upsample_nearest


def test_nearest_upsampling_to_any_size_of_a_skip_agrees_with_torch():
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 5)).astype(np.float32)
    identity = {"conv": {"kernel": np.zeros((3, 3, 5, 5), np.float32), "bias": np.zeros(5, np.float32)}}
    identity["conv"]["kernel"][1, 1] = np.eye(5)
    for size in ((8, 6), (7, 6), (8, 5), (7, 5)):
        ours = nn.Upsample2D().apply({"params": identity}, x, size)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), size=size
        )
        np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), atol=1e-6)
    np.testing.assert_array_equal(upsample_nearest(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))
    with pytest.raises(InvalidArgumentError, match="cannot be doubled"):
        nn.Upsample2D().apply({"params": identity}, x, (6, 6))


@pytest.mark.parametrize(("padding", "expected"), [(1, (4, 3)), (0, (3, 3))])
def test_downsampling_halves_up_or_down(padding, expected):
    module = nn.Downsample2D(padding)
    out = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((1, 7, 6, 4)))[0]
    assert out.shape == (1, *expected, 4)


def test_dropout_acts_in_training_alone():
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 8)).astype(np.float32)
    block, plain = nn.ResnetBlock2D(8, 2, dropout=0.5), nn.ResnetBlock2D(8, 2)
    params = init_params(block, jax.random.key(0), jax.ShapeDtypeStruct(x.shape, x.dtype))
    quiet, expected = (module.apply({"params": params}, x) for module in (block, plain))
    np.testing.assert_array_equal(quiet, expected)
    trained = block.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(trained, quiet)
