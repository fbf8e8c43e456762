"""Blocks written out and blocks of a scan: the same function of the same published tensors."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxldm import checkpoints, nn
from jaxldm.checkpoints.names import published
from jaxldm.errors import CheckpointError
from jaxldm.nn.block_stack import apply_blocks
from jaxldm.nn.initialization import init_params

X, CONDITION = (
    jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32) for shape in ((2, 5, 8), (2, 8))
)


class Block(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, carry, condition):
        x, total = carry
        x = x + nn.SelfAttention(2, name="attn")(x) + condition[:, None, :]
        return nn.Linear(8, name="mlp")(x), total + x.sum()


class Model(flax.linen.Module):
    scan: bool
    remat: bool = False

    @flax.linen.compact
    def __call__(self, x, condition):
        options = dict(scan=self.scan, remat=self.remat)
        carry = apply_blocks(Block, "blocks", 3, (x, jnp.zeros(())), condition, **options)
        return apply_blocks(Block, "blocks", 2, carry, condition, first=3, **options)


@pytest.fixture(scope="module")
def plain():
    return init_params(Model(False), jax.random.key(0), X, CONDITION)


@pytest.fixture(scope="module")
def stacked(plain):
    template = jax.eval_shape(lambda: Model(True).init(jax.random.key(0), X, CONDITION)["params"])
    return checkpoints.from_state_dict(checkpoints.to_state_dict(plain), template)


def test_parameters_of_a_scan_stand_for_the_published_ones(plain, stacked):
    assert set(stacked) == {"blocks_0to2", "blocks_3to4"}
    assert stacked["blocks_0to2"]["attn"]["qkv"]["kernel"].shape == (3, 8, 24)
    names = checkpoints.to_state_dict(plain)
    back = checkpoints.to_state_dict(stacked)
    assert "blocks.4.attn.qkv.weight" in names
    assert {name: (t.shape, t.tobytes()) for name, t in names.items()} == {
        name: (t.shape, t.tobytes()) for name, t in back.items()
    }
    again = checkpoints.from_state_dict(back, plain)
    jax.tree.map(np.testing.assert_array_equal, again, plain)


@pytest.mark.parametrize("remat", [False, True])
def test_both_forms_are_one_function_with_one_gradient(plain, stacked, remat):
    def loss(params, scan):
        x, total = Model(scan, remat).apply({"params": params}, X, CONDITION)
        return jnp.sum(x**2) + total

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(plain, False)
    other, other_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(stacked, True)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    gradient, other_gradient = map(checkpoints.to_state_dict, (gradient, other_gradient))
    for name, part in gradient.items():
        np.testing.assert_allclose(part, other_gradient[name], rtol=0, atol=1e-5 * np.abs(part).max())


def test_attention_maps_of_a_scan_have_an_axis_of_blocks(stacked):
    _, state = Model(True).apply({"params": stacked}, X, CONDITION, mutable=["intermediates"])
    maps = state["intermediates"]["blocks_0to2"]["attn"]["attention_weights"][0]
    assert maps.shape == (3, 2, 2, 5, 5)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


def test_a_scan_initialises_each_block_as_a_block_alone(plain):
    params = init_params(Model(True), jax.random.key(0), X, CONDITION)
    kernels = np.asarray(params["blocks_0to2"]["attn"]["qkv"]["kernel"])
    assert len(np.unique(kernels)) == kernels.size
    bound = 1 / np.sqrt(8)
    assert 0.9 * bound < np.abs(kernels).max() <= bound


def test_a_stack_is_split_over_devices_as_asked(plain, stacked):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("fsdp",))

    def sharding(path, shape):
        split = path[-1] == "kernel"
        return NamedSharding(mesh, PartitionSpec(None, "fsdp") if split else PartitionSpec())

    params = checkpoints.from_state_dict(checkpoints.to_state_dict(plain), stacked, sharding=sharding)
    kernel = params["blocks_0to2"]["attn"]["qkv"]["kernel"]
    assert kernel.addressable_shards[1].data.shape == (3, 4, 24)
    jax.tree.map(np.testing.assert_array_equal, params, stacked)


def test_what_is_wrong_with_one_block_of_a_stack_is_named(plain, stacked):
    state = checkpoints.to_state_dict(plain)
    del state["blocks.1.mlp.bias"]
    state["blocks.4.mlp.weight"] = np.zeros((8, 9), np.float32)
    with pytest.raises(
        CheckpointError, match=r"missing: blocks\.1\.mlp\.bias.*blocks\.4\.mlp\.weight is \(8, 9\)"
    ):
        checkpoints.from_state_dict(state, stacked)


def test_every_tensor_of_a_stack_can_be_asked_for_by_itself(stacked):
    tensor = published(stacked)["blocks.3.mlp.weight"]
    assert tensor.block == 0 and tensor.shape == (8, 8)
    np.testing.assert_array_equal(tensor, np.asarray(stacked["blocks_3to4"]["mlp"]["kernel"][0]).T)
