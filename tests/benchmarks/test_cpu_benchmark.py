"""The benchmark compares the same functions, and its table comes from what was timed."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from experiments.benchmarks import cpu, cpu_torch, pairs
from jaxldm import checkpoints, models


def images(pair, batch: int = 2):
    return np.random.default_rng(0).uniform(-1, 1, (batch, *pair.shape)).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def assert_same(ours, theirs):
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_the_u_nets_are_the_same_function(tmp_path):
    pair = pairs.mini_unet(width=4)
    model = pair.theirs().eval()
    model.save_pretrained(tmp_path)
    module, params = checkpoints.load(tmp_path)
    x, t, labels = images(pair), np.array([3, 700]), np.array([1, 10])
    ours = jax.jit(module.apply)({"params": params}, x, jnp.asarray(t, jnp.float32), jnp.asarray(labels))
    assert_same(
        ours, cpu_torch.forward(model, channels_first(x), torch.from_numpy(t), torch.from_numpy(labels))
    )
    assert models.count_params(pair.ours) == models.count_params(module)


def test_the_autoencoders_are_the_same_function(tmp_path):
    pair = pairs.autoencoder(width=4)
    model = pair.theirs().eval()
    model.save_pretrained(tmp_path)
    module, params = checkpoints.load(tmp_path)
    x = images(pair)
    apply = jax.jit(module.apply, static_argnames="method")
    mean = apply({"params": params}, x, method="encode").mean
    assert_same(mean, model.encode(channels_first(x)).latent_dist.mean)
    decoded = apply({"params": params}, mean, method="decode")
    assert_same(decoded, model.decode(channels_first(np.asarray(mean))).sample)
    assert models.count_params(pair.ours) == models.count_params(module)


def test_the_transformers_differ_by_their_repeated_embedders_only():
    """diffusers keeps a timestep and label embedder in each block; the paper, and jaxldm, one for all."""
    pair = pairs.tiny_dit(width=4)
    theirs = dict(pair.theirs().named_parameters())
    embedder = sum(v.numel() for k, v in theirs.items() if k.startswith("transformer_blocks.0.norm1.emb."))
    repeated = (pair.ours.config.depth - 1) * embedder
    assert embedder > 0
    assert models.count_params(pair.ours) == sum(v.numel() for v in theirs.values()) - repeated


def test_a_row_holds_every_variant_and_ratios_of_the_same_round(capsys):
    options = cpu.Cpu(rounds=4, seconds=0.0)
    calls = []
    variants = {"jaxldm": lambda: calls.append("a"), "eager": lambda: calls.append("b")}
    row = cpu.measure("nothing", variants, options)
    assert calls[4:] == ["a", "b"] * 4, "after compiling and warming up, the variants take turns"
    low, median, high = row["ratio_quartiles"]["eager"]
    assert 0 < low <= median <= high
    assert json.loads(json.dumps(row)) == row
    assert capsys.readouterr().out.startswith("| nothing | ")


@pytest.mark.parametrize("compiled_name", [None, "torch.compile"])
def test_a_line_has_as_many_cells_as_the_head(compiled_name):
    names = ["jaxldm", "eager", *([compiled_name] if compiled_name else [])]
    row = {
        "row": "x",
        "milliseconds": dict.fromkeys(names, 2.0),
        "ratio_quartiles": {name: [1.0, 1.5, 2.0] for name in names[1:]},
        "first_call_seconds": dict.fromkeys(names, 3.0),
    }
    assert cpu.as_line(row).count("|") == cpu.HEAD.splitlines()[0].count("|")
    assert "1.50 (1.00 to 2.00)" in cpu.as_line(row)


def test_bare_convolutions_are_found():
    """The convolutions that are timed are those of the architecture: 3x3, and more than ten of them."""
    pair = pairs.mini_unet(width=4)
    found = cpu_torch.convolutions(pair)
    kernels = {tuple(layer.weight.shape) for _, layer in found}
    assert len(found) > 10
    assert all(len(shape) == 4 and shape[2:] == (3, 3) for shape in kernels)


def test_without_pytorch_jaxldm_is_timed_alone(capsys):
    pair = dataclasses.replace(pairs.tiny_dit(4), batch_size=8, num_images=8)
    options = cpu.Cpu(rounds=2, seconds=0.0, num_inference_steps=2)
    rows = list(cpu.measure_pair(pair, options, None))
    assert ["training step" in rows[0]["row"], "DDIM" in rows[1]["row"]] == [True, True]
    for row in rows:
        assert tuple(row["milliseconds"]) == ("jaxldm",) and row["ratio_quartiles"] == {}
        assert cpu.as_line(row).count("|") == cpu.HEAD.splitlines()[0].count("|")


def test_the_benchmarks_are_imported_without_pytorch():
    """In a process where torch, diffusers and transformers cannot be imported."""
    code = """
import importlib, sys
sys.modules.update(dict.fromkeys(("torch", "diffusers", "transformers")))
for name in ("cpu", "fold", "compile_time", "card_jaxldm", "one_card"):
    importlib.import_module(f"experiments.benchmarks.{name}")
import io, json
from experiments.benchmarks import card_worker
answers = io.StringIO()
card_worker.main("torch", {}, io.StringIO(), answers)
assert "ModuleNotFoundError" in json.loads(answers.getvalue())["error"]
"""
    root = pathlib.Path(cpu.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
