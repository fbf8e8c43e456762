"""Scores against closed forms, brute force and scipy."""

import numpy as np
import pytest
import scipy.spatial.distance
from hypothesis import given
from hypothesis import strategies as st

from jaxldm.errors import DataError
from jaxldm.metrics import (
    accuracy,
    class_diversities,
    inception_score,
    nearest_neighbour_distances,
    reconstruction_error,
    within_class_diversity,
)


def test_accuracy_counts_the_rows_read_right():
    assert accuracy(np.array([[0.1, 3], [2, 1], [0, 1]]), np.array([1, 1, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("classes", [2, 10])
def test_sure_and_balanced_is_the_number_of_classes_and_unsure_is_one(classes):
    assert inception_score(np.tile(np.eye(classes), [3, 1])) == pytest.approx(classes)
    assert inception_score(np.full([5, classes], 1 / classes)) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(classes)[0], [4, 1])) == pytest.approx(1)


@given(number=st.integers(1, 20), classes=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_inception_score_lies_between_one_and_the_number_of_classes(number, classes, seed):
    p = np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), size=number)
    assert 1 - 1e-9 <= inception_score(p) <= classes + 1e-9


@pytest.mark.parametrize(
    "p",
    [np.full([2, 2], 0.4), np.array([[1.5, -0.5]]), np.full([1, 2], np.nan), np.ones(3), np.ones([0, 3])],
)
def test_rows_that_are_not_probabilities_are_refused(p):
    with pytest.raises(DataError, match="add up to 1"):
        inception_score(p)


def test_diversity_is_the_mean_pairwise_distance_of_each_class():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=[1500, 3, 2, 1]), np.r_[np.zeros(1200, int), np.full(299, 4), 7]
    expected = {
        label: scipy.spatial.distance.pdist(images[labels == label].reshape(-1, 6)).mean() for label in (0, 4)
    }
    measured = class_diversities(images, labels)
    assert measured.keys() == expected.keys()  # a class of one image has none
    for label, value in expected.items():
        assert measured[label] == pytest.approx(value, rel=1e-9)
    assert within_class_diversity(images, labels) == pytest.approx(np.mean(list(expected.values())))


def test_a_collapsed_class_has_no_diversity_and_lone_images_are_refused():
    assert within_class_diversity(np.ones([4, 5]), np.zeros(4, int)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="at least two images"):
        within_class_diversity(np.ones([2, 5]), np.array([0, 1]))


def test_the_nearest_neighbour_is_that_of_brute_force_and_a_copy_is_at_distance_zero():
    rng = np.random.default_rng(0)
    images, reference = rng.normal(size=[1100, 4, 4, 1]), rng.normal(size=[300, 4, 4, 1])
    images[1050] = reference[17]
    distances = scipy.spatial.distance.cdist(images.reshape(1100, -1), reference.reshape(300, -1))
    measured = nearest_neighbour_distances(images, reference)
    np.testing.assert_array_equal(measured.index, distances.argmin(axis=1))
    np.testing.assert_allclose(measured.distance, distances.min(axis=1), rtol=1e-9)
    assert measured.distance[1050] == 0 and measured.index[1050] == 17


def test_images_of_another_size_have_no_distance():
    with pytest.raises(DataError, match="4 numbers each, the reference images 9"):
        nearest_neighbour_distances(np.zeros([2, 2, 2, 1]), np.zeros([2, 3, 3, 1]))


def test_a_constant_offset_has_its_square_as_mse_and_psnr_counts_from_peak_to_peak_two():
    images = np.random.default_rng(0).uniform(-0.5, 0.5, size=[3, 4, 4, 1])
    measured = reconstruction_error(images, images + 0.2)
    assert measured.mse == pytest.approx(0.04) and measured.psnr == pytest.approx(20)
    assert reconstruction_error(images, images) == (0, float("inf"))
    with pytest.raises(DataError, match="differ in shape"):
        reconstruction_error(images, images[:2])
