"""Where loaded parameters are, in which dtype, and what loading them takes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxldm import checkpoints, models
from jaxldm.checkpoints import names
from jaxldm.errors import InvalidArgumentError, UnknownNameError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model():
    module = models.build("tiny-dit", sample_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=7)
    rng = np.random.default_rng(0)
    return module, jax.tree.map(lambda s: rng.standard_normal(s.shape, s.dtype), models.shapes(module))


@pytest.fixture
def saved(model, tmp_path):
    checkpoints.save(tmp_path, *model)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_parameters_and_of_computing(saved, model, dtype):
    module, params = checkpoints.load(saved, dtype=dtype)
    assert module.config == dataclasses.replace(model[0].config, dtype=dtype)
    jax.tree.map(
        lambda ours, first: np.testing.assert_array_equal(ours, first.astype(dtype)), params, model[1]
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_sixteen_bits_survive_bit_for_bit(saved, model, tmp_path):
    for dtype in ("bfloat16", "float16"):
        module, params = checkpoints.load(saved, dtype=dtype)
        checkpoints.save(tmp_path / dtype, module, params)
        again, back = checkpoints.load(tmp_path / dtype, dtype=dtype)
        assert again == module
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16)), back, params
        )


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_stored_dtypes(saved, stored, dtype):
    state = {name: tensor.to(stored) for name, tensor in safetensors.torch.load_file(saved / WEIGHTS).items()}
    safetensors.torch.save_file(state, saved / WEIGHTS)
    ours = checkpoints.to_state_dict(checkpoints.load(saved, dtype=dtype)[1])
    for name, tensor in ours.items():
        wanted = state[name].to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(tensor.astype(np.float32), wanted, name)


def test_an_unknown_dtype(saved):
    with pytest.raises(UnknownNameError, match="bfloat16"):
        checkpoints.load(saved, dtype="bfloat")


def test_whole_numbers_keep_their_dtype():
    template = {"table": np.zeros(3, np.int32), "linear": {"kernel": np.zeros((2, 2), np.float32)}}
    params = checkpoints.from_state_dict(checkpoints.to_state_dict(template), template, dtype="bfloat16")
    assert params["table"].dtype == np.int32 and params["linear"]["kernel"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("place", [lambda d: d, SingleDeviceSharding], ids=["device", "sharding"])
def test_on_the_device_that_is_named(saved, model, place):
    device = jax.devices()[5]
    params = checkpoints.load(saved, sharding=place(device))[1]
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, model[1])


def test_over_a_mesh_each_device_gets_its_part(saved, model):
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    def split(path, shape):
        fits = path[-1] == "kernel" and shape[-1] % 4 == 0
        return NamedSharding(
            mesh, PartitionSpec(*[None] * (len(shape) - 1), "fsdp") if fits else PartitionSpec()
        )

    params = checkpoints.load(saved, dtype="bfloat16", sharding=split)[1]
    qkv = params["blocks_0"]["attn"]["qkv"]
    assert {shard.data.shape for shard in qkv["kernel"].addressable_shards} == {(16, 12)}
    assert {shard.data.shape for shard in qkv["bias"].addressable_shards} == {(48,)}
    assert len(qkv["bias"].addressable_shards) == 8
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), params, model[1])
    whole = checkpoints.load(saved, sharding=NamedSharding(mesh, PartitionSpec()))[1]
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(whole))
    jax.tree.map(np.testing.assert_array_equal, whole, model[1])


def test_each_part_is_read_alone(saved, model, monkeypatch):
    """A split kernel is never read whole: what is copied out of the file is what a device has of it."""
    copied, own = [], names._ready
    monkeypatch.setattr(names, "_ready", lambda view, dtype: copied.append(view.shape) or own(view, dtype))
    mesh = models.make_mesh(8, fsdp=4, tensor=2)
    params = checkpoints.load(saved, sharding=models.sharding_of(mesh))[1]
    jax.tree.map(np.testing.assert_array_equal, params, model[1])
    parts = [shard.data.shape for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    assert sorted(copied) == sorted(parts)
    assert parts.count((4, 24)) >= 8 and (16, 48) not in copied  # qkv


def test_saving_what_is_split_over_a_mesh(saved, model, tmp_path):
    sharding = NamedSharding(Mesh(jax.devices()[:2], "fsdp"), PartitionSpec())
    module, params = checkpoints.load(saved, sharding=sharding)
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), params)
    checkpoints.save(tmp_path / "again", module, params)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


def test_a_parameter_that_cannot_be_split_so(saved):
    sharding = NamedSharding(Mesh(jax.devices(), "fsdp"), PartitionSpec("fsdp"))
    with pytest.raises(InvalidArgumentError, match=r"\w+/\w+.*\(.*\), cannot be split .*\(path, shape\)"):
        checkpoints.load(saved, sharding=sharding)


def test_parameters_do_not_live_in_the_file(saved, model):
    params = checkpoints.load(saved)[1]
    size = (saved / WEIGHTS).stat().st_size
    with (saved / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * size)
    jax.tree.map(np.testing.assert_array_equal, params, model[1])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """115 MB in three shards; the largest tensor has 6 MB."""
    folder = tmp_path_factory.mktemp("large")
    module = models.build("tiny-dit", hidden_size=512, depth=6, num_heads=4)
    params = jax.tree.map(lambda spec: np.ones(spec.shape, spec.dtype), models.shapes(module))
    checkpoints.save(folder, module, params, max_shard_size=40 * 10**6)
    return folder


def memory(way, folder, *dtype):
    """(growth beyond the parameters, bytes of the largest shard)."""
    script = Path(__file__).with_name("loading_memory.py")
    out = subprocess.run(
        [sys.executable, script, way, folder, *dtype], check=True, capture_output=True, text=True
    ).stdout
    grown, parameters = map(int, out.split())
    return grown - parameters, max(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("how", [("load",), ("load", "bfloat16"), ("split", "bfloat16")])
def test_loading_takes_less_than_a_shard_of_host_memory(large, how):
    """Beyond the parameters themselves, whole or split over a mesh: those of no device are held twice."""
    extra, shard = memory(how[0], large, *how[1:])
    assert extra < 1.3 * shard


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_the_measure_sees_a_state_dictionary_in_memory(large):
    extra, shard = memory("all at once", large)
    assert extra > 1.3 * shard
