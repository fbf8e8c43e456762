"""Networks with random weights, drawn on the device in their own dtype."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxldm import models, pipelines


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_weight(key: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Uniform numbers of variance 1 / fan in, drawn in that dtype."""
    bound = math.sqrt(3 / math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, jnp.dtype(dtype), -bound, bound)


def random_network(module: Any, dtype: str, seed: int = 0) -> pipelines.Network:
    """A module with weights that are drawn on the device, a tensor at a time: none is ever float32."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(models.shapes(module))
    weights = []
    for number, (path, spec) in enumerate(leaves):
        if len(spec.shape) > 1:
            key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), number)  # compiles sooner
            weights.append(random_weight(key, spec.shape, dtype))
        else:
            weights.append(jnp.full(spec.shape, 0.0 if path[-1].key == "bias" else 1.0, dtype))
    return pipelines.Network(module, jax.tree.unflatten(tree, weights))
