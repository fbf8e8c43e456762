"""The Fréchet distance between two sets of feature vectors, each seen as a Gaussian."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import array, checked, instance, text
from jaxldm.errors import DataError


class Gaussian(NamedTuple):
    """A mean [D] and a covariance [D, D], float64."""

    mean: Float[np.ndarray, "D"]
    covariance: Float[np.ndarray, "D D"]


A_GAUSSIAN = instance(Gaussian, "a Gaussian from metrics.fit_gaussian")


@checked(features=array("real"), name=text)
def fit_gaussian(features: Float[np.ndarray, "N D"], name: str = "features") -> Gaussian:
    """Return the sample mean and the unbiased sample covariance, in float64.

    Raises `DataError` for fewer than two rows or for NaN.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise DataError(f"{name} must be [N, D] with at least two rows, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise DataError(f"{name} have NaN or infinity")
    mean = features.mean(axis=0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / (len(features) - 1))


def check_gaussian(gaussian: Gaussian, name: str) -> None:
    """Raise `DataError` unless it is a mean [D] and a covariance matrix [D, D] of real, finite numbers."""
    mean, covariance = (np.asarray(part) for part in gaussian)
    real = all(np.issubdtype(part.dtype, np.floating) for part in (mean, covariance))
    if not real or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = [f"{part.dtype} {list(part.shape)}" for part in (mean, covariance)]
        raise DataError(f"{name} must be a mean [D] and a covariance [D, D], got {' and '.join(shapes)}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{name} has NaN or infinity")
    largest = np.abs(covariance).max(initial=0)
    # Files of float32, or of another program, are symmetric to their rounding.
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-3 * largest:
        raise DataError(f"{name} has a covariance that is not symmetric: it is none")
    if covariance.diagonal().min(initial=0) < -1e-6 * largest:
        raise DataError(f"{name} has negative variances: it is no covariance")


@checked(a=A_GAUSSIAN, b=A_GAUSSIAN)
def gaussian_frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared 2-Wasserstein distance.

    The trace of the root comes from the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric and
    similar to
    C_a C_b: no root of a matrix that is not symmetric, and so no imaginary part to throw away.

    Raises `DataError` for other widths, NaN, or what is no covariance matrix.

    Source: Dowson and Landau 1982, eq. 4; as a score of images Heusel et al. 2017, eq. 6.
    """
    check_gaussian(a, "the first Gaussian")
    check_gaussian(b, "the second Gaussian")
    if a.mean.shape != b.mean.shape:
        raise DataError(f"features have different widths: {a.mean.shape[0]} and {b.mean.shape[0]}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    products = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace_of_root = np.sqrt(np.maximum(products, 0)).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding can leave -1e-15 for equal sets


@checked(features_a=array("real"), features_b=array("real"))
def frechet_distance(features_a: Float[np.ndarray, "N D"], features_b: Float[np.ndarray, "M D"]) -> float:
    """Return the Fréchet distance of Gaussians fitted to two sets of features, in float64.

    It is the FID only with features of the one published Inception network; with any other features, say
    which. It falls as sets grow even when nothing else changes, so compare sets of the same size only.

    >>> features = np.random.default_rng(0).normal(size=[100, 3])
    >>> round(frechet_distance(features, features + 1), 9)
    3.0
    """
    return gaussian_frechet_distance(
        fit_gaussian(features_a, "features_a"), fit_gaussian(features_b, "features_b")
    )
