"""Where arrays live: one mesh with the axes data, fsdp and tensor, from one CPU to a pod.

The batch is split over `data` and `fsdp`. Each array of the state is split over `fsdp` and `tensor` by the
rules for its name (`jaxldm.models.sharding`) and whole on the devices along `data`. What has to move between
devices (gathered parameters, sums over the batch) is put in by the compiler: the train step knows of no
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxldm.arguments import checked, count, instance
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.sharding import RULES, make_mesh, sharding_of, split
from jaxldm.training.kinds import map_with_names

__all__ = ["make_mesh"]

A_MESH = instance(Mesh, "a mesh such as training.make_mesh()")
_SHARE_OF_PATCHES = 0.05  # of the parameters: the convolution of a transformer's patches has fewer


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Every device holds its share of axis 0: the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


@checked(mesh=A_MESH, batch_size=count(1))
def local_examples(mesh: Mesh, batch_size: int) -> slice | None:
    """The places in a batch that this process's devices hold, where several train together; else None.

    `data.Batches(..., part=local_examples(mesh, batch_size))` reads these alone.
    """
    if jax.process_count() == 1:
        return None
    check_every_process(mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    places = [part[0].indices(batch_size) for part in held if part is not None]
    return slice(min(start for start, _, _ in places), max(stop for _, stop, _ in places))


def check_every_process(mesh: Mesh) -> None:
    """Raise `InvalidArgumentError` when a process has no device of the mesh: it could not train."""
    there = {device.process_index for device in mesh.devices.flat}
    without = [str(number) for number in range(jax.process_count()) if number not in there]
    if without:
        raise InvalidArgumentError(
            f"the mesh has {mesh.size} of {jax.device_count()} devices and none of process "
            f"{' and '.join(without)}: split over all devices, or start fewer processes"
        )


def splits(mesh: Mesh) -> bool:
    """Whether the mesh splits a state, and each device has not all of it."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def own_split(mesh: Mesh) -> Mesh | None:
    """The mesh, where it splits a state and all of its devices are this process's; else None.

    A process can compute alone with arrays that are split over it: with those that lie on the devices of
    others too, all processes would have to compute the same at the same time.
    """
    return mesh if splits(mesh) and jax.process_count() == 1 else None


def own_placement(mesh: Mesh) -> Callable[..., NamedSharding] | None:
    """Where a network that is loaded goes, as `checkpoints.load(sharding=...)` takes it, on such a mesh."""
    own = own_split(mesh)
    return None if own is None else sharding_of(own)


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """The batch on its devices: of one process all of it, of several the part that each of them has read."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    put = jax.make_array_from_process_local_data
    return jax.tree.map(lambda column: put(sharding, np.asarray(column)), batch)


def place_state(mesh: Mesh, state: Any) -> Any:
    """A state, which every process has whole, on its devices by `state_shardings`.

    Arrays that lie on the devices of several processes are there already.
    """
    shardings = state_shardings(mesh, state)
    if jax.process_count() == 1:
        return jax.device_put(state, shardings)

    def put(leaf, sharding):
        if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == mesh.size > 1:
            return leaf
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, state, shardings)


def on_host(tree: Any) -> Any:
    """The arrays of a tree in host memory, whole in every process: they are gathered where they are split.

    Every process has to call it.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def fetch(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of each array of a state, a tree of the same structure, by `models.sharding.RULES`.

    Each name counts from the start of its tree, so the moments and the moving average of a parameter lie
    where that lies. Numbers, vectors and the key are whole on every device.

    Raises:
        InvalidArgumentError: `fsdp` or `tensor` is above 1 and splits no array at all.

    >>> from jaxldm.models.sharding import AXES
    >>> mesh = jax.sharding.AbstractMesh((1, 2, 2), AXES)
    >>> kernel = jax.ShapeDtypeStruct((64, 128), "float32")
    >>> params = {"to_q": {"kernel": kernel}, "to_out_0": {"kernel": kernel}}
    >>> found = state_shardings(mesh, params)
    >>> tuple(found["to_q"]["kernel"].spec), tuple(found["to_out_0"]["kernel"].spec)
    (('fsdp', 'tensor'), ('tensor', 'fsdp'))
    """
    shardings = map_with_names(lambda names, leaf: _sharding(mesh, names, leaf), state)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    for axis in ("fsdp", "tensor"):
        used = any(axis in sharding.spec for sharding in jax.tree.leaves(shardings))
        if mesh.shape[axis] > 1 and not used:
            raise InvalidArgumentError(
                f"{axis}={mesh.shape[axis]} divides no axis of any of the {len(shapes)} arrays of this "
                f"state, so it would split nothing: choose another {axis}"
            )
    return shardings


def numbers_per_device(mesh: Mesh, tree: Any) -> int:
    """Numbers of the arrays (or shapes) of a tree that one device of an accelerator holds, by the same rules.

    The devices of a processor share its memory: there it is all of the numbers, at least.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
    if not on_processor(mesh):
        placed = jax.tree.leaves(map_with_names(lambda names, leaf: _sharding(mesh, names, leaf), tree))
        shapes = [sharding.shard_shape(tuple(shape)) for sharding, shape in zip(placed, shapes, strict=True)]
    return sum(math.prod(shape) for shape in shapes)


def on_processor(mesh: Mesh) -> bool:
    """Whether its devices are those of a processor."""
    return mesh.devices.flat[0].platform == "cpu"


def fastest_mesh(mesh: Mesh, *networks: Any) -> Mesh:
    """The mesh on which networks (trees of arrays or shapes) train fastest: this one, or its first device.

    On a processor XLA gives convolutions one thread for each device, matrix products all threads on one
    device. A network without convolutions (but for that of its patches) gains nothing by more devices, each
    of which would compute the whole update of the parameters: a step of a DiT takes 1.1 to 1.2 times as long
    on two devices of two cores as on one (`experiments/benchmarks/README.md`).
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(networks)]
    of_convolutions = sum(math.prod(shape) for shape in shapes if len(shape) >= 4)
    few = of_convolutions < _SHARE_OF_PATCHES * sum(math.prod(shape) for shape in shapes)
    alone = on_processor(mesh) and jax.process_count() == 1 and not splits(mesh)
    return make_mesh([mesh.devices.flat[0]]) if few and alone and mesh.size > 1 else mesh


def _sharding(mesh: Mesh, names: Sequence[str], leaf: Any) -> NamedSharding:
    return NamedSharding(mesh, split(mesh, names, leaf.shape, RULES)[1])


def bytes_per_device(state: Any) -> int:
    """Bytes of a state on the device that holds most of it."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            for shard in leaf.addressable_shards:
                size = math.prod(shard.data.shape) * leaf.dtype.itemsize
                held[shard.device] = held.get(shard.device, 0) + size
    return max(held.values(), default=0)


def check_batch_size(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raise `InvalidArgumentError` when a batch, or its parts, cannot be split evenly over the mesh."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if accumulate > 1 and batch_size % (shares * accumulate):
        over = f" over {shares} devices" if shares > 1 else ""
        raise InvalidArgumentError(
            f"batch_size {batch_size} cannot be split into {accumulate} equal parts{over}: choose a multiple "
            f"of {shares * accumulate}, or another accumulate"
        )
    if batch_size % shares:
        raise InvalidArgumentError(
            f"batch_size {batch_size} cannot be split over {shares} devices: choose a multiple "
            f"of {shares}, or fewer devices"
        )
