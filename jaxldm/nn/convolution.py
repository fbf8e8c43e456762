"""Two-dimensional convolutions, channels last."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.nn.initialization import fan_in_uniform, parameter
from jaxldm.nn.linear import compute_dtype

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class Conv2d(nn.Module):
    """Convolution with a square kernel. x `[B, H, W, C]` -> `[B, H', W', features]`, computed in `dtype`.

    H' = floor((H + padding before + after - kernel_size) / stride) + 1. `padding` is one number for all
    four sides or `(before, after)` for both axes. A kernel of size 1 is a plain matrix product. Parameters
    (float32) start as PyTorch's.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | tuple[int, int] = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        dtype = compute_dtype(self.dtype)
        size, channels = self.kernel_size, x.shape[-1]
        default = fan_in_uniform(size * size * channels)
        shape = (size, size, channels, self.features)
        kernel = parameter(self, "kernel", default, shape).astype(dtype)
        bias = parameter(self, "bias", default, (self.features,)).astype(dtype)
        x = x.astype(dtype)
        if size == 1 and self.stride == 1 and self.padding == 0:
            y = x @ kernel[0, 0]
        else:
            sides = (self.padding, self.padding) if isinstance(self.padding, int) else self.padding
            y = jax.lax.conv_general_dilated(
                x, kernel, (self.stride, self.stride), (sides, sides), dimension_numbers=DIMENSIONS
            )
        return y + bias.reshape(1, 1, 1, -1)


def depth_to_space(x: Float[Array, "B H W 4C"]) -> Float[Array, "B 2H 2W C"]:
    """Lays the four channel groups of each pixel out as a 2x2 square: channel (2 a + b) C + c -> pixel (2 i
    + a, 2 j + b).
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def conv_transpose_4x4_stride_2(
    x: Float[Array, "B H W C"], kernel: Float[Array, "C out 4 4"]
) -> Float[Array, "B 2H 2W out"]:
    """Transposed convolution, 4x4 kernel, stride 2, padding 1: y[2i + a] = sum over d of x[i + d] w[a + 1 -
    2 d] per axis.

    The input pixel i + d reaches the output pixel 2 i + a, a in {0, 1}, through tap a + 1 - 2 d of the
    kernel, so d = -1, 0 for a = 0 and d = 0, 1 for a = 1. All four output phases are therefore ONE ordinary
    3x3 convolution to four times the channels, followed by depth-to-space. It is the same linear map as
    `torch.nn.ConvTranspose2d(C, out, 4, 2, 1)` with the same kernel layout; XLA's CPU code for the weight
    gradient of a dilated convolution is ten times slower.
    """
    channels, features = kernel.shape[:2]
    # taps[d + 1, a]: which of the four taps; -1 (read as the appended zero) where that input pixel does not
    # reach.
    taps = jnp.array([[3, 4], [1, 2], [4, 0]])
    padded = jnp.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 1)))
    phases = padded[:, :, taps][..., taps]  # [C, out, 3, 2, 3, 2]
    dense = phases.transpose(2, 4, 0, 3, 5, 1).reshape(3, 3, channels, 4 * features)
    y = jax.lax.conv_general_dilated(x, dense, (1, 1), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)
    return depth_to_space(y)


class ConvTranspose4x4(nn.Module):
    """`torch.nn.ConvTranspose2d(C, features, kernel_size=4, stride=2, padding=1)`. x `[B, H, W, C]` -> `[B,
    2H, 2W, features]`.

    The parameter `weight` keeps the published layout `[C, features, 4, 4]`. Starts as PyTorch's does
    (fan-in counted over the OUTPUT channels, as PyTorch reads the axes of a transposed kernel).
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2H 2W out"]:
        dtype = compute_dtype(self.dtype)
        default = fan_in_uniform(16 * self.features)
        weight = parameter(self, "weight", default, (x.shape[-1], self.features, 4, 4))
        bias = parameter(self, "bias", default, (self.features,)).astype(dtype)
        return conv_transpose_4x4_stride_2(x.astype(dtype), weight.astype(dtype)) + bias.reshape(1, 1, 1, -1)
