"""A denoising network in fewer bits: which layers, as a pure function from a tree of parameters to another.

The kernels inside of the blocks are quantised (`jaxldm.nn.quantized`). In 16 bits stay the first and the last
layer, embeddings and modulations (unless `modulation="int8"`): they are few numbers, and what they round away
is in every token. Biases and norms stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from jaxldm.arguments import a_module, a_params, array, checked, choice, instance, is_tracer, optional
from jaxldm.errors import InvalidArgumentError, Table, one_of
from jaxldm.models.registry import ARCHITECTURES
from jaxldm.models.registry import class_name as class_of
from jaxldm.models.registry import shapes as shapes_of
from jaxldm.nn.block_stack import STACK
from jaxldm.nn.quantized import (
    KEPT_DTYPE,
    NF4,
    Quantization,
    Quantized,
    dequantize_kernel,
    quantize_kernel,
    with_factors,
)

Path: TypeAlias = tuple[str, ...]
__all__ = [
    "dequantize",
    "how_quantized",
    "param_bytes",
    "param_count",
    "quantization",
    "quantize",
    "quantized_shapes",
    "with_factors",
]

# What was published: 8 bits of weights and activations; 4 bits of weights with SVDQuant's branch.
PRESETS: dict[str, Quantization] = Table("bits")
PRESETS |= {
    "int8": Quantization("int8", "int8"),
    "fp8": Quantization("fp8", "fp8"),
    "int4": Quantization("int4", None, rank=16),
}
# Networks of blocks whose layers are known; what they have in common is the names of their parameters.
SUPPORTED = (
    *("UNet2DModel", "UNet2DConditionModel", "DiT", "SiT", "DiTTransformer2DModel", "SD3Transformer2DModel"),
    *("FluxTransformer2DModel", "PixArtTransformer2DModel", "ZImageTransformer2DModel"),
    *("QwenImageTransformer2DModel", "Flux2Transformer2DModel"),
)
BLOCKS = re.compile(
    r"((down_|up_|transformer_|single_transformer_)?blocks|layers|noise_refiner|context_refiner)"
    r"_\d+(to\d+)?|mid_block"
)
MODULATION = re.compile(r"adaLN_modulation_\d+|norm\w*|time_emb_proj|(img|txt)_mod_1")
EMBEDDING = "emb"  # within a block of `DiTTransformer2DModel`

A_QUANTIZATION = instance(Quantization, "a models.Quantization, such as models.quantization('int8')")


@checked(bits=choice("bits", PRESETS))
def quantization(bits: str, **changes: Any) -> Quantization:
    """The usual settings for "int8", "fp8" or "int4", with fields replaced.

    Raises:
        UnknownNameError: other bits, or a field that there is not.
        InvalidArgumentError: a value that a field cannot have, or a group_size of other weights than int4.

    >>> quantization("int4", rank=32).rank
    32
    """
    for name in changes:
        one_of("field of a Quantization", name, [field.name for field in dataclasses.fields(Quantization)])
    how = dataclasses.replace(PRESETS[bits], **changes)
    if "group_size" in changes and how.weights != "int4":
        raise InvalidArgumentError(
            f"group_size is for weights in int4, and these are in {how.weights}: leave it out"
        )
    return how


@checked(params=a_params)
def how_quantized(params: Any) -> Quantization | None:
    """What a tree of parameters was quantised with; None: it was not."""
    found = (leaf.how for leaf in jax.tree.leaves(params, is_leaf=_is_packed) if _is_packed(leaf))
    return next(found, None)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def refuse_quantized(params: Any, what: str) -> None:
    """Raise `InvalidArgumentError` where parameters are in fewer bits, which `what` cannot use."""
    how = how_quantized(params)
    if how is not None:
        raise InvalidArgumentError(
            f"{what} needs a network in full precision, and this one is quantised to {how.weights}: give the "
            "one that it was made of"
        )


@checked(
    module=a_module,
    params=a_params,
    how=A_QUANTIZATION,
    input_max=optional(instance(Mapping, "maxima of the inputs, as pipelines.calibrate_quantization gives")),
)
def quantize(
    module: nn.Module,
    params: Mapping[str, Any],
    how: Quantization,
    input_max: Mapping[Path, Any] | None = None,
) -> dict[str, Any]:
    """The parameters of a denoising network in fewer bits, for the same module.

    A pure function of arrays: under `jax.eval_shape` it tells what the result will be.

    Args:
        module: the network.
        params: its parameters, or those of a teacher or an average of the same module.
        how: `quantization("int8")`, "fp8", "int4", or settings of your own.
        input_max: {path of a layer: the largest absolute input of each channel}; needed for `how.smooth`.

    Raises:
        InvalidArgumentError: parameters that are quantised already; a network whose layers are not known
            here; smoothing without maxima, or without those of a layer.

    >>> from jaxldm import models
    >>> dit = models.build("tiny-dit")
    >>> small = models.quantized_shapes(dit, models.quantization("int8"))
    >>> small["blocks_0"]["attn"]["qkv"]["kernel"].codes
    ShapeDtypeStruct(shape=(128, 384), dtype=int8)
    """
    check_can_quantize(module, params)
    if how.smooth is not None and input_max is None:
        raise InvalidArgumentError(
            "smooth needs a calibration: give input_max of pipelines.calibrate_quantization, or leave it out"
        )
    flat = cast(dict[Path, Any], traverse_util.flatten_dict(dict(params)))
    parts = skip_halves({path: tuple(leaf.shape) for path, leaf in flat.items()})
    changed: dict[Path, Any] = {}
    for path, leaf in flat.items():
        kind = kind_of(path, how)
        if kind is None:
            matrix = len(leaf.shape) - _stacked(path) >= 2
            changed[path] = jnp.asarray(leaf).astype(KEPT_DTYPE) if matrix else leaf
            continue
        peak = None
        if kind == "block" and how.smooth is not None and input_max is not None:
            peak = input_max.get(path[:-1])
            if peak is None:
                raise InvalidArgumentError(
                    f"the calibration has no inputs of {'/'.join(path[:-1])}: it is of another network"
                )
            _check_peak(path, peak, (*leaf.shape[: _stacked(path)], leaf.shape[-2]))
        only = kind == "modulation"
        changed[path] = _quantized(leaf, peak, how, parts.get(path, ()), only, _stacked(path))
    return traverse_util.unflatten_dict(changed)


def _check_peak(path: Path, peak: Any, shape: tuple[int, ...]) -> None:
    """Raises `InvalidArgumentError` for what are not the largest inputs of a layer."""
    name = f"input_max of {'/'.join(path[:-1])}"
    given = array("real", str(list(shape)), axes=len(shape))(name, peak)
    if given.shape != shape:
        raise InvalidArgumentError(
            f"{name} must be one number for each of its inputs, {list(shape)}, got {list(given.shape)}: the "
            "calibration is of another network"
        )
    if not is_tracer(given) and not (np.asarray(given, np.float64) >= 0).all():
        raise InvalidArgumentError(
            f"{name} must be at least 0, got NaN or less in it: calibrate a network whose images are finite"
        )


def check_can_quantize(module: nn.Module, params: Any) -> None:
    """Raises `InvalidArgumentError` for parameters that are quantised, and networks that cannot be."""
    how = how_quantized(params)
    if how is not None:
        raise InvalidArgumentError(
            f"this network is quantised already, to {how.weights}: quantise the one that it was made of"
        )
    config = getattr(module, "config", None)
    known = config is not None and any(type(config) is kind for _, kind in ARCHITECTURES.values())
    name = class_of(cast(Any, config)) if known else type(module).__name__
    if name not in SUPPORTED:
        raise InvalidArgumentError(
            f"{name} cannot be quantised: which of its layers need 16 bits is known of {', '.join(SUPPORTED)}"
        )


def kind_of(path: Path, how: Quantization) -> str | None:
    """What becomes of a parameter: "block": fewer bits; "modulation": int8 weights alone; None: neither."""
    if path[-1] != "kernel" or not BLOCKS.fullmatch(path[0]) or EMBEDDING in path:
        return None
    if any(map(MODULATION.fullmatch, path)):
        return "modulation" if how.modulation == "int8" else None
    return "block"


@partial(jax.jit, static_argnames=("how", "parts", "weights_only", "stacked"))
def _quantized(
    leaf: Any, peak: Any, how: Quantization, parts: tuple[int, ...], weights_only: bool, stacked: bool
) -> Quantized:
    """`quantize_kernel` of a kernel, or of those of all blocks in a stack; compiled once for each shape."""

    def one(kernel: Any, peak: Any) -> Quantized:
        return quantize_kernel(kernel, how, peak, parts, weights_only)

    return (jax.vmap(one) if stacked else one)(leaf, peak)


@checked(module=a_module, how=A_QUANTIZATION)
def quantized_shapes(module: nn.Module, how: Quantization) -> dict[str, Any]:
    """What `quantize` makes of a network: shapes and dtypes, without memory for either."""
    shapes = shapes_of(module)
    maxima = {
        path[:-1]: jax.ShapeDtypeStruct((*leaf.shape[: _stacked(path)], leaf.shape[-2]), jnp.float32)
        for path, leaf in cast(dict[Path, Any], traverse_util.flatten_dict(shapes)).items()
        if path[-1] == "kernel" and how.smooth is not None
    }
    # Paths are no part of what is traced: the numbers alone are.
    make = lambda params, peaks: quantize(module, params, how, dict(zip(maxima, peaks, strict=True)))  # noqa: E731
    return jax.eval_shape(make, shapes, list(maxima.values()))


def nf4_table() -> Float[np.ndarray, " 16"]:
    """What the codes of NF4 stand for."""
    return np.array(NF4, np.float32)


def _stacked(path: Path) -> bool:
    return any(map(STACK.fullmatch, path))


def skip_halves(shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, tuple[int, int]]:
    """{kernel: (inputs from below, inputs from the skip connection)} of a U-Net's levels on the way up.

    The two halves of what is joined there have ranges of their own: quantised apart, as in Q-Diffusion (Li et
    al. 2023, arXiv:2302.04304, section 3.4).
    """
    levels = {
        (int(match[1]), int(match[2]))
        for path in shapes
        if (match := re.fullmatch(r"up_blocks_(\d+)/resnets_(\d+)", "/".join(path[:2])))
    }
    if not levels:
        return {}
    below = _lowest(shapes)
    halves: dict[Path, tuple[int, int]] = {}
    for level, layer in sorted(levels):
        block = (f"up_blocks_{level}", f"resnets_{layer}")
        for name in ("conv1", "conv_shortcut"):
            kernel = (*block, name, "kernel")
            if kernel in shapes:
                halves[kernel] = (below, shapes[kernel][-2] - below)
        below = shapes[(*block, "conv2", "kernel")][-1]
    return halves


def _lowest(shapes: Mapping[Path, tuple[int, ...]]) -> int:
    """Channels that the first level on the way up gets from below."""
    middle = ("mid_block", "resnets_1", "conv2", "kernel")
    if middle in shapes:
        return shapes[middle][-1]
    down = sorted(
        (int(path[0].rpartition("_")[2]), shape[-1])
        for path, shape in shapes.items()
        if path[0].startswith("down_blocks_") and path[2:] == ("conv2", "kernel")
    )
    return down[-1][1]


@checked(params=a_params)
def dequantize(params: Mapping[str, Any]) -> dict[str, Any]:
    """The float32 parameters that those in fewer bits stand for, for comparison; others stay as they are."""

    def whole(leaf: Any) -> Any:
        if not _is_packed(leaf):
            return leaf
        stacked = len(leaf.shape) > len(leaf.kernel_shape)
        return (jax.vmap(dequantize_kernel) if stacked else dequantize_kernel)(leaf)

    return jax.tree.map(whole, dict(params), is_leaf=_is_packed)


@checked(params=a_params)
def param_count(params: Any) -> int:
    """Numbers in a tree of parameters, a quantised kernel counting as many as it stands for."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=_is_packed))


@checked(params=a_params)
def param_bytes(params: Any) -> int:
    """Bytes of all arrays in a tree of parameters."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
