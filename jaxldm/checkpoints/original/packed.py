"""Original files in fewer bits: "scaled fp8", and the types of GGUF (`gguf_types`).

Of scaled fp8:

| tensor | meaning |
|---|---|
| `X.weight`, float8_e4m3fn | the codes q |
| `X.scale_weight` or `X.weight_scale`, a number or one for each row | s, and the weight is s q |
| `X.scale_input`, `X.input_scale` | of activations, which are not rounded here: left out |
| `scaled_fp8` | a mark, left out |

Inside of the blocks of a denoising network the codes stay what they are, in memory as in the file
(`jaxldm.nn.quantized`); other weights become numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import ml_dtypes
import numpy as np
from flax import traverse_util

from jaxldm import models
from jaxldm.checkpoints.gguf_file import GgufTensor
from jaxldm.checkpoints.gguf_types import TYPES, scale_dtype
from jaxldm.checkpoints.names import published
from jaxldm.checkpoints.original.layout import Converted, Form, Table, place_of
from jaxldm.checkpoints.safetensors_file import Tensor
from jaxldm.errors import CheckpointError
from jaxldm.models.quantization import SUPPORTED

_SCALES = (".scale_weight", ".weight_scale")
_LEFT_OUT = (".scale_input", ".input_scale", "scaled_fp8")
_CODES = np.dtype(ml_dtypes.float8_e4m3fn)


class Codes(NamedTuple):
    """The quantised weights of a file, by their names in it: 8-bit tensors, and their scales."""

    weights: Mapping[str, Tensor]
    scales: Mapping[str, np.ndarray]


def split_scales(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Codes]:
    """(the tensors of a file as numbers, its quantised weights); none of a file without scales.

    Raises:
        CheckpointError: a scale without its weight, of another shape, or that is not a finite number.
    """
    left_out = (*_SCALES, *_LEFT_OUT)
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith(left_out)}
    codes: dict[str, Tensor] = {}
    scales: dict[str, np.ndarray] = {}
    for name in stored:
        if not name.endswith(_SCALES):
            continue
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight not in tensors:
            raise CheckpointError(f"{name} is the scale of {weight}, which is not there")
        codes[weight], scale = tensors[weight], np.asarray(stored[name]).astype(np.float32)
        rows = codes[weight].shape[0] if codes[weight].shape else 1
        if scale.size not in (1, rows) or not np.isfinite(scale).all():
            raise CheckpointError(
                f"{name} {scale.shape} must be a finite number, or one for each of the {rows} rows"
            )
        scales[weight] = scale.reshape(-1)
        tensors[weight] = _numbers(codes[weight], scales[weight])
    return tensors, Codes(codes, scales)


def _numbers(codes: Tensor, scale: np.ndarray) -> Converted:
    """s q, computed when it is used."""
    shape = tuple(codes.shape)
    spread = scale.reshape(-1, *(1,) * (len(shape) - 1)) if scale.size > 1 else scale[0]
    return Converted((codes,), shape, lambda array: array.astype(np.float32) * spread, np.float32)


def keep_codes(
    module: nn.Module, template: Mapping[str, Any], state: Mapping[str, Tensor], table: Table, codes: Codes
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(template, state) of `from_state_dict`, with quantised kernels where the file has them.

    Args:
        module: the network; one whose layers take no codes gets numbers.
        template: its parameters' shapes.
        state: its tensors as numbers, by published name.
        table: from published to original names.
        codes: by original name.
    """
    flat, state = traverse_util.flatten_dict(dict(template)), dict(state)
    if not codes.weights or type(module).__name__ not in SUPPORTED:
        return dict(template), state
    parts: dict[tuple[str, ...], list[tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in published(template).items():
        parts.setdefault(tensor.path, []).append((name, tensor.axes))
    known = models.quantized_shapes(module, models.Quantization("fp8"))
    for path, leaf in traverse_util.flatten_dict(known).items():
        if not isinstance(leaf, models.Quantized):
            continue
        places = [place_of(name, table) for name, _ in parts[path]]
        stored = [codes.weights.get(place.name) for place in places]
        kinds = {_kind(tensor) for tensor in stored}
        kind = kinds.pop() if len(kinds) == 1 else None  # of a stack all blocks, or none
        if kind is None or (kind != "fp8" and len(leaf.kernel_shape) != 2):
            continue
        cast(dict[Any, Any], flat)[path] = _template(leaf, kind)
        for (name, axes), place, tensor in zip(parts[path], places, stored, strict=True):
            del state[name]
            stem = f"{name.removesuffix('weight')}kernel"
            scale = codes.scales.get(place.name)
            if scale is not None:
                arrays = _fp8(place.form, tensor, scale, axes, leaf)
            else:
                arrays = _of_gguf(place.form, cast(Any, tensor))
            state |= {f"{stem}.{part}": array for part, array in arrays.items()}
    return traverse_util.unflatten_dict(flat), state


def _kind(tensor: Any) -> str | None:
    """How a weight is stored; None: as numbers, or in a way that layers cannot use."""
    if isinstance(tensor, GgufTensor):
        return tensor.kind or None
    return "fp8" if tensor is not None and np.dtype(tensor.dtype) == _CODES else None


def _template(leaf: models.Quantized, kind: str) -> models.Quantized:
    """A quantised kernel's shapes, in a stack or not."""
    import jax

    stack, (rows, out) = leaf.scales.shape[:-2], leaf.kernel_shape[-2:]
    if kind == "fp8":
        return dataclasses.replace(leaf, scales=jax.ShapeDtypeStruct(leaf.scales.shape, np.float32))
    known = TYPES[kind]
    groups, packed = rows // known.group, known.bits == 4
    codes, weights = ((rows // 2, np.uint8), "int4") if packed else ((rows, np.int8), "int8")
    of_groups = (*stack, groups, out)
    return dataclasses.replace(
        leaf,
        codes=jax.ShapeDtypeStruct((*stack, codes[0], out), codes[1]),
        scales=jax.ShapeDtypeStruct(of_groups, scale_dtype(kind) if packed else np.float32),
        offsets=jax.ShapeDtypeStruct(of_groups, np.float32) if known.has_offsets else None,
        parts=(rows,) if packed else (known.group,) * groups,
        weights=weights,
        how=models.Quantization(weights, group_size=known.group),
    )


def _fp8(
    form: Form, tensor: Any, scale: np.ndarray, axes: tuple[int, ...], leaf: models.Quantized
) -> dict[str, Tensor]:
    """The codes and scales of a kernel."""
    scales = _row_scales(form, tensor, scale, leaf)
    return {"codes": _in_our_layout(form.to_published(tensor), axes), "scales": scales}


@dataclasses.dataclass(frozen=True)
class _Part:
    """The codes or the scales of a tensor, read when they are used."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype, copy=copy)


def _of_gguf(form: Form, tensor: GgufTensor) -> dict[str, Tensor]:
    """The arrays of a kernel; of 4 bits two codes in a byte, as `jaxldm.nn.quantized` packs them."""
    out, rows = tensor.shape
    known = TYPES[tensor.kind]
    of_groups = (out, rows // known.group)
    parts = {
        "codes": _Part((out, rows), np.dtype(np.int8), tensor.codes),
        "scales": _Part(of_groups, np.dtype(scale_dtype(tensor.kind)), tensor.scales),
    }
    if known.has_offsets:
        parts["offsets"] = _Part(of_groups, np.dtype(np.float32), cast(Any, tensor.offsets))
    arrays: dict[str, Tensor] = {
        name: _in_our_layout(form.to_published(part), (1, 0)) for name, part in parts.items()
    }
    if known.bits == 4:
        codes = arrays["codes"]
        arrays["codes"] = Converted((codes,), (codes.shape[0] // 2, codes.shape[1]), _two_in_a_byte, np.uint8)
    return arrays


def _two_in_a_byte(codes: np.ndarray) -> np.ndarray:
    """Codes [rows, out] from -8 to 7 as bytes [rows / 2, out]."""
    nibbles = codes.view(np.uint8) & 15
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _in_our_layout(tensor: Tensor, axes: tuple[int, ...]) -> Converted:
    """A published tensor as the kernel that it is here."""
    order = np.argsort(axes)
    shape = tuple(tensor.shape[axis] for axis in order)
    return Converted((tensor,), shape, lambda array: np.ascontiguousarray(array.transpose(order)))


def _row_scales(form: Form, tensor: Tensor, scale: np.ndarray, leaf: models.Quantized) -> np.ndarray:
    """A scale for each output, once for each part of the inputs `[parts, out]`."""
    rows = np.broadcast_to(scale.reshape(-1, *(1,) * (len(tensor.shape) - 1)), tensor.shape)
    own = np.asarray(form.to_published(rows)).reshape(leaf.kernel_shape[-1], -1)[:, 0]
    return np.ascontiguousarray(np.broadcast_to(own, (len(leaf.parts), len(own))), np.float32)
