"""The benchmark of transformers: both sides answer and draw the same, with the same operations."""

import jax
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import diffusion_transformer_pairs as pairs
from experiments.benchmarks import diffusion_transformer_torch as theirs_side
from experiments.benchmarks.random_networks import count_flops
from jaxldm import checkpoints, models, pipelines

SIDE = 8  # of the latents; a DiT has 2
STEPS = 2


@pytest.fixture(scope="module", params=["dit-xl", "sd3", "flux"])
def both(request, tmp_path_factory):
    """(family, their pipeline, ours with the weights of theirs)."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    parts = pairs.modules(family, "float32", True)
    theirs = theirs_side.pipeline(family, "float32", True, torch.device("cpu"))
    with torch.no_grad():  # what starts at zero would hide mistakes
        for weight in theirs.transformer.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    networks = {}
    for name in parts:
        getattr(theirs, name).save_pretrained(folder / name)
        networks[name] = pipelines.Network(*checkpoints.load(folder / name))
        assert networks[name].config == parts[name].config  # the sizes are those that are timed
    return family, theirs, pairs.pipeline_of(family, networks)


def test_both_networks_are_asked_the_same_and_cost_the_same(both):
    """PyTorch counts the operations of products and convolutions, as the table does; fused kernels not."""
    family, theirs, ours = both
    network = pairs.our_denoiser(ours)
    inputs = pairs.network_inputs(network.module, 2 if family == "dit-xl" else SIDE)
    answer = np.asarray(jax.jit(lambda network, inputs: network(**inputs))(network, inputs))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        reference = theirs_side.network(theirs.transformer, inputs, "float32")().numpy()
    if family == "flux":
        reference = theirs._unpack_latents(torch.from_numpy(reference), 8 * SIDE, 8 * SIDE, 8).numpy()
    reference = reference.transpose(0, 2, 3, 1)
    assert np.abs(answer - reference).max() < 1e-4 * np.abs(reference).max()
    lowest = 0.9 if family == "dit-xl" else 0.98  # there the first block's embedder runs a second time
    assert lowest < count_flops(network.module, inputs) / counter.get_total_flops() < 1.02


def test_both_sides_draw_the_same_picture(both):
    family, theirs, ours = both
    if family == "dit-xl":
        pytest.skip("a model of labels draws from its key: the two sides have other noise")
    latents = np.random.default_rng(0).standard_normal((1, SIDE, SIDE, 16)).astype(np.float32)
    reference = theirs_side.draw(theirs, latents, STEPS, 3.0)
    drawn = pairs.our_draw(ours, latents, STEPS, 3.0)
    assert drawn.shape == reference.shape == (1, 64, 64, 3)
    assert reference.std() > 0.01
    np.testing.assert_allclose(drawn, reference, atol=2 / 255)  # two grey levels


def test_the_published_sizes_are_those_of_the_presets():
    for family, preset in (("sd3", "sd3-medium"), ("flux", "flux-dev")):
        module = pairs.modules(family, "bfloat16", False)["transformer"]
        assert models.count_params(module) == models.count_params(preset)
    repeated = models.count_params(pairs.modules("dit-xl", "bfloat16", False)["transformer"])
    assert repeated > models.count_params("dit-xl-2")  # an embedder in every block
