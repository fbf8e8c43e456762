"""Mean and covariance of features that arrive block by block: the memory is that of one block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import array, checked, count, instance, text
from jaxldm.errors import DataError
from jaxldm.metrics.frechet import Gaussian


class Moments(NamedTuple):
    """What is known of the rows seen so far, float64.

    Attributes:
        count: number of rows.
        mean: [D].
        scatter: [D, D], sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, "D D"]


MAX_WIDTH = 2**15  # of features: their covariance then has 8 GB
SOME_MOMENTS = instance(Moments, "moments from metrics.no_moments(width)")


@checked(width=count(1, MAX_WIDTH))
def no_moments(width: int) -> Moments:
    """Return the moments of no rows of `width` features."""
    return Moments(0, np.zeros(width), np.zeros((width, width)))


@checked(a=SOME_MOMENTS, b=SOME_MOMENTS)
def merge_moments(a: Moments, b: Moments) -> Moments:
    """Return the moments of the rows of both. Chan, Golub and LeVeque 1979, eq. 2.1."""
    if len(a.mean) != len(b.mean):
        raise DataError(f"the moments a and b are of {len(a.mean)} and {len(b.mean)} features")
    count = a.count + b.count
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    difference = b.mean - a.mean
    shift = np.outer(difference, difference) * (a.count * b.count / count)
    return Moments(count, a.mean + difference * (b.count / count), a.scatter + b.scatter + shift)


@checked(moments=SOME_MOMENTS, features=array("real", "[N, D]"), name=text)
def add_rows(moments: Moments, features: Float[np.ndarray, "N D"], name: str = "features") -> Moments:
    """Return the moments with the rows of a block added.

    Raises:
        DataError: another width than before, or NaN.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] != len(moments.mean):
        raise DataError(f"{name} must be [N, {len(moments.mean)}], got shape {features.shape}")
    if not np.isfinite(features).all():
        raise DataError(f"{name} have NaN or infinity")
    if len(features) == 0:
        return moments
    mean = features.mean(axis=0)
    centred = features - mean
    return merge_moments(moments, Moments(len(features), mean, centred.T @ centred))


@checked(moments=SOME_MOMENTS, name=text)
def gaussian_of(moments: Moments, name: str = "features") -> Gaussian:
    """Return the mean and the unbiased covariance. Raises `DataError` for fewer than two rows."""
    if moments.count < 2:
        raise DataError(f"{name} need at least two rows for a covariance, got {moments.count}")
    return Gaussian(moments.mean, moments.scatter / (moments.count - 1))


def blocks_of(rows: np.ndarray, size: int = 2048) -> Iterable[np.ndarray]:
    """Yield `size` rows at a time, of an array in memory or in a file (`np.memmap`)."""
    return (np.asarray(rows[start : start + size]) for start in range(0, len(rows), size))


@checked(features=array("real", "[N, D]", axes=(1, 64)), name=text)
def fit_gaussian_by_blocks(features: Float[np.ndarray, "N D"], name: str = "features") -> Gaussian:
    """Return what `fit_gaussian` does, with only one block of the rows in memory as float64.

    >>> features = np.random.default_rng(0).normal(size=[5000, 3])
    >>> bool(np.allclose(fit_gaussian_by_blocks(features).covariance, np.cov(features.T)))
    True
    """
    if features.ndim != 2:
        raise DataError(f"{name} must be [N, D], got shape {features.shape}")
    moments = no_moments(features.shape[1])
    for block in blocks_of(features):
        moments = add_rows(moments, block, name)
    return gaussian_of(moments, name)
