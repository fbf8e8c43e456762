"""Published figures on CIFAR-10, where its images and the weights of Inception are at hand.

torch-fidelity 0.4.0, tests/torch_versions_ge_1_13_0 and tests/tf1: the first 5 000 training images against
the first 5 000 test images. Set JAXLDM_WEIGHTS to a folder with pt_inception-2015-12-05-6726825d.pth and
JAXLDM_CIFAR10 to the folder cifar-10-batches-py. About ten minutes on two cores.
"""

import os
import pathlib
import pickle

import numpy as np
import pytest

from jaxldm import checkpoints, metrics

WEIGHTS = pathlib.Path(os.environ.get("JAXLDM_WEIGHTS", "none")) / "pt_inception-2015-12-05-6726825d.pth"
CIFAR10 = pathlib.Path(os.environ.get("JAXLDM_CIFAR10", "none"))
needs_files = pytest.mark.skipif(
    not (WEIGHTS.is_file() and (CIFAR10 / "test_batch").is_file()),
    reason="the weights of Inception (JAXLDM_WEIGHTS) and CIFAR-10 (JAXLDM_CIFAR10) are not here",
)


def first_images(batch):
    with (CIFAR10 / batch).open("rb") as file:
        pixels = pickle.load(file, encoding="bytes")[b"data"]
    return pixels[:5000].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@needs_files
def test_cifar_10_train_against_test(optimized, tmp_path):
    loaded = checkpoints.load_inception(WEIGHTS)
    network = metrics.inception_network(loaded.module, loaded.params, loaded.sha256)
    train, test = (
        metrics.extract(metrics.array_set(first_images(batch), batch), network, ["pool", "logits"], tmp_path)
        for batch in ("data_batch_1", "test_batch")
    )
    np.testing.assert_allclose(metrics.frechet_distance(train["pool"], test["pool"]), 10.3233274, atol=1e-3)
    np.testing.assert_allclose(
        metrics.inception_score_of_splits(train["logits"]), (10.75051, 0.5778723), atol=1e-3
    )
    kid = metrics.kernel_distance(train["pool"], test["pool"])
    np.testing.assert_allclose(kid, (-2.907863e-05, 1.023118e-04), atol=1e-7)
    overlap = metrics.manifold_overlap(train["pool"], test["pool"], k=3)
    np.testing.assert_allclose((overlap.precision, overlap.recall), (0.6852, 0.6908), atol=1e-3)
