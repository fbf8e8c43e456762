import errno
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import checkpoints, models
from jaxldm.checkpoints.safetensors_file import read_safetensors, safetensors_bytes
from jaxldm.errors import CheckpointError, StorageError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_model(seed=0, **overrides):
    module = models.build(
        "mini-autoencoder", **({"block_out_channels": (8, 16), "sample_size": 8} | overrides)
    )
    return module, models.init(module, jax.random.key(seed))


@pytest.fixture
def saved(tmp_path):
    module, params = tiny_model()
    checkpoints.save(tmp_path / "model", module, params)
    return tmp_path / "model"


def test_round_trip_is_bit_exact_and_leaves_two_files(saved):
    module, params = tiny_model()
    loaded_module, loaded = checkpoints.load(saved)
    assert loaded_module == module
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert sorted(os.listdir(saved)) == ["config.json", WEIGHTS]
    assert json.loads((saved / "config.json").read_text())["_class_name"] == "ConvAutoencoder"


def test_not_a_number_and_infinity_survive(tmp_path):
    module, params = tiny_model()
    params["encoder"]["conv_in"]["bias"] = jnp.asarray([np.nan, np.inf, -np.inf, -0.0] * 2)
    checkpoints.save(tmp_path, module, params)
    bias = np.asarray(checkpoints.load(tmp_path)[1]["encoder"]["conv_in"]["bias"])
    assert bias.tobytes() == np.array([np.nan, np.inf, -np.inf, -0.0] * 2, np.float32).tobytes()


def test_half_precision_weights_load_as_float32(tmp_path):
    module, params = tiny_model()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jax.device_get(params))
    checkpoints.save(tmp_path, module, half)
    loaded = checkpoints.load(tmp_path)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), loaded, half)


dtypes = st.sampled_from(["float32", "float64", "float16", "bfloat16", "int64", "int8", "uint8", "bool"])


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=4), dtypes), max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_safetensors_are_what_the_torch_reader_reads(tensors, seed):
    rng = np.random.default_rng(seed)
    arrays = {}
    for i, (shape, dtype) in enumerate(tensors):
        array = np.zeros(shape, jnp.dtype(dtype))
        random_bytes = rng.integers(0, 2, array.nbytes, np.uint8)  # of 0 and 1: a bool holds nothing else
        arrays[f"t{i}"] = random_bytes.view(array.dtype).reshape(shape)
    theirs = safetensors.torch.load(safetensors_bytes(arrays))
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tuple(theirs[name].shape) == array.shape
        assert theirs[name].flatten().view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_reading_is_the_inverse_of_the_torch_writer(tmp_path):
    written = {"a": torch.randn(3, 4), "b": torch.randn(2).to(torch.bfloat16), "c": torch.arange(5)}
    written["d"] = torch.zeros(0, 3)
    safetensors.torch.save_file(written, tmp_path / "x.safetensors")
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(read[name].astype(np.float32), tensor.to(torch.float32).numpy())


def header_size(content):
    return int.from_bytes(content[:8], "little")


DAMAGE = {
    "empty": lambda c: b"",
    "cut in the header": lambda c: c[:50],
    "cut in the data": lambda c: c[:-1],
    "header longer than the file": lambda c: (2**40).to_bytes(8, "little") + c[8:],
    "header that is no JSON": lambda c: c[:8] + b"\xff" * header_size(c) + c[8 + header_size(c) :],
    "tensor past the end": lambda c: c.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
    "bytes too many": lambda c: c + b"more",
    "another file altogether": lambda c: b"<!DOCTYPE html><html>Not found</html>",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_named(saved, damage):
    path = saved / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(DAMAGE[damage](content))
    assert path.read_bytes() != content
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors .*damaged"):
        checkpoints.load(saved)


def test_missing_pieces_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no model folder .*nowhere"):
        checkpoints.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        checkpoints.load(tmp_path)
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="there is no weight file"):
        checkpoints.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"_class_name": "Nonsense"}', "{}"])
def test_a_config_that_is_none_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        checkpoints.load(saved)


def test_weights_of_another_model_are_named_with_both_shapes(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"latent_channels": 5}))
    with pytest.raises(
        CheckpointError, match=r"conv_out\.weight is \(8, 16, 3, 3\) in the file, \(10, 16, 3, 3\)"
    ):
        checkpoints.load(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_per_block": 5000}, r"counts \d+ blocks, but its weights hold"),
        ({"layers_per_block": 10**9}, "layers_per_block must be from 1 to"),
        ({"latent_channels": 2**30}, "latent_channels = 1073741824, but its weights hold"),
    ],
)
def test_sizes_in_a_config_are_compared_with_the_weights_before_anything_is_built(tmp_path, changes, words):
    module = models.AutoencoderKL(
        models.AutoencoderKLConfig(sample_size=8, block_out_channels=(8,), norm_num_groups=4)
    )
    saved = tmp_path / "vae"
    checkpoints.save(saved, module, models.init(module, jax.random.key(0)))
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))
    before = time.process_time()
    for read in (checkpoints.load, checkpoints.module_in):
        with pytest.raises(CheckpointError, match=words):
            read(saved)
    assert time.process_time() - before < 1


def test_a_config_without_weights_may_not_claim_more_blocks_than_any_model_has(saved):
    (saved / WEIGHTS).unlink()
    assert checkpoints.module_in(saved).config.block_out_channels == (8, 16)
    entries = models.config_to_dict(models.PRESETS["dit-s-8"])
    (saved / "config.json").write_text(json.dumps(entries | {"depth": 9000}))
    with pytest.raises(CheckpointError, match="counts 9000 blocks"):
        checkpoints.module_in(saved)


def test_weights_of_another_kind_of_number_are_refused(saved):
    tensors = read_safetensors(saved / WEIGHTS)
    name = next(iter(tensors))
    (saved / WEIGHTS).write_bytes(safetensors_bytes(tensors | {name: tensors[name].astype(np.int32)}))
    with pytest.raises(CheckpointError, match=f"{name} is int32 in the file, floating in the model"):
        checkpoints.load(saved)


def test_a_pipe_in_place_of_the_weights_is_refused(saved):
    (saved / WEIGHTS).unlink()
    os.mkfifo(saved / WEIGHTS)
    with pytest.raises(CheckpointError, match="is a pipe or device, not a weight file"):
        checkpoints.load(saved)


@pytest.mark.parametrize("failing_file", ["config.json", WEIGHTS])
def test_a_full_disk_loses_nothing_already_saved(saved, monkeypatch, failing_file):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    real = os.fsync

    def full(descriptor):
        if failing_file in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    module, params = tiny_model(seed=1, latent_channels=3)
    with pytest.raises(StorageError, match="disk is full"):
        checkpoints.save(saved, module, params)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(StorageError):
        checkpoints.save(tmp_path / "model", *tiny_model())
    assert (tmp_path / "model").read_text() == "in the way"
