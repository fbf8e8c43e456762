"""Many images through one compiled function: batches of one fixed size, split over the devices.

XLA may round differently for batches of different sizes. Here every device always computes
`images_per_device` images at a time (`IMAGES_PER_DEVICE` for the small models), so that an image is the same
to the last bit however many are asked for, and nothing compiles anew for another number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jaxldm.errors import InvalidArgumentError

IMAGES_PER_DEVICE = 16


def image_mesh(
    num_images: int, devices: Sequence[Any] | None = None, images_per_device: int = IMAGES_PER_DEVICE
) -> Mesh:
    """A mesh with the one axis "images": all `devices` (default: all of this process), or one if that is
    enough.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    if not devices:
        raise InvalidArgumentError("devices is empty: leave it out, or name one or more of jax.devices()")
    if num_images <= images_per_device:
        devices = devices[:1]
    return Mesh(np.asarray(devices), ("images",))


def over_images(function: Callable[..., Array], mesh: Mesh) -> Callable[..., Array]:
    """`function(shared, per_image)` with the rows of the tree `per_image` and of the result split over the
    mesh.

    Each device runs the same program on its own rows; nothing passes between devices.
    """
    rows = PartitionSpec("images")
    # check_vma: a solver's state starts the same on all devices and then differs, which the check would
    # refuse.
    return jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
    )


def in_fixed_batches(
    function: Callable[[Any], Array],
    per_image: Any,
    mesh: Mesh,
    batch_size: int,
    images_per_device: int = IMAGES_PER_DEVICE,
) -> np.ndarray:
    """Runs `function` on the rows of the tree `per_image` [N, ...] and joins the results, [N, ...], on the
    host.

    Batches are filled up to `images_per_device` rows on each device by repeating the last row. As many
    batches as `batch_size` images make are under way before the first result is waited for.

    Raises:
      InvalidArgumentError: batch_size below 1.
    """
    if batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be 1 or more, not {batch_size}")
    rows_per_batch = images_per_device * mesh.size
    num_rows = len(jax.tree.leaves(per_image)[0])
    under_way: list[Array] = []
    results: list[np.ndarray] = []
    for batch in _batches(per_image, num_rows, rows_per_batch):
        under_way.append(function(batch))
        if len(under_way) * rows_per_batch >= batch_size:
            results.append(np.asarray(under_way.pop(0)))
    results.extend(np.asarray(batch) for batch in under_way)
    return np.concatenate(results)[:num_rows]


def num_batches(num_images: int, mesh: Mesh, images_per_device: int = IMAGES_PER_DEVICE) -> int:
    """How many fixed batches `num_images` need."""
    return -(-num_images // (images_per_device * mesh.size))


def _batches(per_image: Any, num_rows: int, rows_per_batch: int) -> Iterator[Any]:
    for start in range(0, num_rows, rows_per_batch):
        rows = np.minimum(np.arange(start, start + rows_per_batch), num_rows - 1)
        yield jax.tree.map(lambda column, rows=rows: np.asarray(column)[rows], per_image)
