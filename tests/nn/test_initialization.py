import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxldm import models, nn
from jaxldm.nn import initialization
from jaxldm.nn.initialization import drawn_in_parts, init_params


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("ours", "inputs", "theirs"),
    [
        (nn.Linear(64), spec(1, 48), torch.nn.Linear(48, 64)),
        (nn.Conv2d(64, 3), spec(1, 4, 4, 16), torch.nn.Conv2d(16, 64, 3)),
        (nn.ConvTranspose4x4(64), spec(1, 4, 4, 16), torch.nn.ConvTranspose2d(16, 64, 4)),
        (nn.Embedding(50, 20), spec(1, dtype=jnp.int32), torch.nn.Embedding(50, 20)),
        (nn.GroupNorm(2), spec(1, 2, 2, 8), torch.nn.GroupNorm(2, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_start_as_those_of_torch(ours, inputs, theirs):
    params = init_params(ours, jax.random.key(0), inputs)
    weight = next(value for name, value in params.items() if name != "bias")
    pairs = [(weight, theirs.weight)] + ([(params["bias"], theirs.bias)] if "bias" in params else [])
    for value, reference in pairs:
        reference = reference.detach().numpy()
        assert value.size == reference.size and value.dtype == jnp.float32
        noise = 4 / np.sqrt(value.size)
        np.testing.assert_allclose(value.std(), reference.std(), rtol=noise)
        np.testing.assert_allclose(value.mean(), reference.mean(), atol=1.5 * noise * reference.std() + 1e-9)
        if not isinstance(theirs, torch.nn.Embedding):  # the rest is bounded
            np.testing.assert_allclose(np.abs(value).max(), np.abs(reference).max(), rtol=noise)


def test_values_drawn_at_once_have_the_distributions_of_values_drawn_one_by_one():
    """One way cuts all parameters out of two rows, the other draws each: same names, same distributions."""
    module = nn.ResnetBlock2D(16, num_groups=2)
    inputs = spec(1, 4, 4, 8), spec(1, 32)
    at_once = init_params(module, jax.random.key(0), *inputs)
    zeros = [jnp.zeros(i.shape) for i in inputs]
    one_by_one = jax.jit(lambda key: module.init(key, *zeros)["params"])(jax.random.key(1))
    assert jax.tree.structure(at_once) == jax.tree.structure(one_by_one)
    for ours, reference in zip(jax.tree.leaves(at_once), jax.tree.leaves(one_by_one), strict=True):
        assert ours.shape == reference.shape and ours.dtype == reference.dtype
        noise = 5 / np.sqrt(ours.size)
        np.testing.assert_allclose(ours.std(), reference.std(), rtol=noise)
        np.testing.assert_allclose(ours.mean(), reference.mean(), atol=1.5 * noise * reference.std() + 1e-9)


def test_a_key_gives_one_start_and_another_key_another():
    module = nn.Linear(8)
    first, again, other = (init_params(module, jax.random.key(k), spec(1, 4)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first["kernel"], again["kernel"])
    assert not np.any(np.asarray(first["kernel"]) == np.asarray(other["kernel"]))
    together = init_params(flax.linen.Sequential([module, nn.Linear(8)]), jax.random.key(0), spec(1, 8))
    rows = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(together)])
    assert len(np.unique(rows)) == len(rows)  # no number serves twice


def test_modules_without_initializers_start_as_in_flax():
    module = flax.linen.Dense(3)
    expected = module.init(jax.random.key(0), jnp.zeros((1, 2)))["params"]
    ours = init_params(module, jax.random.key(0), spec(1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)


class DenseWithLabels(flax.linen.Module):
    """A layer of Flax's own, with an input that may be left out."""

    @flax.linen.compact
    def __call__(self, x, labels=None):
        return flax.linen.Dense(3)(x)


def test_an_input_may_be_none():
    params = init_params(DenseWithLabels(), jax.random.key(0), spec(1, 2), None)
    assert params["Dense_0"]["kernel"].shape == (2, 3)


class OfEachKind(flax.linen.Module):
    """Uniform, normal and constant parameters, one after another."""

    @flax.linen.compact
    def __call__(self, x):
        x = nn.Linear(64)(x) + nn.Embedding(48, 64)(jnp.zeros(x.shape[:1], jnp.int32))
        return nn.Linear(24)(nn.LayerNorm()(nn.Linear(64)(x)))


@pytest.mark.parametrize("module", [OfEachKind(), flax.linen.Dense(64)], ids=["in rows", "by Flax"])
def test_parameters_drawn_in_parts_are_those_drawn_at_once(module):
    place = models.sharding_of(models.make_mesh(8, fsdp=2, tensor=2))
    at_once = init_params(module, jax.random.key(3), spec(2, 32))
    with drawn_in_parts(place):
        parts = init_params(module, jax.random.key(3), spec(2, 32))
    assert jax.tree.structure(at_once) == jax.tree.structure(parts)
    for path, found in flax.traverse_util.flatten_dict(parts).items():
        assert found.sharding == place(path, found.shape), path
        expected = flax.traverse_util.flatten_dict(at_once)[path]
        close = (
            dict(rtol=3e-7, atol=0) if "embedding" in path else dict(rtol=0, atol=0)
        )  # normal: erf's inverse
        np.testing.assert_allclose(found, expected, **close, err_msg=str(path))


def test_a_device_draws_its_part_alone():
    mesh, whole = models.make_mesh(8, fsdp=4, tensor=2), 4 * 512 * 1024
    sharding = models.sharding_of(mesh)(("fc1", "kernel"), (512, 1024))
    for kind in ("uniform", "normal", "constant"):
        draw = initialization._one_drawn(initialization.Initializer(kind, 0.1), (512, 1024), sharding)
        plan = draw.lower(np.zeros(4, np.uint32)).compile().memory_analysis()
        assert plan.output_size_in_bytes == whole // 8
        assert plan.temp_size_in_bytes < 8 * whole // 8 + 4096, kind


def test_places_in_a_row_go_on_behind_the_largest_number_of_32_bits():
    counts = 2**32 - 2 + np.arange(4)
    high, low = (part.astype(np.uint32) for part in np.divmod(counts, 2**32))
    first, second = jax.extend.random.threefry2x32_p.bind(jnp.uint32(5), jnp.uint32(7), high, low)
    found = initialization._bits_from(jnp.array([5, 7, 0, 2**32 - 2], jnp.uint32), 32, (2, 2))
    np.testing.assert_array_equal(np.ravel(found), first ^ second)
