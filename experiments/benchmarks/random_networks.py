"""Networks with random weights, drawn on the device in their own dtype, and what a call of one costs."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxldm import models, pipelines
from jaxldm.models.cost import macs_of

_STACK = re.compile(r"_\d+to\d+$")  # the name of blocks in one scan: their weights have an axis of blocks


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "fan_in"))
def random_weight(key: Any, shape: tuple[int, ...], dtype: str, fan_in: int | None = None) -> Any:
    """Uniform numbers of variance 1 / fan in, drawn in that dtype; by default all axes but the last go in."""
    bound = math.sqrt(3 / (math.prod(shape[:-1]) if fan_in is None else fan_in))
    return jax.random.uniform(key, shape, jnp.dtype(dtype), -bound, bound)


def random_network(module: Any, dtype: str, seed: int = 0) -> pipelines.Network:
    """A module with weights that are drawn on the device, a tensor at a time: none is ever float32."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(models.shapes(module))
    weights = []
    for number, (path, spec) in enumerate(leaves):
        blocks = any(_STACK.search(entry.key) for entry in path)
        of_one = spec.shape[1:] if blocks else spec.shape
        if len(of_one) > 1:
            key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), number)  # compiles sooner
            weights.append(random_weight(key, spec.shape, dtype, math.prod(of_one[:-1])))
        else:
            weights.append(jnp.full(spec.shape, 0.0 if path[-1].key == "bias" else 1.0, dtype))
    return pipelines.Network(module, jax.tree.unflatten(tree, weights))


def count_flops(module: Any, inputs: Any, method: str | None = None) -> float:
    """Operations of products, convolutions and attention in one call: two a multiply-accumulate.

    inputs: the arguments by name, arrays or their shapes.
    """

    def call(params, inputs):
        return module.apply({"params": params}, **inputs, method=method)

    return 2.0 * macs_of(call, models.shapes(module), inputs)
