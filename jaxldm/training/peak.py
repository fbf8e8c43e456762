"""How near a training step is to what its devices can do: its matrix products compared with their peak."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.cost import macs_of_traced
from jaxldm.training.step import TrainStep

# Side of the matrices and their dtype: the products for which each kind of device is built.
_PEAK_OF = {"cpu": (1024, "float32"), "gpu": (8192, "bfloat16"), "tpu": (8192, "bfloat16")}
_TURNS = 5


def seconds_at_peak(step: TrainStep, state: Any, batch: Any, mesh: Mesh) -> float | None:
    """Seconds that the products and convolutions of a step would take at `matrix_peak`.

    Args:
        step: compiled by `compile_train_step`; it is traced, and not traced again by its first call.
        state, batch: what it will be called with.
        mesh: whose devices it runs on.

    Returns:
        None for a step with a loop whose number of iterations is not known, so that nothing can be counted.
    """
    traced: Any = step
    try:
        macs = macs_of_traced(traced.trace(state, batch))
    except InvalidArgumentError:
        return None
    local = tuple(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    return 2 * macs / (matrix_peak(local) * jax.process_count())


@functools.cache
def matrix_peak(devices: tuple[Any, ...]) -> float:
    """Floating-point operations per second of these devices together, in products of square matrices.

    Measured once in a process, in a second or less: the best of five turns. Of 1024x1024 in float32 on a
    processor, of 8192x8192 in bfloat16 elsewhere.
    """
    side, dtype = _PEAK_OF.get(devices[0].platform, _PEAK_OF["gpu"])
    split = NamedSharding(Mesh(devices, ("device",)), PartitionSpec("device"))
    make = jax.jit(lambda: jnp.ones((len(devices), side, side), dtype), out_shardings=split)
    multiply = jax.jit(lambda a: jax.lax.batch_matmul(a, a), out_shardings=split)
    matrices = make()
    multiply(matrices).block_until_ready()
    best = float("inf")
    for _ in range(_TURNS):
        began = time.perf_counter()
        multiply(matrices).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * len(devices) * side**3 / best
