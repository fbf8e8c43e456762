"""The Fréchet distance against its closed forms and against scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from jaxldm.errors import DataError
from jaxldm.metrics import fit_gaussian, frechet_distance, gaussian_frechet_distance
from jaxldm.metrics.frechet import Gaussian

NORMAL = Gaussian(np.zeros(2), np.eye(2))


def random_gaussian(rng, dimension, rank=None):
    root = rng.normal(size=[dimension, rank or dimension])
    return Gaussian(rng.normal(size=dimension), root @ root.T / dimension)


@given(dimension=st.integers(1, 40), seed=st.integers(0, 1000))
def test_equal_covariances_and_means_zero_and_one_give_the_dimension(dimension, seed):
    covariance = random_gaussian(np.random.default_rng(seed), dimension).covariance
    zero, one = Gaussian(np.zeros(dimension), covariance), Gaussian(np.ones(dimension), covariance)
    np.testing.assert_allclose(gaussian_frechet_distance(zero, one), dimension, rtol=1e-6)


def test_commuting_covariances_give_the_sum_of_squared_differences_of_standard_deviations():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=[6, 6]))[0]
    a, b = rng.uniform(0.1, 3, size=[2, 6])
    left = Gaussian(np.zeros(6), axes * a**2 @ axes.T)
    right = Gaussian(np.full(6, 0.5), axes * b**2 @ axes.T)
    np.testing.assert_allclose(gaussian_frechet_distance(left, right), ((a - b) ** 2).sum() + 1.5, rtol=1e-10)


@given(dimension=st.integers(1, 12), seed=st.integers(0, 1000))
def test_it_agrees_with_the_root_of_the_product_and_is_symmetric(dimension, seed):
    rng = np.random.default_rng(seed)
    a, b = random_gaussian(rng, dimension, dimension + 2), random_gaussian(rng, dimension, dimension + 2)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(gaussian_frechet_distance(a, b), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(gaussian_frechet_distance(b, a), expected, rtol=1e-6, atol=1e-8)


def test_fewer_images_than_features_still_give_a_real_number():
    rng = np.random.default_rng(0)
    features = rng.normal(size=[5, 30])
    assert 0 <= frechet_distance(features, features) < 1e-6
    np.testing.assert_allclose(frechet_distance(features, features + 1), 30, rtol=1e-6)


def test_the_fit_is_the_sample_mean_and_the_unbiased_covariance_in_float64():
    features = np.random.default_rng(0).normal(size=[50, 4]).astype(np.float32) + 1000
    fitted = fit_gaussian(features)
    assert fitted.covariance.dtype == np.float64
    np.testing.assert_allclose(
        fitted.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12
    )
    np.testing.assert_allclose(fitted.mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("features", "message"),
    [(np.zeros([1, 3]), "two rows"), (np.zeros(3), "two rows"), (np.full([3, 3], np.nan), "NaN")],
)
def test_features_that_have_no_covariance_are_refused(features, message):
    with pytest.raises(DataError, match=message):
        frechet_distance(features, np.eye(3))


def test_features_of_different_widths_are_refused():
    with pytest.raises(DataError, match="widths: 3 and 4"):
        frechet_distance(np.eye(3), np.eye(4))


@pytest.mark.parametrize(
    ("mean", "covariance", "words"),
    [
        (np.zeros(2), np.zeros((2, 3)), r"got float64 \[2\] and float64 \[2, 3\]"),
        (np.zeros((2, 1)), np.eye(2), "must be a mean"),
        (np.zeros(2), np.eye(2) * 1j, "complex128"),
        (np.array(["a", "b"]), np.eye(2), "must be a mean"),
        (np.array([0, np.nan]), np.eye(2), "NaN or infinity"),
        (np.zeros(2), np.array([[1, 0.5], [0, 1]]), "not symmetric"),
        (np.zeros(2), -np.eye(2), "negative variances"),
    ],
)
def test_what_is_no_gaussian_is_refused(mean, covariance, words):
    for pair in ((Gaussian(mean, covariance), NORMAL), (NORMAL, Gaussian(mean, covariance))):
        with pytest.raises(DataError, match=words):
            gaussian_frechet_distance(*pair)
