"""FID, KID, precision, recall, Inception Score and the inputs of the network as torch-fidelity has them."""

import numpy as np
import pytest
import torch
from torch_fidelity_reference import reference

from jaxldm import metrics
from jaxldm.metrics.resizing import bilinear_weights, inception_inputs


@pytest.fixture(scope="module")
def features():
    random = np.random.default_rng(0)
    mixing = random.normal(size=[24, 24]) / 5
    x, y = random.normal(size=[300, 24]) @ mixing, random.normal(size=[260, 24]) @ mixing + 0.3
    return x.astype(np.float32), y.astype(np.float32)


def test_fid(features):
    theirs = reference("torch_fidelity.metric_fid")
    # In float64: theirs are rounded to float32 where the features are.
    statistics = [theirs.fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in features]
    expected = theirs.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    ours = metrics.gaussian_frechet_distance(*map(metrics.fit_gaussian_by_blocks, features))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_kid(features):
    theirs = reference("torch_fidelity.metric_kid")
    options = {"kid_subsets": 10, "kid_subset_size": 100, "verbose": False, "rng_seed": 2020}
    expected = theirs.kid_features_to_metric(
        *(torch.from_numpy(x.astype(np.float64)) for x in features), **options
    )
    ours = metrics.kernel_distance(*features, subsets=10, subset_size=100)
    np.testing.assert_allclose(ours, list(expected.values()), rtol=1e-6)


def test_kid_of_float32_features_is_free_of_the_rounding_of_float32():
    """torch-fidelity has its kernel in float32 where features are, and is off by 1e-6 and more from its own
    figure in float64; ours is that figure, and features that are off by their last bit do not move it.
    """
    theirs = reference("torch_fidelity.metric_kid")
    options = {"kid_subsets": 5, "kid_subset_size": 60, "verbose": False, "rng_seed": 2020}
    random = np.random.default_rng(0)
    mixing = 0.35 * random.normal(size=[64, 2048]) / 8
    x, y = (  # of the width and the size of Inception's features
        np.maximum(shift + random.normal(size=[number, 64]) @ mixing, 0).astype(np.float32)
        for number, shift in ((90, 0.45), (80, 0.4))
    )
    single, double = (
        theirs.kid_features_to_metric(*(torch.from_numpy(z.astype(dtype)) for z in (x, y)), **options)
        for dtype in (np.float32, np.float64)
    )
    exact, rounded = (figure["kernel_inception_distance_mean"] for figure in (double, single))
    ours = metrics.kernel_distance(x, y, subsets=5, subset_size=60)
    np.testing.assert_allclose(ours, list(double.values()), rtol=1e-10)
    assert abs(rounded / exact - 1) > 1e-6
    moved = (np.nextafter(z, np.float32(2)) for z in (x, y))
    np.testing.assert_allclose(metrics.kernel_distance(*moved, subsets=5, subset_size=60), ours, rtol=1e-6)


def test_precision_and_recall(features):
    theirs = reference("torch_fidelity.metric_prc")
    expected = theirs.prc_features_to_metric(*map(torch.from_numpy, features), verbose=False)
    ours = metrics.manifold_overlap(*features, k=3)
    assert 0 < ours.precision < 1 and 0 < ours.recall < 1
    np.testing.assert_allclose(
        (ours.precision, ours.recall), (expected["precision"], expected["recall"]), rtol=1e-6
    )


def test_inception_score(features):
    theirs = reference("torch_fidelity.metric_isc")
    expected = theirs.isc_features_to_metric(torch.from_numpy(3 * features[0]))
    ours = metrics.inception_score_of_splits(3 * features[0])
    np.testing.assert_allclose(ours, list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (17, 45), (320, 301), (299, 299)])
def test_the_resizing_of_tensorflow_1(size):
    theirs = reference("torch_fidelity.interpolate_compat_tensorflow")
    images = np.random.default_rng(0).integers(0, 256, [1, *size, 3], dtype=np.uint8)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
    expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    expected = (expected.numpy().transpose(0, 2, 3, 1) - 128) / 128
    np.testing.assert_allclose(inception_inputs(images, "tf1"), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (17, 45), (320, 301)])
def test_the_resizing_of_pytorch_fid(size):
    images = np.random.default_rng(0).integers(0, 256, [1, *size, 3], dtype=np.uint8)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    expected = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    expected = 2 * expected.numpy().transpose(0, 2, 3, 1) - 1
    np.testing.assert_allclose(inception_inputs(images, "pytorch"), expected, atol=1e-5)


def test_the_resizing_of_clean_fid_is_that_of_pillow_in_floats():
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, [2, 40, 50, 3], dtype=np.uint8)
    ours = np.asarray(inception_inputs(images, "clean"))
    for image, found in zip(images, ours, strict=True):
        for c in range(3):
            channel = Image.fromarray(image[..., c].astype(np.float32), mode=None)
            expected = np.asarray(channel.resize((299, 299), resample=Image.BICUBIC)).clip(0, 255)
            np.testing.assert_array_equal(found[..., c], (expected - 128) / 128)


@pytest.mark.parametrize("half_pixel", [False, True])
def test_every_row_of_weights_adds_up_to_1(half_pixel):
    np.testing.assert_allclose(bilinear_weights(77, 299, half_pixel).sum(1), 1, rtol=1e-6)
