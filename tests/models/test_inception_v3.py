"""FID's InceptionV3 against torch-fidelity's, with the same random weights, through a file."""

import jax
import numpy as np
import pytest
import torch
from torch_fidelity_reference import reference

from experiments.benchmarks.metrics import random_inception_state
from jaxldm import checkpoints, metrics, models
from jaxldm.errors import InvalidArgumentError
from jaxldm.metrics.resizing import inception_inputs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    state = random_inception_state()
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({name: torch.from_numpy(tensor) for name, tensor in state.items()}, path)
    loaded = checkpoints.load_inception(path)
    extractor = reference("torch_fidelity.feature_extractor_inceptionv3")
    layers = ["2048", "logits_unbiased"]
    theirs = extractor.FeatureExtractorInceptionV3("inception", layers, str(path))
    return theirs, loaded


def test_the_features_agree_with_torch_fidelity(pair):
    theirs, loaded = pair
    images = np.random.default_rng(1).integers(0, 256, [4, 40, 32, 3], dtype=np.uint8)
    images[2:] //= 3  # another set
    kept = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: kept.update(out=out))
    with torch.no_grad():
        pool, logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    ours = jax.jit(loaded.module.apply)({"params": loaded.params}, inception_inputs(images))
    spatial = kept["out"][:, :7].permute(0, 2, 3, 1).reshape(4, -1)
    assert float(pool.std()) > 0.1  # the weights are such that there is something to compare
    for found, expected in zip(ours, (pool, spatial, logits), strict=True):
        expected = expected.numpy()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # KID from images to the figure, with torch-fidelity's kernel in float64.
    kid = reference("torch_fidelity.metric_kid")
    options = {"kid_subsets": 1, "kid_subset_size": 2, "verbose": False, "rng_seed": 2020}
    expected = kid.kid_features_to_metric(pool[:2].double(), pool[2:].double(), **options)
    pool = np.asarray(ours.pool)
    found = metrics.kernel_distance(pool[:2], pool[2:], subsets=1, subset_size=2)
    np.testing.assert_allclose(found.mean, expected["kernel_inception_distance_mean"], rtol=1e-6)


def test_the_network_has_the_parameters_of_the_reference(pair):
    theirs = [tensor.numel() for name, tensor in pair[0].state_dict().items() if "num_batches" not in name]
    shapes = jax.tree.leaves(models.shapes(models.InceptionV3()))
    assert sum(leaf.size for leaf in shapes) == sum(theirs)
    assert len(shapes) == len(theirs) == 472


def test_images_of_another_size_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"\[B, 299, 299, 3\], got \(1, 32, 32, 3\)"):
        models.InceptionV3().apply({"params": {}}, np.zeros([1, 32, 32, 3], np.float32))
