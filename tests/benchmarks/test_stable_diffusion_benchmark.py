"""The benchmark of Stable Diffusion draws the same on both sides, and counts as PyTorch does."""

import jax
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import random_networks
from experiments.benchmarks import stable_diffusion_pairs as pairs
from experiments.benchmarks import stable_diffusion_torch as theirs_side
from jaxldm import checkpoints, models, pipelines

STEPS = 2


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return theirs_side.pipeline("sdxl", "float32", True, torch.device("cpu"))


def test_both_sides_draw_the_same_picture_with_the_same_weights(reference, tmp_path):
    """The weights of diffusers, saved and loaded; the sizes are those of the side that is timed."""
    reference.save_pretrained(tmp_path)
    pipe = pipelines.load(tmp_path)
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32)
    theirs = theirs_side.draw(reference, latents, STEPS, 5.0)
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
    ours = np.asarray(jax.jit(lambda network, inputs: network(**inputs))(network, inputs))
    theirs = theirs_side.network(reference.unet, inputs, "float32")().numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_random_weights_are_of_the_dtype_and_size_that_was_asked_for():
    module = pairs.modules("sd15", "bfloat16", True)["text_encoder"]
    params = random_networks.random_network(module, "bfloat16").params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.shape == (32, 64)]
    assert kernels
    for kernel in kernels:
        assert np.asarray(kernel, np.float32).std() == pytest.approx(32**-0.5, rel=0.1)


def test_random_weights_of_blocks_in_one_scan_do_not_count_the_blocks_as_inputs():
    module = models.build(
        "dit-xl-2", scan=True, depth=4, hidden_size=32, num_heads=2, sample_size=4, num_classes=3
    )
    blocks = random_networks.random_network(module, "float32").params["blocks_0to3"]
    kernel = np.asarray(blocks["mlp"]["fc1"]["kernel"])
    assert kernel.shape == (4, 32, 128)
    assert kernel.std() == pytest.approx(32**-0.5, rel=0.05)
    assert np.asarray(blocks["mlp"]["fc1"]["bias"]).std() == 0


def test_operations_are_counted_as_pytorch_counts_them(reference):
    """Fused attention it does not count at all. Ours are fewer: the doubled image is not convolved itself."""
    module = pairs.modules("sdxl", "float32", True)["unet"]
    inputs = pairs.network_inputs(module, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        theirs_side.network(reference.unet, inputs, "float32")()
    assert 0.9 < random_networks.count_flops(module, inputs) / counter.get_total_flops() < 1.0
