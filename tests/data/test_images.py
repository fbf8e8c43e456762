"""Images to numbers and back, and the checks on what a caller hands in."""

import numpy as np
import pytest

from jaxldm.data import check_images, check_labels, from_uint8, to_uint8
from jaxldm.errors import DataError


def test_every_grey_level_survives_the_round_trip_and_the_ends_are_minus_one_and_one():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = from_uint8(levels)
    assert images.dtype == np.float32 and images.min() == -1 and images.max() == 1
    np.testing.assert_array_equal(to_uint8(images), levels)


def test_pictures_are_cut_at_the_ends_and_nan_is_refused():
    assert to_uint8(np.array([-7.0, 1.5])).tolist() == [0, 255]
    with pytest.raises(DataError, match="NaN"):
        to_uint8(np.array([np.nan]))


def test_good_images_pass_unchanged_as_float32():
    images = np.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    checked = check_images(images, (4, 4, 3))
    assert checked.dtype == np.float32
    np.testing.assert_allclose(checked, images, atol=1e-7)


def with_value(value):
    images = np.zeros([3, 4, 4, 1], np.float32)
    images[1, 2, 2, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros([4, 4, 1], np.float32), r"\[B, H, W, C\]"),
        (np.zeros([0, 4, 4, 1], np.float32), "not empty"),
        (np.zeros([2, 5, 4, 1], np.float32), "must be 4x4x1 .* got 5x4x1"),
        (np.zeros([2, 4, 4, 1], np.uint8), "uint8.*from_uint8"),
        (np.zeros([2, 4, 4, 1], np.int64), "int64"),
        (with_value(np.nan), r"NaN or infinity: images\[1\] is the first of 1"),
        (with_value(-np.inf), r"NaN or infinity: images\[1\]"),
        (with_value(255), r"images\[1\] is in \[0, 255\].*from_uint8"),
        (with_value(-1.5), r"images\[1\] is in \[-1.5, 0\]: rescale"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(DataError, match=message):
        check_images(images, (4, 4, 1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1, 2]), r"one per image, \[3\]"),
        (np.array([0.0, 1.0, 2.0]), "whole numbers"),
        (np.array([0, 10, 2]), r"labels\[1\] is 10"),
        (np.array([0, 1, -1]), r"labels\[2\] is -1"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(DataError, match=message):
        check_labels(labels, 3, 10)


def test_good_labels_become_int32():
    assert check_labels(np.array([0, 9, 5]), 3, 10).dtype == np.int32
