"""Kernels in 8 or 4 bits: how they are packed, and the one place where a layer applies them.

A kernel W `[..., in, out]` becomes codes q and scales s, W = s q. `Linear`, `Conv2d` and the projections of
attention take such a kernel where they take an array, so a network in fewer bits is the same module with
another tree of parameters.

| weights | codes | a scale for |
|---|---|---|
| int8 | -127 to 127 | each output channel (Q-Diffusion: of each half of a skip connection) |
| fp8 | float8_e4m3fn, up to 448 | the same |
| int4 | -7 to 7, two in a byte | each output channel of `group_size` inputs |

Activations get a scale in every call: a token its own, in a convolution of several pixels an image its own.

    y = Q(x / l) Q(l W - A' B) + x A B        with A = A' / l

l is SmoothQuant's vector (Xiao et al. 2023, arXiv:2211.10438, eq. 4), A B the low-rank branch of SVDQuant (Li
et al. 2024, arXiv:2411.05007, eq. 5 to 7), in 16 bits; a LoRA adds its factors to A and B.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from jaxldm.arguments import check_fields, choice, count, number, optional
from jaxldm.errors import InvalidArgumentError

PACKED = ("int4", "nf4")  # two codes in a byte, in groups
# What the codes of NF4 stand for: quantiles of a normal distribution (Dettmers et al. 2023, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}  # of the codes
BITS = tuple(LARGEST)
MOST_PARTS = 4  # of the inputs, that are multiplied one by one
KEPT_DTYPE = jnp.bfloat16  # dtype of the layers that keep 16 bits, and of the branch
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's largest number: tried for int4's scales


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a network is written in fewer bits.

    Attributes:
        weights: "int8", "fp8" or "int4".
        activations: the same names, or None: they stay as they are. Where the weights are of another kind, or
            in groups, the activations are rounded and the product is computed in floating point.
        group_size: inputs that share a scale, of int4.
        smooth: SmoothQuant's alpha, 0.5 in the paper; it needs a calibration. None: without.
        rank: of SVDQuant's branch, 32 in the paper; 0: without.
        modulation: "bfloat16", or "int8": the weights of adaptive norms in 8 bits, their input as it is. They
            are a third of a DiT.
    """

    weights: str = "int8"
    activations: str | None = None
    group_size: int = 64
    smooth: float | None = None
    rank: int = 0
    modulation: str = "bfloat16"

    def __post_init__(self):
        check_fields(
            self,
            weights=choice("kind of weights", BITS),
            activations=optional(choice("kind of activations", BITS)),
            group_size=count(2, 2**16),
            smooth=optional(number(0, 1)),
            rank=count(0, 2**16),
            modulation=choice("kind of modulation", ("bfloat16", "int8")),
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "smooth", "down", "up", "offsets"],
    meta_fields=["kernel_shape", "parts", "weights", "activations", "how"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel in fewer bits, at the kernel's place in a tree of parameters.

    All arrays have a leading axis of blocks where the kernel is of a scanned stack.

    Attributes:
        codes: of the kernel's shape; of int4 and nf4 uint8 `[rows / 2, out]`, the rows 2i and 2i + 1 in the
            lower and upper half of a byte, rows being the window and inputs in one, padded to whole groups.
        scales: `[parts, out]`; of int4 and nf4 `[groups, out]`.
        smooth: `[in]`, 1 / l, or None.
        down, up: A and B, `[*window, in, r]` and `[r, out]`, or None.
        kernel_shape: of one block.
        parts: inputs that have scales of their own, one after the other.
        weights, activations: as of `Quantization`, of this kernel; weights may be "nf4", of others' files.
        how: what the whole network is quantised with.
        offsets: of the scales' shape, what is added to codes times scales (files of others have such), or
            None.
    """

    codes: Any
    scales: Any
    smooth: Any
    down: Any
    up: Any
    kernel_shape: tuple[int, ...]
    parts: tuple[int, ...]
    weights: str
    activations: str | None
    how: Quantization
    offsets: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that this stands for."""
        return (*self.scales.shape[:-2], *self.kernel_shape)

    @property
    def ndim(self) -> int:
        """Its axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the codes."""
        return self.codes.dtype

    @property
    def arrays(self) -> dict[str, Any]:
        """Its arrays by name, without those that are None."""
        names = ("codes", "scales", "smooth", "down", "up", "offsets")
        fields = {name: getattr(self, name) for name in names}
        return {name: value for name, value in fields.items() if value is not None}


# ---------------------------------------------------------------- packing


def to_codes(x: Float[Array, "..."], kind: str) -> Array:
    """Numbers in units of their scale -> the nearest codes."""
    largest = LARGEST[kind]
    x = jnp.clip(x, -largest, largest)
    return x.astype(jnp.float8_e4m3fn) if kind == "fp8" else jnp.round(x).astype(jnp.int8)


def scales_of(x: Float[Array, "..."], kind: str, axes: Any) -> Float[Array, "..."]:
    """The scales that make the largest number along the axes the largest code; these axes stay, of size 1."""
    peak = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    return jnp.where(peak > 0, peak / LARGEST[kind], 1.0)


def pack_int4(codes: Int8[Array, "rows out"]) -> UInt8[Array, "half out"]:
    """Whole numbers from -8 to 7, two rows in one: the row 2i in the lower half of a byte, 2i + 1 above."""
    pairs = jax.lax.bitcast_convert_type(codes, jnp.uint8).reshape(-1, 2, codes.shape[-1])
    return (pairs[:, 0] & jnp.uint8(15)) | (pairs[:, 1] << jnp.uint8(4))


def unpack_int4(packed: UInt8[Array, "half out"]) -> Int8[Array, "rows out"]:
    """The inverse of `pack_int4`."""
    pairs = jnp.stack([packed << jnp.uint8(4), packed], axis=1)
    signed = jax.lax.bitcast_convert_type(pairs, jnp.int8) >> jnp.int8(4)  # the sign comes along
    return signed.reshape(-1, packed.shape[-1])


def unpack_nf4(packed: UInt8[Array, "half out"]) -> Float[Array, "rows out"]:
    """The numbers of `NF4` that codes from 0 to 15 stand for, packed as those of `pack_int4`."""
    pairs = jnp.stack([packed & jnp.uint8(15), packed >> jnp.uint8(4)], axis=1)
    return jnp.asarray(NF4, jnp.float32)[pairs.reshape(-1, packed.shape[-1])]


def group_rows(rows: int, group_size: int) -> int:
    """Rows of a group, an even number: `group_size`, or all where there are fewer."""
    size = min(group_size, rows)
    return size + size % 2


def _groups(matrix: Float[Array, "rows out"], size: int) -> Float[Array, "groups size out"]:
    rows = matrix.shape[0]
    return jnp.pad(matrix, ((0, -rows % size), (0, 0))).reshape(-1, size, matrix.shape[-1])


def _int4(matrix: Float[Array, "rows out"], group_size: int) -> tuple[Array, Array]:
    """(codes, scales) with each group's scale the best of a few smaller ones, in squared error."""
    groups = _groups(matrix, group_rows(matrix.shape[0], group_size))
    widest = scales_of(groups, "int4", 1)

    def rounded(share: float) -> tuple[Array, Array, Array]:
        # The smallest normal number of 16 bits, so that no scale is zero.
        scales = jnp.maximum((widest * share).astype(KEPT_DTYPE), jnp.finfo(KEPT_DTYPE).tiny)
        wide = scales.astype(jnp.float32)
        codes = to_codes(groups / wide, "int4")
        error = jnp.sum((codes.astype(jnp.float32) * wide - groups) ** 2, axis=1, keepdims=True)
        return error, codes, scales

    best = rounded(_SHRUNK[0])
    for share in _SHRUNK[1:]:
        new = rounded(share)
        better = new[0] < best[0]
        best = tuple(jnp.where(better, mine, old) for mine, old in zip(new, best, strict=True))
    _, codes, scales = best
    return pack_int4(codes.reshape(-1, matrix.shape[-1])), scales[:, 0]


def low_rank(matrix: Float[Array, "rows out"], rank: int) -> tuple[Array, Array]:
    """A `[rows, r]` and B `[r, out]` with the least |matrix - A B| of that rank, in the Frobenius norm."""
    left, sizes, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(sizes[:rank])
    return left[:, :rank] * root[None], root[:, None] * right[:rank]


def smoothing(kernel: Float[Array, "*window in out"], input_max: Float[Array, " in"], alpha: float) -> Array:
    """SmoothQuant's l `[in]`: max |x_j|^alpha / max |W_j|^(1 - alpha), 1 where either is zero."""
    axes = (*range(kernel.ndim - 2), kernel.ndim - 1)
    of_kernel = jnp.max(jnp.abs(kernel), axis=axes)
    found = (input_max > 0) & (of_kernel > 0)
    given, own = (jnp.where(found, value, 1.0) for value in (input_max.astype(jnp.float32), of_kernel))
    return given**alpha / own ** (1 - alpha)


def quantize_kernel(
    kernel: Float[Array, "*window in out"],
    how: Quantization,
    input_max: Float[Array, " in"] | None = None,
    parts: tuple[int, ...] = (),
    weights_only: bool = False,
) -> Quantized:
    """A kernel in fewer bits. See `Quantized`.

    Args:
        kernel: `[in, out]`, or `[h, w, in, out]` of a convolution.
        how: the settings.
        input_max: the largest absolute input of each channel; None: without smoothing.
        parts: input channels that get scales of their own; all in one by default.
        weights_only: int8 per channel, the activations, smoothing and branch left out: of modulations.
    """
    kernel = jnp.asarray(kernel, jnp.float32)
    inputs, out = kernel.shape[-2:]
    smooth = down = up = None
    weights, activations = ("int8", None) if weights_only else (how.weights, how.activations)
    if how.smooth is not None and input_max is not None and not weights_only:
        scaled_by = smoothing(kernel, input_max, how.smooth)
        smooth = 1 / scaled_by
        kernel = kernel * _of_rows(scaled_by, kernel.ndim)
    rank = min(how.rank, inputs * math.prod(kernel.shape[:-2]), out)
    if rank and not weights_only:
        first, second = low_rank(kernel.reshape(-1, out), rank)
        first = first.reshape(*kernel.shape[:-1], rank)
        down = first if smooth is None else first * _of_rows(smooth, first.ndim)
        down, up = down.astype(KEPT_DTYPE), second.astype(KEPT_DTYPE)
        # What 16 bits round away of the branch is in the rest, too.
        own = jnp.matmul(down.astype(jnp.float32), up.astype(jnp.float32))
        kernel = kernel - (own if smooth is None else own / _of_rows(smooth, own.ndim))
    if weights == "int4":
        codes, scales = _int4(kernel.reshape(-1, out), how.group_size)
        shape = (*kernel.shape[:-2], inputs, out)
        return Quantized(
            codes, scales, smooth, down, up, shape, parts or (inputs,), weights, activations, how
        )
    codes, scales = [], []
    for first, last in _spans(parts or (inputs,)):
        part = kernel[..., first:last, :]
        scale = scales_of(part, weights, tuple(range(kernel.ndim - 1)))
        codes.append(to_codes(part / scale, weights))
        scales.append(scale.reshape(out))
    joined = jnp.concatenate(codes, axis=-2)
    scales = jnp.stack(scales)
    shape = tuple(kernel.shape)
    return Quantized(joined, scales, smooth, down, up, shape, parts or (inputs,), weights, activations, how)


def dequantize_kernel(kernel: Quantized, branch: bool = True) -> Float[Array, "*window in out"]:
    """The float32 kernel that a quantised one stands for.

    Args:
        kernel: of one block.
        branch: with the low-rank branch and without smoothing; False: only what the codes say.
    """
    if kernel.weights in PACKED:
        unpack = unpack_nf4 if kernel.weights == "nf4" else unpack_int4
        codes = unpack(kernel.codes).astype(jnp.float32)
        groups = codes.reshape(kernel.scales.shape[0], -1, codes.shape[-1])
        groups = groups * kernel.scales.astype(jnp.float32)[:, None]
        groups = groups if kernel.offsets is None else groups + kernel.offsets[:, None]
        matrix = groups.reshape(-1, codes.shape[-1])
        whole = matrix[: math.prod(kernel.kernel_shape[:-1])].reshape(kernel.kernel_shape)
    else:
        whole = kernel.codes.astype(jnp.float32)
        whole = whole * _of_parts(kernel.scales, kernel.parts, whole.ndim)
        if kernel.offsets is not None:
            whole = whole + _of_parts(kernel.offsets, kernel.parts, whole.ndim)
    if not branch:
        return whole
    if kernel.smooth is not None:
        whole = whole * _of_rows(kernel.smooth, whole.ndim)
    if kernel.down is not None:
        whole = whole + jnp.matmul(kernel.down.astype(jnp.float32), kernel.up.astype(jnp.float32))
    return whole


def _of_parts(
    numbers: Float[Array, "parts out"], parts: tuple[int, ...], rank: int
) -> Float[Array, "... in out"]:
    """A number of each part of the inputs and each output, to compute with a kernel of that rank."""
    spread = jnp.repeat(numbers, jnp.asarray(parts), axis=0, total_repeat_length=sum(parts))
    return spread.reshape((1,) * (rank - 2) + spread.shape)


def _of_rows(vector: Float[Array, " in"], rank: int) -> Float[Array, "... in one"]:
    """A number of each input, to multiply a kernel of that rank with."""
    return vector.reshape((1,) * (rank - 2) + (-1, 1))


def _spans(parts: tuple[int, ...]) -> list[tuple[int, int]]:
    ends = [sum(parts[: n + 1]) for n in range(len(parts))]
    return [(end - part, end) for part, end in zip(parts, ends, strict=True)]


def with_factors(kernel: Quantized, down: Array, up: Array) -> Quantized:
    """A quantised kernel plus down @ up, `[*window, in, r]` and `[r, out]`: a LoRA, next to the branch.

    Both may have the leading axis of a stack. A window of up, all ones, is dropped.
    """
    up = up.reshape(*up.shape[: len(kernel.scales.shape) - 2], *up.shape[-2:])
    if kernel.down is not None:
        wide = down.dtype if kernel.down.dtype == down.dtype else jnp.float32
        down = jnp.concatenate([kernel.down.astype(wide), down.astype(wide)], axis=-1)
        up = jnp.concatenate([kernel.up.astype(wide), up.astype(wide)], axis=-2)
    return dataclasses.replace(kernel, down=down, up=up)


# ---------------------------------------------------------------- applying


@jax.custom_jvp
def _without_gradient(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, of which no derivative is taken: that of its codes is 0 nearly everywhere, and no one means it."""
    return x


@_without_gradient.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    raise InvalidArgumentError(
        "a network with quantised activations has no gradient: quantise its weights alone, "
        "models.quantization('int8', activations=None), or give the network that it was made of"
    )


def apply_quantized(
    x: Float[Array, "... in"],
    kernel: Quantized,
    contract: Callable[[Array, Array], Array],
    dtype: Any,
    pointwise: bool = True,
) -> Float[Array, "... out"]:
    """What a layer computes with a quantised kernel, in float32.

    Args:
        x: `[..., in]`.
        kernel: of one block.
        contract: the layer's map of (x, array kernel), linear in both; also of two arrays of codes, exactly
            (or in float32's rounding).
        dtype: in which operands that are no codes are multiplied.
        pointwise: each output depends on one token alone; else the scale of x is that of its image.

    Raises:
        InvalidArgumentError: under a gradient with respect to x, where activations are quantised.
    """
    wide = x.astype(jnp.float32)
    wide = wide if kernel.activations is None else _without_gradient(wide)
    scaled = wide if kernel.smooth is None else wide * _to_rank(kernel.smooth, wide.ndim)
    axes = (-1,) if pointwise else tuple(range(1, x.ndim))
    if kernel.weights in PACKED or len(kernel.parts) > MOST_PARTS or kernel.offsets is not None:
        weights = dequantize_kernel(kernel, branch=False)
        y = contract(_rounded(scaled, kernel, axes).astype(dtype), weights.astype(dtype))
    else:
        y = _sum_of_parts(scaled, kernel, contract, dtype, axes)
    if kernel.down is None:
        return y
    inner = contract(wide.astype(dtype), kernel.down.astype(dtype))
    return y + jnp.matmul(inner.astype(dtype), kernel.up.astype(dtype), preferred_element_type=jnp.float32)


def _sum_of_parts(
    x: Float[Array, "... in"],
    kernel: Quantized,
    contract: Callable[[Array, Array], Array],
    dtype: Any,
    axes: tuple[int, ...],
) -> Float[Array, "... out"]:
    """The products of codes, each part of the inputs with its own scales."""
    total: Any = None
    for place, (first, last) in enumerate(_spans(kernel.parts)):
        part, codes = x[..., first:last], kernel.codes[..., first:last, :]
        if kernel.activations == kernel.weights:
            scale = scales_of(part, kernel.weights, axes)
            y = contract(to_codes(part / scale, kernel.weights), codes) * scale
        else:
            part = part if kernel.activations is None else fake_quantize(part, kernel.activations, axes)
            y = contract(part.astype(dtype), codes.astype(dtype))
        y = y * _to_rank(kernel.scales[place], y.ndim)
        total = y if total is None else total + y
    return total


def _rounded(x: Float[Array, "... in"], kernel: Quantized, axes: tuple[int, ...]) -> Float[Array, "... in"]:
    """The activations of a kernel in groups as their codes say: int4 by groups, others by parts."""
    if kernel.activations is None:
        return x
    if kernel.activations == "int4":
        size = group_rows(x.shape[-1], kernel.how.group_size)
        padded = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % size)))
        groups = fake_quantize(padded.reshape(*x.shape[:-1], -1, size), "int4", (-1,))
        return groups.reshape(padded.shape)[..., : x.shape[-1]]
    parts = [
        fake_quantize(x[..., first:last], kernel.activations, axes) for first, last in _spans(kernel.parts)
    ]
    return jnp.concatenate(parts, axis=-1)


def fake_quantize(x: Float[Array, "..."], kind: str, axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The numbers that the codes of x stand for, with a scale for each entry of the other axes."""
    scale = scales_of(x, kind, axes)
    return to_codes(x / scale, kind).astype(jnp.float32) * scale


def _to_rank(vector: Float[Array, " n"], rank: int) -> Float[Array, "... n"]:
    return vector.reshape((1,) * (rank - 1) + (-1,))


def operands(x: Array, kernel: Array, exact: Any) -> tuple[Array, Array]:
    """Codes as numbers that multiply exactly, for a processor or layer without products of few bits.

    8-bit codes are exact in float32 and in bfloat16, and so are their products in float32.
    """
    narrow = {jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)}
    if x.dtype in narrow and kernel.dtype in narrow:
        return x.astype(exact), kernel.astype(exact)
    return x, kernel


def observe_input(module: Any, x: Float[Array, "... in"]) -> None:
    """Keeps the largest absolute value of each channel, in the collection "calibration" if it is mutable."""
    if module.is_mutable_collection("calibration"):
        peak = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1)))
        module.sow("calibration", "input_max", peak, reduce_fn=jnp.maximum, init_fn=lambda: 0.0)
