"""The benchmark of Stable Diffusion draws the same on both sides, and its table has what was timed."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jaxldm import checkpoints, models, pipelines
from jaxldm.errors import InvalidArgumentError, UnknownNameError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"))
import stable_diffusion as benchmark
import stable_diffusion_pairs as pairs

STEPS = 2


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    pairs.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tokenizer_folder):
    torch.manual_seed(0)
    return pairs.their_pipeline("sdxl", "float32", True, tokenizer_folder, torch.device("cpu"))


def test_both_sides_draw_the_same_picture_with_the_same_weights(reference, tmp_path):
    """The weights of diffusers, saved and loaded; the sizes are those of the side that is timed."""
    reference.save_pretrained(tmp_path)
    pipe = pipelines.load(tmp_path)
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32)
    theirs = pairs.their_draw(reference, latents, STEPS, 5.0)
    ours = pairs.our_draw(pipe, latents, STEPS, 5.0)
    assert ours.shape == theirs.shape == (1, 32, 32, 3)
    assert theirs.std() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    timed = pairs.modules("sdxl", "float32", True)
    for name, network in pipe.networks.items():
        assert models.shapes(timed[name]) == jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network.params
        )


def test_both_networks_are_asked_the_same(reference, tmp_path):
    reference.unet.save_pretrained(tmp_path)
    network = pipelines.Network(*checkpoints.load(tmp_path))
    inputs = pairs.network_inputs(network.module, 16)
    ours = np.asarray(pairs.our_network(network, inputs)())
    theirs = pairs.their_network(reference.unet, inputs, "float32")().numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_it_runs_small_and_writes_what_it_measured(tmp_path, capsys):
    options = benchmark.StableDiffusionOptions(
        quick=True,
        dtype="float32",
        rows=("sd15-512",),
        num_inference_steps=STEPS,
        rounds=2,
        compile_backend="eager",
        peak_size=64,
        output_dir=tmp_path,
    )
    benchmark.main(options)
    figures = json.loads((tmp_path / "stable_diffusion.json").read_text())
    text = (tmp_path / "stable_diffusion.md").read_text()
    image, network = figures["rows"]
    assert image["unet_flops"] == STEPS * network["unet_flops"] > 0
    assert (image["model"], image["pixels"]) == ("sd15", 32)
    for row in figures["rows"]:
        assert tuple(row["milliseconds"]) == benchmark.VARIANTS
        assert benchmark.as_line(row) in text
        assert benchmark.as_line(row).count("|") == benchmark.HEAD.splitlines()[0].count("|")
        for name, ms in row["milliseconds"].items():
            share = row["unet_flops"] / (ms / 1e3) / figures["peak_flops_per_second"]
            assert row["fraction_of_peak"][name] == pytest.approx(share)
    assert set(image["compile_seconds"]) == set(benchmark.VARIANTS)
    assert "SMALL SIZES" in text
    assert "SMALL SIZES" in capsys.readouterr().out


def test_random_weights_are_of_the_dtype_and_size_that_was_asked_for():
    module = pairs.modules("sd15", "bfloat16", True)["text_encoder"]
    params = pairs.random_network(module, "bfloat16").params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.shape == (32, 64)]
    assert kernels
    for kernel in kernels:
        assert np.asarray(kernel, np.float32).std() == pytest.approx(32**-0.5, rel=0.1)


def test_operations_are_counted_as_pytorch_counts_them(reference):
    """PyTorch counts products and convolutions alone, XLA every multiplication and addition."""
    module = pairs.modules("sdxl", "float32", True)["unet"]
    inputs = pairs.network_inputs(module, 16)
    with FlopCounterMode(display=False) as counter:
        pairs.their_network(reference.unet, inputs, "float32")()
    assert 0.9 < benchmark.count_flops(module, inputs) / counter.get_total_flops() < 1.3


def test_rows_that_do_not_exist_are_refused():
    assert benchmark.parse_row("sdxl-1024", False) == ("sdxl", 1024)
    with pytest.raises(InvalidArgumentError, match="sd15-512"):
        benchmark.parse_row("sd15-500", False)
    with pytest.raises(UnknownNameError, match="sdxl"):
        benchmark.parse_row("sd3-512", False)
