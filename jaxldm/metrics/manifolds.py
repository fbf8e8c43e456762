"""Precision, recall, density and coverage: how the manifolds of two sets of features overlap."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxldm.arguments import array, checked, count
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.metrics.kernels import check_two_sets
from jaxldm.metrics.moments import blocks_of

_BLOCK = 1024


class Manifolds(NamedTuple):
    """Shares in [0, 1]; only density may be larger.

    Attributes:
        precision: share of the generated images that lie on the manifold of the real ones: quality.
        recall: share of the real images that lie on the manifold of the generated ones: variety.
        density: in how many balls of real images a generated one lies, over `k`; outliers count less.
        coverage: share of the real images whose ball holds a generated image.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_radii(rows: Float[np.ndarray, "N D"], k: int) -> Float[np.ndarray, " N"]:
    """Return for each row the distance to its `k`-th nearest other row.

    Raises:
        InvalidArgumentError: k below 1, or not smaller than the number of rows.
    """
    if not 1 <= k < len(rows):
        raise InvalidArgumentError(f"k must be between 1 and {len(rows) - 1} for {len(rows)} rows, got {k}")
    return np.concatenate(
        [np.partition(squares, k, axis=1)[:, k] for squares in _squared_blocks(rows, rows)]
    ) ** np.float64(0.5)


@checked(features=array("real", "[N, D]", axes=2), real=array("real", "[M, D]", axes=2), k=count(1))
def manifold_overlap(
    features: Float[np.ndarray, "N D"], real: Float[np.ndarray, "M D"], k: int = 3
) -> Manifolds:
    """Return precision and recall (Kynkaanniemi et al. 2019) and density and coverage (Naeem et al. 2020).

    A manifold is the union of balls around the rows, each as large as the distance to its k-th neighbour.
    Kynkaanniemi et al. have k = 3, Naeem et al. k = 5. Figures for different k, or for sets of different
    sizes, cannot be compared.

    Args:
        features: of generated images.
        real: of real images.
        k: of the nearest neighbours.

    Raises:
        InvalidArgumentError: k is not smaller than the number of rows.
        DataError: other widths, NaN.

    >>> rows = np.random.default_rng(0).normal(size=[50, 4])
    >>> manifold_overlap(rows, rows).precision
    1.0
    """
    check_two_sets(features, real)
    radii, real_radii = neighbour_radii(features, k) ** 2, neighbour_radii(real, k) ** 2
    in_real, balls, covered = 0, 0, np.zeros(len(real), bool)
    for squares in _squared_blocks(features, real):
        inside = squares <= real_radii
        in_real += int(inside.any(axis=1).sum())
        balls += int(inside.sum())
        covered |= inside.any(axis=0)
    recalled = sum(int((squares <= radii).any(axis=1).sum()) for squares in _squared_blocks(real, features))
    return Manifolds(
        precision=in_real / len(features),
        recall=recalled / len(real),
        density=balls / (k * len(features)),
        coverage=float(covered.mean()),
    )


def _squared_blocks(a: np.ndarray, b: np.ndarray):
    """Yield |a_i - b_j|^2 as [block, M] in float64, block by block of a."""
    b = np.asarray(b, np.float64)
    if not np.isfinite(b).all():
        raise DataError("features have NaN or infinity")
    norms = (b * b).sum(axis=1)
    for block in blocks_of(a, _BLOCK):
        part = block.astype(np.float64)
        squares = (part * part).sum(axis=1)[:, None] + norms[None] - 2 * part @ b.T
        yield np.maximum(squares, 0, out=squares)
