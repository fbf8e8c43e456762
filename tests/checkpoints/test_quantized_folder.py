"""Quantised networks in folders: bit for bit, by a config that says how, never whole in memory."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from flax import traverse_util

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, InvalidArgumentError

CONFIG = "config.json"


def quantised(bits, scan=False, **changes):
    module = models.build("tiny-dit", hidden_size=32, depth=2, num_heads=2, scan=scan)
    draws = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draws.normal(size=leaf.shape).astype(np.float32)), models.shapes(module)
    )
    how = models.quantization(bits, **changes)
    peaks = {
        path[:-1]: np.ones((*leaf.shape[:-2], leaf.shape[-2]))
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel"
    }
    return module, models.quantize(module, params, how, peaks if how.smooth is not None else None)


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize(
    ("bits", "changes"),
    [("int8", {}), ("fp8", {"scan": True}), ("int4", {"scan": True}), ("int4", {"smooth": 0.5, "rank": 3})],
)
def test_it_is_read_back_bit_for_bit(tmp_path, bits, changes):
    module, small = quantised(bits, **changes)
    checkpoints.save(tmp_path, module, small)
    again, params = checkpoints.load(tmp_path)
    assert again == module and models.how_quantized(params) == models.how_quantized(small)
    assert_equal(params, small)
    entries = json.loads((tmp_path / CONFIG).read_text())["quantization_config"]
    assert entries["quant_method"] == "jaxldm" and entries["weights"] == bits
    size = (tmp_path / checkpoints.folder.WEIGHTS_FILE).stat().st_size
    assert models.param_bytes(small) <= size <= models.param_bytes(small) + 20_000  # the header


def test_the_file_is_plain_safetensors(tmp_path):
    checkpoints.save(tmp_path, *quantised("int8"))
    tensors = safetensors.numpy.load_file(tmp_path / checkpoints.folder.WEIGHTS_FILE)
    codes, scales = (tensors[f"blocks.1.attn.qkv.kernel.{name}"] for name in ("codes", "scales"))
    assert codes.dtype == np.int8 and codes.shape == (32, 96) and scales.shape == (1, 96)
    assert "blocks.1.attn.qkv.weight" not in tensors and "pos_embed" not in tensors


def test_another_dtype_is_that_of_what_is_not_quantised(tmp_path):
    module, small = quantised("fp8", rank=2)
    checkpoints.save(tmp_path, module, small)
    again, params = checkpoints.load(tmp_path, dtype="float16")
    assert again.config.dtype == "float16"
    kernel = params["blocks_0"]["attn"]["qkv"]["kernel"]
    assert kernel.codes.dtype == jnp.float8_e4m3fn and kernel.scales.dtype == jnp.float32
    assert params["x_embedder"]["proj"]["kernel"].dtype == jnp.float16


def test_a_branch_widened_by_an_adapter_is_read_back(tmp_path):
    module, small = quantised("int8", scan=True)
    lora = jax.tree.map(
        lambda leaf: leaf + 1, models.init_lora(jax.random.key(0), models.shapes(module), rank=3)
    )
    both = models.apply_lora(small, lora)
    checkpoints.save(tmp_path, module, both)
    assert_equal(checkpoints.load(tmp_path)[1], both)


def test_loading_never_holds_the_whole_weights(tmp_path):
    """The peak of what Python and NumPy allocate is near the bytes that stay, far below those of float32."""
    module = models.build("tiny-dit", hidden_size=768, depth=1)
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        models.quantized_shapes(module, models.quantization("int8", modulation="int8")),
    )
    checkpoints.save(tmp_path, module, zeros)
    entries = checkpoints.read_config(tmp_path)  # JSON is read into 32 MB
    tracemalloc.start()
    _, params = checkpoints.folder.load_as(entries, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = models.param_bytes(models.shapes(module))
    assert models.param_bytes(params) < 0.3 * whole and peak < 0.35 * whole, (peak, whole)


@pytest.mark.parametrize("scan", [False, True])
def test_a_lora_file_is_added_to_quantised_weights(tmp_path, scan):
    module, small = quantised("int4", scan=scan)
    lora = jax.tree.map(
        lambda leaf: leaf + 0.1,
        models.init_lora(jax.random.key(0), models.shapes(module), rank=2, targets=["*/attn/qkv"]),
    )
    checkpoints.save_lora(tmp_path / "lora.safetensors", {"transformer": lora})
    opened = checkpoints.load_lora(tmp_path / "lora.safetensors")
    merged = checkpoints.merge_lora({"transformer": (module, small)}, opened, 0.5)["transformer"][1]
    expected = checkpoints.merge_lora({"transformer": (module, models.dequantize(small))}, opened, 0.5)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (models.dequantize(merged), expected["transformer"][1])), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    changed = [
        path
        for path, leaf in traverse_util.flatten_dict(merged).items()
        if leaf is not traverse_util.flatten_dict(small)[path]
    ]
    assert {path[-2] for path in changed} == {"qkv"}


def change_config(folder, **changes):
    entries = json.loads((folder / CONFIG).read_text())
    entries["quantization_config"] |= changes
    (folder / CONFIG).write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "int3"}, "int3"),
        ({"weights": "int4"}, "do not fit"),
        ({"rank": "many"}, "rank"),
        ({"colour": 3}, "unknown key 'colour'"),
        (
            {"quant_method": "bitsandbytes"},
            "quantization_config is of 'bitsandbytes', whose weights cannot be",
        ),
    ],
)
def test_a_config_that_does_not_say_how_is_refused(tmp_path, changes, words):
    checkpoints.save(tmp_path, *quantised("int8"))
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoints.load(tmp_path)
    assert "\n" not in str(caught.value)


def _whole(name, value):
    return value.astype(jnp.int32) if name.endswith("down") else value


def test_codes_are_not_read_as_those_of_another_kind(tmp_path):
    """Of the same shapes, they would be other numbers."""
    checkpoints.save(tmp_path, *quantised("fp8"))
    change_config(tmp_path, weights="int8")
    with pytest.raises(CheckpointError, match="codes is float8_e4m3fn in the file, int8 in the model"):
        checkpoints.load(tmp_path)
    checkpoints.save(tmp_path / "branch", *quantised("int4"))
    file = next((tmp_path / "branch").glob("*.safetensors"))
    whole = safetensors.flax.load_file(file)
    safetensors.flax.save_file({name: _whole(name, value) for name, value in whole.items()}, file)
    with pytest.raises(CheckpointError, match="down is int32 in the file, floating in the model"):
        checkpoints.load(tmp_path / "branch")


def test_what_other_programs_read_is_refused(tmp_path):
    module, small = quantised("int8")
    with pytest.raises(InvalidArgumentError, match="full precision"):
        checkpoints.save_dit_file(tmp_path / "dit.safetensors", module, small)
    checkpoints.save(tmp_path / "model", module, small)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(InvalidArgumentError, match="leave mesh out"):
        checkpoints.load(tmp_path / "model", sharding=lambda path, shape: device)
    assert checkpoints.module_in(tmp_path / "model") == module
    assert dataclasses.is_dataclass(module.config)
