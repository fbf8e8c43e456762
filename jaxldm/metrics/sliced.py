"""The sliced Wasserstein distance of two sets of features: MIND, which few images are enough for."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import array, checked, count
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.metrics.kernels import check_two_sets
from jaxldm.metrics.moments import blocks_of

_MOST_NUMBERS = 2**23  # projections kept at once: 64 MB


@checked(
    features=array("real", axes=(1, 64)),
    real=array("real", axes=(1, 64)),
    directions=count(1, 10**6),
    seed=count(0),
)
def sliced_wasserstein(
    features: Float[np.ndarray, "N D"],
    real: Float[np.ndarray, "M D"],
    *,
    directions: int = 1000,
    seed: int = 0,
) -> float:
    """Return 3 D times the mean over random unit directions of the squared 2-Wasserstein distance along them.

    With Inception features it is MIND, the Monge Inception distance. Along a line the optimal plan joins the
    sorted projections, so there is no covariance of D x D to estimate, and below 2 048 images it is far less
    biased than FID. Sets of different sizes are compared through their quantile functions, exactly.

    Args:
        features: of generated images.
        real: of real images.
        directions: number of directions.
        seed: of the directions.

    Raises:
        InvalidArgumentError: no directions.
        DataError: other widths, an empty set, NaN.

    >>> rows = np.random.default_rng(0).normal(size=[100, 4])
    >>> abs(sliced_wasserstein(rows, rows + 1, directions=4000) - 12) < 0.5   # 3 |shift|^2
    True
    """
    check_two_sets(features, real)
    if directions < 1:
        raise InvalidArgumentError(f"directions must be 1 or more, got {directions}")
    width = features.shape[1]
    drawn = np.random.default_rng(seed).normal(size=(width, directions))
    drawn /= np.linalg.norm(drawn, axis=0)
    rows_a, rows_b, weights = _quantile_pairs(len(features), len(real))
    some = max(1, _MOST_NUMBERS // max(len(features), len(real)))
    means = []
    for start in range(0, directions, some):
        part = drawn[:, start : start + some]
        a, b = (np.sort(_projected(rows, part), axis=0) for rows in (features, real))
        means.append(np.einsum("q,qm->m", weights, (a[rows_a] - b[rows_b]) ** 2))
    return float(3 * width * np.concatenate(means).mean())


def _projected(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    projected = np.concatenate([block.astype(np.float64) @ directions for block in blocks_of(rows)])
    if not np.isfinite(projected).all():
        raise DataError("features have NaN or infinity")
    return projected


def _quantile_pairs(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row of each sorted set on every interval where both quantile functions are constant.

    The intervals end at multiples of 1/n and of 1/m; their lengths are the third array.
    """
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m)
    starts = np.concatenate([[0], ends[:-1]])
    return starts // m, starts // n, (ends - starts) / (n * m)
