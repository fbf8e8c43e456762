"""Distances of images pair by pair, of two sets in one order: reconstructions and their originals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxldm.arguments import a_tree, checked, count, function
from jaxldm.data.images import from_uint8
from jaxldm.errors import DataError
from jaxldm.metrics.image_sets import AN_IMAGE_SET, ImageSet

Distance = Callable[[Any, Float[Array, "B H W C"], Float[Array, "B H W C"]], Float[Array, " B"]]


@checked(
    images=AN_IMAGE_SET,
    real=AN_IMAGE_SET,
    distance=function("(params, x, y) -> [B]"),
    params=a_tree,
    batch_size=count(1),
    progress=function("(number)"),
)
def pair_distances(
    images: ImageSet,
    real: ImageSet,
    distance: Distance,
    params: Any,
    *,
    batch_size: int = 32,
    progress: Callable[[int], Any] = lambda number: None,
) -> Float[np.ndarray, " N"]:
    """Return the distance of each image to the one at the same place in the other set.

    Args:
        images: for example reconstructions.
        real: their originals, in the same order.
        distance: (params, x, y) -> [B] for x and y [B, H, W, 3] in [-1, 1]: LPIPS; compiled here.
        params: of the network.
        batch_size: pairs at once.
        progress: called with the number of pairs that are done.

    Raises:
        DataError: sets of different numbers or sizes, NaN.
    """
    if images.count != real.count or images.size != real.size:
        raise DataError(
            f"pairs need two sets of one number and size: {images.name} has {images.count} images of "
            f"{images.size[1]}x{images.size[0]}, {real.name} {real.count} of {real.size[1]}x{real.size[0]}"
        )
    batch_size = min(batch_size, images.count)

    @jax.jit
    def compiled(params: Any, x: Array, y: Array) -> Array:
        with jax.default_matmul_precision("highest"):  # else 19 or 16 bits where the device has them
            return distance(params, x, y)

    found = []
    for x, y in zip(images.batches(batch_size), real.batches(batch_size), strict=True):
        fill = [(0, batch_size - len(x)), (0, 0), (0, 0), (0, 0)]
        pair = (from_uint8(np.pad(part, fill, mode="edge")) for part in (x, y))
        found.append(np.asarray(compiled(params, *pair))[: len(x)])
        progress(len(x))
    distances = np.concatenate(found)
    if not np.isfinite(distances).all():
        raise DataError(f"the network gives NaN for {images.name}: its weights are damaged")
    return distances
