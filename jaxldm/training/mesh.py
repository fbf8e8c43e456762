"""Where arrays live: one mesh with the axes data, fsdp and tensor, from one CPU to a pod.

Today the batch is split over `data` and `fsdp`, and the state is kept whole on every device. The sums over
the batch (loss and gradients) become all-reduces that the compiler puts in: the train step itself knows of no
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxldm.errors import InvalidArgumentError

AXES = ("data", "fsdp", "tensor")


def make_mesh(devices: Sequence[Any] | int | None = None, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over `devices` (None: all of them; a number: the first so many), the rest of them along `data`.

    Raises `InvalidArgumentError` when there are not so many devices, or `fsdp * tensor` does not divide them.
    """
    if devices is None:
        devices = jax.devices()
    elif isinstance(devices, int):
        if not 1 <= devices <= jax.device_count():
            raise InvalidArgumentError(
                f"devices must lie in [1, {jax.device_count()}] on this machine, not {devices}"
            )
        devices = jax.devices()[:devices]
    if fsdp < 1 or tensor < 1 or len(devices) % (fsdp * tensor):
        raise InvalidArgumentError(
            f"{len(devices)} devices cannot be laid out with fsdp={fsdp} and tensor={tensor}"
        )
    return Mesh(np.asarray(devices).reshape(-1, fsdp, tensor), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array: the state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Every device holds its share of axis 0: the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raises `InvalidArgumentError` when a batch cannot be split evenly over the mesh."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shares:
        raise InvalidArgumentError(
            f"batch_size {batch_size} cannot be split over {shares} devices: choose a multiple "
            f"of {shares}, or fewer devices"
        )
