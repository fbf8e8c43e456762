"""Model folders in NF4, as diffusers and transformers save what bitsandbytes has quantised.

| tensor | meaning |
|---|---|
| `X.weight`, uint8 `[n / 2, 1]` | codes q of the numbers, the first of two in the upper half of a byte |
| `X.weight.absmax` | s of each block of 64 numbers, and the weight is s NF4[q] |
| `X.weight.quant_map` | the table NF4 |
| `X.weight.quant_state.bitsandbytes__nf4` | JSON: shape, length of a block, and so on |
| `X.weight.nested_absmax`, `.nested_quant_map` | where absmax is in 8 bits itself: its scales and table |

Inside of the blocks of a denoising network the codes stay packed in memory (`jaxldm.nn.quantized`); other
weights become numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from jaxldm import models
from jaxldm.checkpoints.names import published
from jaxldm.checkpoints.safetensors_file import Tensor
from jaxldm.entries import read_value
from jaxldm.errors import CheckpointError
from jaxldm.models.quantization import SUPPORTED, nf4_table

STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class Nf4Tensor(NamedTuple):
    """A weight of a file, as numbers when it is used.

    Attributes:
        shape: of the weight.
        block: numbers that share a scale.
        packed: two codes in a byte.
        scales: "absmax" and what it is made of.
        nested: (length of a block of scales, what is added to them), or None.
    """

    shape: tuple[int, ...]
    block: int
    packed: Tensor
    scales: Mapping[str, Tensor]
    nested: tuple[int, float] | None
    dtype: np.dtype = np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        numbers = nf4_table()[self.codes()].reshape(-1, self.block)
        return np.array((numbers * self.absmax()[:, None]).reshape(self.shape), dtype, copy=copy)

    def codes(self) -> np.ndarray:
        """uint8 from 0 to 15, of the weight's shape."""
        stored = np.asarray(self.packed).reshape(-1)
        return np.stack([stored >> 4, stored & 15], axis=-1).reshape(self.shape)

    def absmax(self) -> np.ndarray:
        """float32, of each block."""
        stored = np.asarray(self.scales["absmax"]).reshape(-1)
        if self.nested is None:
            return stored.astype(np.float32)
        length, offset = self.nested
        table, outer = (np.asarray(self.scales[f"nested_{name}"]) for name in ("quant_map", "absmax"))
        spread = np.repeat(outer.reshape(-1).astype(np.float32), length)[: len(stored)]
        return table.astype(np.float32)[stored] * spread + np.float32(offset)


def split_nf4(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Nf4Tensor]]:
    """(the tensors of a folder as numbers, those of them that are in NF4), by published name.

    Raises:
        CheckpointError: another type of bitsandbytes, or parts that are missing or do not fit.
    """
    state, packed = dict(stored), {}
    for name in stored:
        weight, found, kind = name.partition(STATE)
        if not found:
            continue
        if kind != "nf4":
            raise CheckpointError(f"{weight} is in {kind} of bitsandbytes; known: nf4")
        if weight not in stored:
            raise CheckpointError(f"{name} is about {weight}, which is not there")
        del state[name]
        scales = {part: state.pop(f"{weight}.{part}") for part in _PARTS if f"{weight}.{part}" in state}
        state[weight] = packed[weight] = _tensor(weight, stored[name], stored[weight], scales)
    return state, packed


def _tensor(name: str, about: Tensor, stored: Tensor, scales: Mapping[str, Tensor]) -> Nf4Tensor:
    place = f"{name}{STATE}nf4"
    try:
        entries = read_value(json.loads(np.asarray(about).tobytes()), dict, place)
    except ValueError as error:
        raise CheckpointError(f"{place} is no JSON: {error}") from None
    shape = tuple(read_value(entries.get("shape"), list, f"{place}: shape"))
    block = read_value(entries.get("blocksize"), int, f"{place}: blocksize")
    if not shape or not all(isinstance(side, int) and side > 0 for side in shape) or block < 1:
        raise CheckpointError(f"{place} has shape {shape} and blocksize {block}: it is damaged")
    size, nested = math.prod(shape), None
    missing = [part for part in ("absmax", "quant_map") if part not in scales]
    if "nested_offset" in entries:
        missing += [part for part in _PARTS[2:] if part not in scales]
        length = read_value(entries.get("nested_blocksize"), int, f"{place}: nested_blocksize")
        nested = max(length, 1), read_value(entries["nested_offset"], float, f"{place}: nested_offset")
    if missing:
        raise CheckpointError(f"{name}.{missing[0]} is missing")
    blocks, found = -(-size // block), math.prod(scales["absmax"].shape)
    if size % block or math.prod(stored.shape) * 2 != size or found != blocks:
        raise CheckpointError(
            f"{name} is of {size} numbers in blocks of {block}, and has {math.prod(stored.shape)} bytes and "
            f"{found} scales"
        )
    if not np.allclose(np.asarray(scales["quant_map"]).reshape(-1), nf4_table(), atol=1e-6):
        raise CheckpointError(f"{name}.quant_map is not the table of NF4")
    return Nf4Tensor(shape, block, stored, scales, nested)


def keep_codes(
    module: nn.Module,
    template: Mapping[str, Any],
    state: Mapping[str, Tensor],
    packed: Mapping[str, Nf4Tensor],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(template, state) of `from_state_dict`, with packed kernels where the folder and the layers have them.

    Args:
        module: the network; one whose layers take no codes gets numbers.
        template: its parameters' shapes.
        state, packed: of `split_nf4`.
    """
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(dict(template)))
    state = dict(state)
    if not packed or type(module).__name__ not in SUPPORTED:
        return dict(template), state
    names: dict[tuple[str, ...], list[str]] = {}
    for name, tensor in published(template).items():
        names.setdefault(tensor.path, []).append(name)
    known = models.quantized_shapes(module, models.Quantization("int8", modulation="int8"))
    for path, leaf in traverse_util.flatten_dict(known).items():
        if not isinstance(leaf, models.Quantized) or len(leaf.kernel_shape) != 2:
            continue
        tensors = [packed.get(name) for name in names[path]]
        blocks = {None if tensor is None else tensor.block for tensor in tensors}
        block = blocks.pop() if len(blocks) == 1 else None  # of a stack all blocks, or none
        if block is None or leaf.kernel_shape[0] % block or block % 2:
            continue
        flat[path] = _template(leaf, block)
        for name, tensor in zip(names[path], tensors, strict=True):
            assert tensor is not None
            stem = f"{name.removesuffix('weight')}kernel"
            del state[name]
            state[f"{stem}.codes"], state[f"{stem}.scales"] = _Codes(tensor), _Scales(tensor)
    return traverse_util.unflatten_dict(flat), state


def _template(leaf: models.Quantized, block: int) -> models.Quantized:
    """A packed kernel's shapes, in a stack or not."""
    stack, (rows, out) = leaf.scales.shape[:-2], leaf.kernel_shape
    return dataclasses.replace(
        leaf,
        codes=jax.ShapeDtypeStruct((*stack, rows // 2, out), np.uint8),
        scales=jax.ShapeDtypeStruct((*stack, rows // block, out), np.float32),
        smooth=None,
        down=None,
        up=None,
        parts=(rows,),
        weights="nf4",
        activations=None,
        how=models.Quantization("int4", group_size=block),
    )


class _Codes(NamedTuple):
    """The codes of a weight as a kernel's, two of one output in a byte."""

    of: Nf4Tensor
    dtype: np.dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int]:
        out, rows = self.of.shape
        return rows // 2, out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        codes = self.of.codes().T
        return np.array(codes[0::2] | (codes[1::2] << 4), dtype, copy=copy)


class _Scales(NamedTuple):
    """The scales of a weight as a kernel's."""

    of: Nf4Tensor
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        out, rows = self.of.shape
        return rows // self.of.block, out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        scales = self.of.absmax().reshape(self.of.shape[0], -1)
        return np.array(np.ascontiguousarray(scales.T), dtype, copy=copy)
