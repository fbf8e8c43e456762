"""Precision, recall, density and coverage: how the manifolds of two sets of features overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    return np.sqrt(np.concatenate([_kth_smallest(tiles, k) for tiles in _squared_tiles(rows, rows)]))


def _kth_smallest(tiles: Iterable[np.ndarray], k: int) -> Float[np.ndarray, " block"]:
    """Return for each row the k-th smallest number of all its tiles, counted from 0; k + 1 are kept."""
    kept: np.ndarray | None = None
    for squares in tiles:
        both = squares if kept is None else np.concatenate([kept, squares], axis=1)
        kept = np.partition(both, k, axis=1)[:, : k + 1] if both.shape[1] > k + 1 else both
    assert kept is not None
    return kept.max(axis=1)


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
    in_real, balls = 0, 0
    covered, recalled = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start, tiles in zip(range(0, len(features), _BLOCK), _squared_tiles(features, real), strict=True):
        own = radii[start : start + _BLOCK, None]
        in_ball = np.zeros(len(own), bool)
        for place, squares in enumerate(tiles):
            part = slice(place * _BLOCK, place * _BLOCK + squares.shape[1])
            inside = squares <= real_radii[part]
            in_ball |= inside.any(axis=1)
            balls += int(inside.sum())
            covered[part] |= inside.any(axis=0)
            recalled[part] |= (squares <= own).any(axis=0)
        in_real += int(in_ball.sum())
    return Manifolds(
        precision=in_real / len(features),
        recall=float(recalled.mean()),
        density=balls / (k * len(features)),
        coverage=float(covered.mean()),
    )


def _squared_tiles(a: np.ndarray, b: np.ndarray) -> Iterator[Iterator[np.ndarray]]:
    """Yield for each block of a the tiles |a_i - b_j|^2, [block, block of b] in float64, along b."""
    for block in blocks_of(a, _BLOCK):
        part = _finite(block)
        norms = (part * part).sum(axis=1)[:, None]
        yield (_squares(part, norms, _finite(other)) for other in blocks_of(b, _BLOCK))


def _squares(part: np.ndarray, norms: np.ndarray, other: np.ndarray) -> np.ndarray:
    squares = norms + (other * other).sum(axis=1)[None] - 2 * part @ other.T
    return np.maximum(squares, 0, out=squares)


def _finite(rows: np.ndarray) -> Float[np.ndarray, "block D"]:
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise DataError("features have NaN or infinity")
    return rows
