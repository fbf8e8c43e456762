"""Two-dimensional convolutions, channels last."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.arguments import array, check_dims, checked
from jaxldm.nn.initialization import Initializer, fan_in_uniform, parameter
from jaxldm.nn.linear import compute_dtype, flat_matmul, product_dtype, quantized_matmul
from jaxldm.nn.quantized import Quantized, apply_quantized, observe_input, operands

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class Conv2d(nn.Module):
    """Convolution with a square kernel. x `[B, H, W, C]` -> `[B, H', W', features]`, computed in `dtype`.

    H' = floor((H + padding before + after - kernel_size) / stride) + 1. A kernel of size 1 is a plain matrix
    product. Parameters are float32 and start as PyTorch's.

    Attributes:
        padding: one number for all four sides, or (before, after) for both axes.
        doubled: the convolution of the image doubled by nearest neighbour, see `conv_of_doubled`; for 3x3,
            stride 1 and padding 1 only.
        groups: each group of output channels depends on its group of input channels alone; as many groups as
            channels are a depthwise convolution, computed as `shifted_products` on a CPU.
        kernel_init, bias_init: initializers; None is PyTorch's.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | tuple[int, int] = 1
    dtype: str = "float32"
    doubled: bool = False
    groups: int = 1
    use_bias: bool = True
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        dtype = compute_dtype(self.dtype)
        size, channels = self.kernel_size, x.shape[-1] // self.groups
        default = fan_in_uniform(size * size * channels)
        shape = (size, size, channels, self.features)
        wide = product_dtype(dtype)
        kernel = parameter(self, "kernel", self.kernel_init or default, shape)
        observe_input(self, x)
        if isinstance(kernel, Quantized):
            y = self._quantized(x.astype(dtype), kernel, wide)
            return self._with_bias(y, default).astype(dtype)
        x, kernel = (value.astype(dtype).astype(wide) for value in (x, kernel))
        if self.doubled:
            assert (size, self.stride, self.padding, self.groups) == (3, 1, 1, 1)
            y = conv_of_doubled(x, kernel)
        elif (size, self.stride, self.padding, self.groups) == (1, 1, 0, 1):
            y = x @ kernel[0, 0]
        elif self._is_depthwise(x) and jax.default_backend() == "cpu":
            y = shifted_products(x, kernel, self._sides())
        else:
            sides = self._sides()
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                (sides, sides),
                dimension_numbers=DIMENSIONS,
                feature_group_count=self.groups,
            )
        return self._with_bias(y, default).astype(dtype)

    def _with_bias(self, y: Float[Array, "B h w out"], default: Initializer) -> Float[Array, "B h w out"]:
        if not self.use_bias:
            return y
        bias = parameter(self, "bias", self.bias_init or default, (self.features,))
        return y + bias.astype(y.dtype).reshape(1, 1, 1, -1)

    def _quantized(
        self, x: Float[Array, "B H W C"], kernel: Quantized, dtype: jnp.dtype
    ) -> Float[Array, "B h w out"]:
        """The convolution with a kernel in fewer bits, of the image as it is or doubled; float32."""
        if (self.kernel_size, self.stride, self.padding) == (1, 1, 0):
            return quantized_matmul(x, dataclasses.replace(kernel, **_without_window(kernel)), dtype)
        if self.doubled:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        strides, sides = (self.stride, self.stride), self._sides()
        exact = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

        def contract(x: Array, kernel: Array) -> Array:
            x, kernel = operands(x, kernel, exact)
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                strides,
                (sides, sides),
                dimension_numbers=DIMENSIONS,
                preferred_element_type=jnp.float32,
            )

        return apply_quantized(x, kernel, contract, dtype, pointwise=False)

    def _is_depthwise(self, x: Array) -> bool:
        return self.groups == x.shape[-1] == self.features and self.stride == 1

    def _sides(self) -> tuple[int, int]:
        return (self.padding, self.padding) if isinstance(self.padding, int) else self.padding


def _without_window(kernel: Quantized) -> dict[str, Any]:
    """The changes that make a quantised kernel of one pixel `[1, 1, in, out]` a matrix."""
    changes: dict[str, Any] = {"kernel_shape": kernel.kernel_shape[2:]}
    if kernel.weights != "int4":
        changes["codes"] = kernel.codes[0, 0]
    if kernel.down is not None:
        changes["down"] = kernel.down[0, 0]
    return changes


def shifted_products(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k 1 C"], sides: tuple[int, int]
) -> Float[Array, "B h w C"]:
    """A depthwise convolution of stride 1 as a sum of the shifted image times each tap, in float32.

    XLA's CPU backend makes one loop of it, twenty times faster than its own grouped convolution (24x24
    pixels, 1536 channels, one core: 1.3 ms, not 27.6), with gradients four to thirteen times. `sides`:
    padding before and after both axes.
    """
    size = kernel.shape[0]
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), sides, sides, (0, 0)))
    height, width = (length - size + 1 for length in padded.shape[1:3])
    taps = kernel.astype(jnp.float32)
    y = sum(
        padded[:, row : row + height, column : column + width] * taps[row, column][None, None]
        for row in range(size)
        for column in range(size)
    )
    return cast(Array, y).astype(x.dtype)


def doubling_convolution(
    x: Float[Array, "B H W C"], kernels: Sequence[Sequence[Float[Array, "2 2 C out"]]]
) -> Float[Array, "B 2*H 2*W out"]:
    """Four 2x2 convolutions, interleaved to an image of twice the size.

    The output pixel (2i + a, 2j + b) depends on the input rows i - 1 + a and i + a and the columns j - 1 + b
    and j + b, through `kernels[a][b]`.

    Every convolution that doubles an image has this form, without multiplications by zeros or by copies of
    a pixel. On XLA's CPU backend it takes half the time of one 3x3 convolution to
    four times the channels, and a tenth of the weight gradient of a dilated convolution.
    """
    batch, height, width, _ = x.shape
    rows = []
    for a in (0, 1):
        columns = [
            jax.lax.conv_general_dilated(
                x, kernels[a][b], (1, 1), ((1 - a, a), (1 - b, b)), dimension_numbers=DIMENSIONS
            )
            for b in (0, 1)
        ]
        rows.append(jnp.stack(columns, axis=3))
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernels[0][0].shape[-1])


@checked(x=array("floating", "[B, H, W, C]", axes=4), weight=array("floating", "[C, out, 4, 4]", axes=4))
def conv_transpose_4x4_stride_2(
    x: Float[Array, "B H W C"], weight: Float[Array, "C out 4 4"]
) -> Float[Array, "B 2*H 2*W out"]:
    """Transposed convolution with a 4x4 kernel, stride 2, padding 1, weight in PyTorch's layout.

    Along one axis y[2i + a] = sum over d of x[i + d] w[a + 1 - 2d]: the pixel i + d reaches the output 2i + a
    through that tap, if it exists, which leaves d = a - 1 and d = a. So the flipped taps, taken two by two,
    are the kernels of a `doubling_convolution`. It is `torch.nn.ConvTranspose2d(C, out, 4, 2, 1)`.
    """
    check_dims(x=(x, "B H W C"), weight=(weight, "C out 4 4"))
    channels, features = weight.shape[:2]
    taps = weight[:, :, ::-1, ::-1].reshape(channels, features, 2, 2, 2, 2)  # [C, out, row, a, column, b]
    return doubling_convolution(x, [list(row) for row in taps.transpose(3, 5, 2, 4, 0, 1)])


@checked(x=array("floating", "[B, H, W, C]", axes=4), kernel=array("floating", "[3, 3, C, out]", axes=4))
def conv_of_doubled(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C out"]
) -> Float[Array, "B 2*H 2*W out"]:
    """A 3x3 convolution, padding 1, of `x` doubled by nearest neighbour; on a CPU without the doubled image.

    Two of the three taps of each axis fall on copies of one pixel and add up: w0, w1 + w2 for even outputs,
    w0 + w1, w2 for odd ones. Four ninths of the multiplications. On accelerators the sums would be computed
    from the weights again in every denoising step, and 16 bits would round them: there the image is doubled.
    """
    check_dims(x=(x, "B H W C"), kernel=(kernel, "3 3 C out"))
    if jax.default_backend() != "cpu":
        doubled = x.repeat(2, axis=1).repeat(2, axis=2)
        y = jax.lax.conv_general_dilated(doubled, kernel, (1, 1), ((1, 1),) * 2, dimension_numbers=DIMENSIONS)
        return cast(Array, y)

    def pair(kernel: Array, axis: int, odd: int) -> Array:
        first, middle, last = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first + middle, last] if odd else [first, middle + last], axis)

    # Sums that do not wait for x would all be computed first, and be in memory together.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return doubling_convolution(x, [[pair(pair(kernel, 0, a), 1, b) for b in (0, 1)] for a in (0, 1)])


class ConvTranspose4x4(nn.Module):
    """`torch.nn.ConvTranspose2d(C, features, 4, stride=2, padding=1)`. `[B, H, W, C]` -> `[B, 2H, 2W, out]`.

    The parameter `weight` keeps the published layout `[C, features, 4, 4]`. Starts as PyTorch's does
    (fan-in counted over the OUTPUT channels, as PyTorch does for a transposed kernel).
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W out"]:
        dtype = compute_dtype(self.dtype)
        default = fan_in_uniform(16 * self.features)
        weight = parameter(self, "weight", default, (x.shape[-1], self.features, 4, 4))
        bias = parameter(self, "bias", default, (self.features,))
        wide = product_dtype(dtype)
        y = conv_transpose_4x4_stride_2(*(value.astype(dtype).astype(wide) for value in (x, weight)))
        return (y + bias.astype(wide).reshape(1, 1, 1, -1)).astype(dtype)


class ConvTranspose2x2(nn.Module):
    """`torch.nn.ConvTranspose2d(C, features, 2, stride=2, bias=use_bias)`: `[B, H, W, C]` to twice the size.

    No two pixels reach the same output, so it is one matrix product and a transposition. The parameter
    `weight` keeps the published layout `[C, features, 2, 2]` and starts as PyTorch's does.
    """

    features: int
    dtype: str = "float32"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W out"]:
        dtype, out = compute_dtype(self.dtype), self.features
        batch, height, width, channels = x.shape
        init = fan_in_uniform(4 * out)
        wide = product_dtype(dtype)
        weight = parameter(self, "weight", init, (channels, out, 2, 2)).astype(dtype).astype(wide)
        # The weight as it is: transposing it would cost as much again in every denoising step.
        y = flat_matmul(x.astype(dtype).astype(wide), weight.reshape(channels, out * 4))
        y = y.reshape(batch, height, width, out, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        y = y.reshape(batch, 2 * height, 2 * width, out)
        if self.use_bias:
            y = y + parameter(self, "bias", init, (out,)).astype(wide).reshape(1, 1, 1, -1)
        return y.astype(dtype)
