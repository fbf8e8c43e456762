"""The largest batch whose update fits into memory, found from compiled programs: nothing is run for it.

A recipe asks for it with `batch_size=AUTO` (`--batch-size auto`). The number that is found is kept in the
folder of the stage, so that a run goes on with the same one, also on another
machine whose devices divide it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import Mesh

from jaxldm import host
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.files import write_atomically
from jaxldm.memory import as_bytes, size_of
from jaxldm.reading import MAX_JSON_BYTES, read_bytes
from jaxldm.training.mesh import batch_sharding, state_shardings
from jaxldm.training.processes import least
from jaxldm.training.runs import StageFolder
from jaxldm.training.sealed import sealed, unsealed
from jaxldm.training.stage_recipe import AUTO, UpdatesRecipe
from jaxldm.training.step import TrainStep, compile_train_step

FILE = "batch_size.json"
# Of the memory of a processor's machine, where the data, other programs and the process itself lie too, and
# of an accelerator's.
SHARE_OF_HOST, SHARE_OF_DEVICE = 0.7, 0.9
_FIRST = 16  # examples, that doubling begins with
_FINENESS = 8  # the answer is within one part of so many


def smallest_batch(recipe: UpdatesRecipe, mesh: Mesh) -> int:
    """Examples that a batch has to have a multiple of."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * recipe.accumulate


def with_some_size(recipe: Any, mesh: Mesh) -> Any:
    """The recipe of a stage with a batch size: the smallest where it is still to be found."""
    if recipe.batch_size != AUTO:
        return recipe
    return dataclasses.replace(recipe, batch_size=smallest_batch(recipe, mesh))


def largest_batch(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit`, at most `most`, that fits, or one at most an eighth smaller.

    Doubles from about 16 while it fits, or halves until it does, and then bisects.

    Raises:
        InvalidArgumentError: not even `unit` fits.

    >>> largest_batch(lambda size: size <= 100, 1, 4000), largest_batch(lambda size: size <= 5, 1, 4000)
    (96, 5)
    """
    bound = most // unit  # everything below counts in units
    low, high = 0, bound + 1
    tried = min(bound, max(1, _FIRST // unit))
    while tried > low:
        if fits(tried * unit):
            low = tried
            tried = min(2 * tried, bound) if high > bound else (low + high) // 2
        else:
            high = tried
            tried = (low + high) // 2
        if high <= bound and low and high - low <= max(1, low // _FINENESS):
            break
    if not low:
        raise InvalidArgumentError(
            f"not even a batch of {unit} fits into memory: take a smaller network, or one with remat=True"
        )
    return low * unit


def bytes_of_step(step: TrainStep, state: Any, batch: Any, mesh: Mesh) -> int:
    """Bytes that a compiled update holds at once on a device; of a processor, those of all its devices.

    Args:
        step: pure, as for `compile_train_step`.
        state, batch: their shapes, `jax.ShapeDtypeStruct`.
        mesh: that it is compiled for.
    """
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    state = jax.tree.map(place, state, state_shardings(mesh, state))
    batch = jax.tree.map(lambda leaf: place(leaf, batch_sharding(mesh)), batch)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # What a processor's program holds is settled before LLVM makes its code, most of the compile time.
    options: dict[str, Any] = {"xla_backend_optimization_level": 0} if on_cpu else {}
    lowered = cast(Any, compile_train_step(step, mesh)).lower(state, batch)
    found = lowered.compile(compiler_options=options).memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    held -= found.alias_size_in_bytes
    if not on_cpu:
        return held
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return held * len(local) + size_of(_without_keys(state))  # a checkpoint is a copy in the same memory


def _without_keys(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


def find_batch_size(
    recipe: UpdatesRecipe,
    step: TrainStep,
    state: Any,
    row: Any,
    num_examples: int,
    mesh: Mesh,
    log: Callable[[str], None],
) -> int:
    """The largest batch of a stage whose update fits.

    Args:
        recipe: of the stage.
        step: pure.
        state: its shapes.
        row: an example, arrays `[1, ...]` by name.
        num_examples: of the training.
        mesh: that it is split over.
        log: takes each line of text.

    Raises:
        InvalidArgumentError: not even the smallest fits.
    """
    device, unit = mesh.devices.flat[0], smallest_batch(recipe, mesh)
    there, on_cpu = host.memory_bytes(device), device.platform == "cpu"
    share = SHARE_OF_HOST if on_cpu else SHARE_OF_DEVICE
    needed: dict[int, int] = {}

    def fits(size: int) -> bool:
        batch = jax.tree.map(
            lambda column: jax.ShapeDtypeStruct((size, *column.shape[1:]), column.dtype), row
        )
        needed[size] = bytes_of_step(step, state, batch, mesh)
        return bool(least(needed[size] <= share * there))  # hosts may differ

    log(f"looking for the largest batch whose update fits into {share:.0%} of {as_bytes(there)}")
    found = largest_batch(fits, unit, num_examples)
    whose = "memory" if on_cpu else "the device's memory"
    log(
        f"batch size {found}: an update needs {as_bytes(needed.get(found, 0))} of {whose}; the learning rate "
        f"stays {recipe.learning_rate:g}"
    )
    return found


def read_batch_size(folder: StageFolder) -> int | None:
    """The batch size that a stage has begun with; None where it has not begun."""
    path = folder.path / FILE
    if not path.exists():
        return None
    found = unsealed(read_bytes(path, MAX_JSON_BYTES), path, ("batch_size",))["batch_size"]
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(f"{path} holds no batch size: {json.dumps(found)[:100]}")
    return found


def write_batch_size(folder: StageFolder, size: int) -> None:
    """Keep it for when the stage goes on."""
    write_atomically(folder.path / FILE, sealed({"batch_size": size}))
