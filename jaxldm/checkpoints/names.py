"""Flax parameters <-> the flat, PyTorch-shaped tensors of published checkpoints.

Submodules carry their published names, so one rule serves every model, in both directions:

| ours | published | tensor |
|---|---|---|
| `down_blocks_0/resnets_1/conv1/kernel` | `down_blocks.0.resnets.1.conv1.weight` | `[h, w, in, out]` ->
`[out, in, h, w]` | | `to_out_0/kernel` | `to_out.0.weight` | `[in, out]` -> `[out, in]` |
| `norm1/scale`, `class_embedding/embedding` | `norm1.weight`, `class_embedding.weight` | as it is |
| any other leaf: `bias`, `weight` (already in published layout), `pos_embed` | the same | as it is |
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from jaxldm.errors import CheckpointError

# The exceptions. Published names that end in _<number> without meaning "the n-th of a list":
KEPT = frozenset({"linear_1", "linear_2"})
# Attention projections in checkpoints written by early diffusers:
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def published_name(path: tuple[str, ...]) -> str:
    """("blocks_0", "attn", "qkv", "kernel") -> "blocks.0.attn.qkv.weight"."""
    *modules, leaf = path
    modules = [name if name in KEPT else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([*modules, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def _published_axes(path: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """Where each axis of the published tensor stands in ours: (in, out) last here, (out, in) first there."""
    if path[-1] != "kernel" or rank < 2:
        return tuple(range(rank))
    return (rank - 1, rank - 2, *range(rank - 2))


def to_state_dict(params: Mapping) -> dict[str, np.ndarray]:
    """Nested Flax parameters -> {published name: tensor}, in host memory, values unchanged bit for bit."""
    state = {}
    for path, value in traverse_util.flatten_dict(params).items():
        array = np.asarray(value)
        state[published_name(path)] = np.asarray(
            array.transpose(_published_axes(path, array.ndim)), order="C"
        )
    return state


def from_state_dict(state: Mapping[str, np.ndarray], template_params: Mapping) -> dict:
    """{published name: tensor} -> nested Flax parameters like `template_params`, the inverse of
    `to_state_dict`.

    Args:
      template_params: the parameters, or their `jax.ShapeDtypeStruct`; the result takes their dtypes.

    Raises:
      CheckpointError: tensors missing, left over or of another shape, each named with both shapes.
    """
    template = traverse_util.flatten_dict(template_params)
    names = {path: published_name(path) for path in template}
    state = _with_current_names(state, set(names.values()))
    axes = {path: _published_axes(path, len(spec.shape)) for path, spec in template.items()}
    wanted = {names[path]: tuple(spec.shape[axis] for axis in axes[path]) for path, spec in template.items()}
    _check(wanted, {name: tuple(tensor.shape) for name, tensor in state.items()})
    params = {}
    for path, spec in template.items():
        ours = np.asarray(state[names[path]]).transpose(np.argsort(axes[path]))
        params[path] = jax.numpy.asarray(np.asarray(ours, order="C"), dtype=spec.dtype)
    return traverse_util.unflatten_dict(params)


def _with_current_names(state: Mapping[str, np.ndarray], known: set[str]) -> dict[str, np.ndarray]:
    def current(name: str) -> str:
        renamed = ".".join(OLD_NAMES.get(part, part) for part in name.split("."))
        return renamed if name not in known and renamed in known else name

    return {current(name): tensor for name, tensor in state.items()}


def _check(wanted: dict[str, tuple], given: dict[str, tuple]) -> None:
    problems = [f"missing: {name} {wanted[name]}" for name in wanted if name not in given]
    problems += [f"left over: {name} {given[name]}" for name in given if name not in wanted]
    problems += [
        f"another shape: {name} is {given[name]} in the file, {shape} in the model"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CheckpointError("the weights do not fit the model: " + "; ".join(shown))
