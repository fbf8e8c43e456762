"""Shards, variants and indices, against what diffusers writes and opens."""

import json
import os
from typing import ClassVar

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from jaxldm import checkpoints, models
from jaxldm.errors import CheckpointError, StorageError
from jaxldm.models import clip_text, registry

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, latent_channels=2
    ).eval()


@pytest.fixture
def plain(reference, tmp_path):
    reference.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def sharded(reference, tmp_path):
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def assert_same_weights(params, reference, dtype=torch.float32):
    theirs = {name: tensor.to(dtype) for name, tensor in reference.state_dict().items()}
    ours = checkpoints.to_state_dict(params)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.astype(np.float32), theirs[name].float().numpy(), name)


def test_shards_of_diffusers(sharded, reference):
    assert len(list(sharded.glob(f"{STEM}-*.safetensors"))) > 2
    assert_same_weights(checkpoints.load(sharded)[1], reference)


def test_shards_for_diffusers(plain, reference, tmp_path, caplog):
    module, params = checkpoints.load(plain)
    checkpoints.save(tmp_path / "out", module, params, max_shard_size=20_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob(f"{STEM}-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 20_000 + 4_000  # the bytes of the headers
    opened, report = diffusers.AutoencoderKL.from_pretrained(
        tmp_path / "out", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(report.values()) and not caplog.records
    assert_same_weights(params, opened)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in reference.parameters())
    assert_same_weights(checkpoints.load(tmp_path / "out")[1], reference)


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(plain, tmp_path):
    module, params = checkpoints.load(plain)
    checkpoints.save(tmp_path / "out", module, params, max_shard_size=1)
    shards = list((tmp_path / "out").glob(f"{STEM}-*.safetensors"))
    assert len(shards) == len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load(tmp_path / "out")[1], params)


def test_a_later_save_is_the_one_that_is_opened(plain, tmp_path):
    module, params = checkpoints.load(plain)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    for first, second in ((20_000, 10**9), (10**9, 20_000), (20_000, 30_000)):
        checkpoints.save(tmp_path / "out", module, params, max_shard_size=first)
        checkpoints.save(tmp_path / "out", module, other, max_shard_size=second)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.load(tmp_path / "out")[1], other)
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    places = set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values())
    assert kept == {"config.json", INDEX, *places}


@pytest.mark.parametrize("max_shard_size", ["10GB", "5KB"])
def test_the_only_variant_is_found(reference, tmp_path, max_shard_size):
    half = diffusers.AutoencoderKL.from_config(reference.config)
    half.load_state_dict(reference.state_dict())
    half.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=max_shard_size)
    assert (tmp_path / f"{STEM}.fp16.safetensors").exists() == (max_shard_size == "10GB")
    assert_same_weights(checkpoints.load(tmp_path)[1], reference, torch.float16)
    assert_same_weights(checkpoints.load(tmp_path, variant="fp16")[1], reference, torch.float16)
    with pytest.raises(CheckpointError, match=r"bf16\.safetensors; there are the variants fp16"):
        checkpoints.load(tmp_path, variant="bf16")


def test_plain_files_before_variants_and_no_guess_among_variants(plain, reference):
    weights = plain / f"{STEM}.safetensors"
    ones = {name: torch.ones_like(tensor) for name, tensor in reference.state_dict().items()}
    for variant in ("fp16", "non_ema"):
        safetensors.torch.save_file(ones, plain / f"{STEM}.{variant}.safetensors")
    assert_same_weights(checkpoints.load(plain)[1], reference)
    chosen = checkpoints.load(plain, variant="non_ema")[1]
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(chosen))
    weights.unlink()
    with pytest.raises(CheckpointError, match="variants fp16, non_ema only: choose one"):
        checkpoints.load(plain)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def a_shard(folder, number=0):
    return sorted(folder.glob(f"{STEM}-*.safetensors"))[number]


WRONG_INDEX = {
    "a shard is missing": (lambda f: a_shard(f, 1).unlink(), r"do not exist: .*-00002-of-"),
    "a name without a tensor": (
        lambda f: edit_index(f, lambda index: index["weight_map"].update(ghost=a_shard(f).name)),
        "ghost is not in .*-00001-of-",
    ),
    "a tensor without a name": (
        lambda f: edit_index(f, lambda index: index["weight_map"].pop("encoder.conv_in.bias")),
        r"encoder\.conv_in\.bias is in .* but not in the index",
    ),
    "a tensor in two shards": (
        lambda f: safetensors.torch.save_file(
            safetensors.torch.load_file(a_shard(f, 0)) | safetensors.torch.load_file(a_shard(f, 1)),
            a_shard(f, 1),
        ),
        "is in .*00002-of-.* and not only in .*00001-of-",
    ),
    "no map": (lambda f: edit_index(f, lambda index: index.pop("weight_map")), "no weight_map"),
    "a map of numbers": (lambda f: edit_index(f, lambda i: i.update(weight_map={"a": 1})), "no weight_map"),
    "a file elsewhere": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update(a="../../secret.safetensors")),
        "outside its folder",
    ),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "cannot be read as JSON"),
    "a name twice": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'),
        "'a' occurs twice",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), r"no .*index\.json: copy that, too"),
    "a shard cut off": (lambda f: os.truncate(a_shard(f, 2), 900), r"00003-of.*damaged"),
}


@pytest.mark.parametrize("wrong", WRONG_INDEX)
def test_an_index_that_does_not_agree(sharded, wrong):
    change, words = WRONG_INDEX[wrong]
    change(sharded)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.load(sharded)


def test_a_folder_with_pickles_only(reference, tmp_path):
    reference.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin is a pickle file"):
        checkpoints.load(tmp_path)


def test_what_does_not_fit_is_named_and_counted(plain):
    state = safetensors.torch.load_file(plain / f"{STEM}.safetensors")
    renamed = {f"strange.{name}": tensor for name, tensor in state.items()}
    safetensors.torch.save_file(renamed, plain / f"{STEM}.safetensors")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(plain)
    message = str(caught.value)
    named = [
        f"{what}{name} {tuple(tensor.shape)}"
        for what in ("missing: ", "left over: strange.")
        for name, tensor in state.items()
        if f"{what}{name} {tuple(tensor.shape)}" in message
    ]
    assert {text.split(":")[0] for text in named} == {"missing", "left over"} and len(named) >= 4
    assert message.endswith(f"and {2 * len(state) - len(named)} more")
    assert str(plain) in message and len(message) < 400 + len(str(plain))


def test_a_failing_save_of_shards_keeps_the_model_before(plain, monkeypatch):
    module, params = checkpoints.load(plain)
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, os.strerror(28))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        checkpoints.save(plain, module, params, max_shard_size=20_000)
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == before


class TextTower(clip_text.CLIPTextModel):
    """CLIP's text model that knows one tensor by two names."""

    tied_tensors: ClassVar = {"second": "text_model.final_layer_norm.bias"}


def test_ignored_and_tied_tensors(tmp_path, monkeypatch):
    module = models.build(
        "clip-l", vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    kinds = (TextTower, clip_text.CLIPTextConfig)
    monkeypatch.setitem(registry.ARCHITECTURES, "CLIPTextModel", kinds)
    params = models.init(module, jax.random.key(0))
    checkpoints.save(tmp_path, module, params)
    weights = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}

    def loaded(**tensors):
        safetensors.torch.save_file(tensors, weights)
        return checkpoints.load(tmp_path)[1]

    kept = "text_model.final_layer_norm.bias"
    for tensors in (state | positions, state | {"second": state[kept].clone()}):
        jax.tree.map(np.testing.assert_array_equal, loaded(**tensors), params)
    only_second = {("second" if name == kept else name): tensor for name, tensor in state.items()}
    jax.tree.map(np.testing.assert_array_equal, loaded(**only_second), params)
    with pytest.raises(CheckpointError, match=r"second and .*bias are one tensor"):
        loaded(**state, second=state[kept] + 1)
