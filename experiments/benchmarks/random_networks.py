"""The same architecture with random weights on both sides, drawn on the device in their own dtype."""

from __future__ import annotations

import functools
import math
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import torch
import transformers

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


def their_module(config: Any, dtype: str, device: torch.device) -> torch.nn.Module:
    """The same architecture with the random weights that it starts with, made on the device in that dtype."""
    entries = models.config_to_dict(config)
    entries = {
        name: value
        for name, value in entries.items()
        if not name.startswith("_") and name not in ("architectures", "model_type")
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with device:
            if config.library == "diffusers":
                model = getattr(diffusers, models.class_name(config))(**entries)
            else:
                kind = getattr(transformers, models.class_name(config))
                model = kind(kind.config_class(**entries))
    finally:
        torch.set_default_dtype(before)
    if device.type == "cuda" and config.library == "diffusers":
        model = model.to(memory_format=torch.channels_last)  # what diffusers advises for convolutions
    return model.eval()
