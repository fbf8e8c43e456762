"""Maximum mean discrepancies of two sets of features: KID and CMMD."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from jaxldm.arguments import array, checked, count, number
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.metrics.moments import blocks_of

_MOST_PAIRS = 2**24  # kept at once: 128 MB


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets."""

    mean: float
    std: float


def check_two_sets(a: Array | np.ndarray, b: Array | np.ndarray, fewest: int = 1) -> None:
    """Raise `DataError` unless both are [N, D] of one width, with at least `fewest` rows."""
    for name, rows in (("features", a), ("real features", b)):
        if np.ndim(rows) != 2 or len(rows) < fewest:
            raise DataError(f"{name} must be [N, D] with N >= {fewest}, got shape {np.shape(rows)}")
    if a.shape[1] != b.shape[1]:
        raise DataError(f"features have different widths: {a.shape[1]} and {b.shape[1]}")


@checked(x=array("real"), y=array("real"))
def polynomial_mmd(x: Float[Array | np.ndarray, "N D"], y: Float[Array | np.ndarray, "M D"]) -> float:
    """Return the unbiased squared MMD with the kernel k(x, y) = (x.y / D + 1)^3, in float64.

    Unbiased: the mean over pairs of different rows, so that it is 0 on average for two sets of one
    distribution, and negative for half of them. Binkowski et al. 2018, section 4; Gretton et al. 2012, eq. 3.

    Raises:
        DataError: fewer than two rows, other widths, NaN.
    """
    x, y = _finite_rows(x), _finite_rows(y)
    check_two_sets(x, y, 2)
    return _unbiased(_cubic(x, x), _cubic(y, y), _cubic(x, y))


def _finite_rows(rows: Array | np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    if not np.isfinite(rows).all():
        raise DataError("features have NaN or infinity")
    return rows


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The kernel (a.b / D + 1)^3 of all pairs of rows."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _unbiased(k_xx: np.ndarray, k_yy: np.ndarray, k_xy: np.ndarray) -> float:
    """The squared MMD from the kernels within and between two sets; a row with itself is no pair."""

    def mean_of_pairs(values: np.ndarray) -> float:
        return (values.sum() - np.trace(values)) / (len(values) * (len(values) - 1))

    return float(mean_of_pairs(k_xx) + mean_of_pairs(k_yy) - 2 * k_xy.mean())


@checked(
    features=array("real"), real=array("real"), subsets=count(1, 10**6), subset_size=count(2), seed=count(0)
)
def kernel_distance(
    features: Float[np.ndarray, "N D"],
    real: Float[np.ndarray, "M D"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """Return the mean and spread of `polynomial_mmd` over random subsets: KID, with Inception features.

    The subsets are drawn with NumPy's RandomState, first from `features`, then from `real`, as torch-fidelity
    draws them, so that both programs give the same number for the same features and seed.

    Args:
        features: of generated images; an array in memory or in a file.
        real: of real images.
        subsets: number of subsets.
        subset_size: rows of each subset, at most the rows of the smaller set.
        seed: of the subsets.

    Raises:
        InvalidArgumentError: subsets larger than the sets, or none.
        DataError: other widths, NaN.

    >>> rows = np.random.default_rng(0).normal(size=[300, 8])
    >>> kernel_distance(rows, rows + 1, subsets=3, subset_size=100).mean > 1
    True
    """
    check_two_sets(features, real, 2)
    fewest = min(len(features), len(real))
    if subsets < 1 or not 2 <= subset_size <= fewest:
        raise InvalidArgumentError(
            f"KID needs subsets >= 1 and subset_size between 2 and {fewest}, the rows of the smaller set, "
            f"got subsets={subsets} and subset_size={subset_size}"
        )
    random = np.random.RandomState(seed)

    def subset(rows: np.ndarray) -> np.ndarray:
        return random.choice(len(rows), subset_size, replace=False)

    pairs = [(subset(features), subset(real)) for _ in range(subsets)]
    if max(len(features), len(real)) ** 2 <= min(subsets * subset_size**2, _MOST_PAIRS):
        # Subsets of small sets share most pairs: each kernel is then computed once.
        x, y = _finite_rows(features), _finite_rows(real)
        k_xx, k_yy, k_xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        values = [_unbiased(k_xx[np.ix_(i, i)], k_yy[np.ix_(j, j)], k_xy[np.ix_(i, j)]) for i, j in pairs]
    else:
        values = [polynomial_mmd(features[i], real[j]) for i, j in pairs]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


@checked(
    embeddings=array("real", "[N, D]", axes=2), real=array("real", "[M, D]", axes=2), sigma=number(above=0)
)
def clip_mmd(
    embeddings: Float[Array | np.ndarray, "N D"], real: Float[Array | np.ndarray, "M D"], sigma: float = 10.0
) -> float:
    """Return CMMD: 1000 times the squared MMD of unit vectors with the kernel exp(-|x - y|^2 / 2 sigma^2).

    Biased: the diagonal counts, so that equal sets have exactly 0 and a few thousand images are enough.
    With CLIP ViT-L/14@336 embeddings it is the published metric. Jayasumana et al. 2024, section 4.

    Args:
        embeddings: of generated images; each row is divided by its length.
        real: of real images.
        sigma: of the kernel.

    Raises:
        DataError: other widths, an empty set, NaN, a row of zeros.
    """
    check_two_sets(embeddings, real)
    embeddings, real = np.asarray(embeddings), np.asarray(real)
    gamma = 1 / (2 * sigma**2)

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        total = 0.0
        for block in blocks_of(a):
            x = _unit_rows(block)
            for other in blocks_of(b):
                # |x - y|^2 = 2 - 2 x.y for unit vectors.
                total += np.exp(-gamma * (2 - 2 * x @ _unit_rows(other).T)).sum()
        return float(total / (len(a) * len(b)))

    within = mean_kernel(embeddings, embeddings) + mean_kernel(real, real)
    return 1000 * (within - 2 * mean_kernel(embeddings, real))


def _unit_rows(rows: Array | np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise DataError("embeddings have NaN, infinity or a row of zeros")
    return rows / lengths
