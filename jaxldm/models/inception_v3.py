"""FID's InceptionV3: TensorFlow's network of 2015-12-05, which differs from torchvision's.

Szegedy et al. 2016, as in `classify_image_graph_def.pb`: 1008 outputs; average pools that do not count the
border, in every block but the last, which has a maximum there; batch normalisation with eps 1e-3; images
(x - 128) / 128. Names are those of pytorch-fid and torch-fidelity.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.convolution import DIMENSIONS
from jaxldm.nn.initialization import Initializer, ones, parameter, zeros
from jaxldm.nn.linear import flat_matmul

SIDE = 299
SPATIAL_CHANNELS = 7  # of sFID: the first of the 192


class InceptionFeatures(NamedTuple):
    """What metrics take from the network.

    Attributes:
        pool: `[B, 2048]`, the mean over the last block: FID, KID, precision and recall, MIND.
        spatial: `[B, 2023]`, 17 x 17 pixels of 7 channels of Mixed_6d.branch1x1: sFID (Nash et al. 2021).
        logits: `[B, 1008]` without the bias, as the Inception Score takes them.
    """

    pool: Float[Array, "B 2048"]
    spatial: Float[Array, "B 2023"]
    logits: Float[Array, "B K"]


def _he_size(shape: tuple[int, ...]) -> float:
    return float(np.sqrt(2 / np.prod(shape[:-1])))


class _Conv(nn.Module):
    """A convolution without bias and with a kernel of any two sides; `[B, H, W, C]`."""

    features: int
    kernel_size: tuple[int, int]
    stride: int
    padding: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", Initializer("normal", _he_size), shape)
        if self.kernel_size == (1, 1):
            return x @ kernel[0, 0]
        if self.padding == "VALID" and self.stride == 1:
            # XLA's CPU backend is four times as fast where the output is as large as the input. What is cut
            # off again is 3 % of the pixels.
            rows, columns = (side // 2 for side in self.kernel_size)
            padded = self._convolve(x, kernel, "SAME")
            return padded[:, rows : padded.shape[1] - rows, columns : padded.shape[2] - columns]
        return self._convolve(x, kernel, self.padding)

    def _convolve(self, x: Array, kernel: Array, padding: str) -> Array:
        strides = (self.stride, self.stride)
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


class _BatchNorm(nn.Module):
    """(x - running_mean) / sqrt(running_var + 1e-3) scale + bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        scale, bias, mean, variance = (
            parameter(self, name, start, (x.shape[-1],))
            for name, start in (
                ("scale", ones), ("bias", zeros), ("running_mean", zeros), ("running_var", ones),
            )
        )  # fmt: skip
        multiply = scale * jax.lax.rsqrt(variance + 1e-3)
        add = bias - mean * multiply
        return x * multiply[None, None, None] + add[None, None, None]


class BasicConv2d(nn.Module):
    """Convolution, batch normalisation, ReLU: `[B, H, W, C]` -> `[B, h, w, features]`."""

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        x = _Conv(self.features, self.kernel_size, self.stride, self.padding, name="conv")(x)
        return nn.relu(_BatchNorm(name="bn")(x))


def _row(x: Array, *layers: tuple[str, int, Any], stride: int = 1) -> Array:
    """(name, features, kernel) one after the other; the last with `stride`, and then without padding."""
    for number, (name, features, kernel) in enumerate(layers):
        kernel_size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        last = stride > 1 and number == len(layers) - 1
        options: dict[str, Any] = {"stride": stride, "padding": "VALID"} if last else {}
        x = BasicConv2d(features, kernel_size, name=name, **options)(x)
    return x


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """The mean of 3 x 3 pixels, stride 1, of only those inside the image. `[B, H, W, C]` both ways."""
    for axis in (1, 2):
        length = x.shape[axis]
        pads = [(0, 0)] * 4
        pads[axis] = (1, 1)
        padded = jnp.pad(x, pads)
        total = sum(jax.lax.slice_in_dim(padded, start, start + length, axis=axis) for start in range(3))
        shape = [1] * 4
        shape[axis] = length
        counts = np.convolve(np.ones(length, np.float32), np.ones(3, np.float32), "same").reshape(shape)
        x = total * jnp.asarray(1 / counts)
    return x


def halving_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """The maximum of 3 x 3 pixels, stride 2, without padding.

    Axis by axis as maxima of three slices: ten times as fast as the windowed reduction of XLA's CPU backend.
    """
    for axis in (1, 2):
        stop = (x.shape[axis] - 3) // 2 * 2 + 1
        first, *others = (jax.lax.slice_in_dim(x, k, k + stop, 2, axis) for k in range(3))
        x = functools.reduce(jnp.maximum, others, first)
    return x


class InceptionA(nn.Module):
    """Mixed_5b, 5c, 5d: 35 x 35 pixels."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        branches = [
            _row(x, ("branch1x1", 64, 1)),
            _row(x, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
            _row(x, ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
            _row(average_pool(x), ("branch_pool", self.pool_features, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nn.Module):
    """Mixed_6a: to 17 x 17 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        double = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
        branches = [
            _row(x, ("branch3x3", 384, 3), stride=2),
            _row(x, *double, stride=2),
            halving_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionC(nn.Module):
    """Mixed_6b to 6e: 17 x 17 pixels. Returns its output and that of its first branch."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W 768"], Array]:
        n, across, down = self.features, (1, 7), (7, 1)
        first = _row(x, ("branch1x1", 192, 1))
        single = (("branch7x7_1", n, 1), ("branch7x7_2", n, across), ("branch7x7_3", 192, down))
        double = (
            ("branch7x7dbl_1", n, 1),
            ("branch7x7dbl_2", n, down),
            ("branch7x7dbl_3", n, across),
            ("branch7x7dbl_4", n, down),
            ("branch7x7dbl_5", 192, across),
        )
        pooled = _row(average_pool(x), ("branch_pool", 192, 1))
        return jnp.concatenate([first, _row(x, *single), _row(x, *double), pooled], axis=-1), first


class InceptionD(nn.Module):
    """Mixed_7a: to 8 x 8 pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        sevens = (
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3),
        )
        branches = [
            _row(x, ("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3), stride=2),
            _row(x, *sevens, stride=2),
            halving_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionE(nn.Module):
    """Mixed_7b, and 7c with a maximum in place of the average: 8 x 8 pixels."""

    maximum: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W 2048"]:
        across, down = (1, 3), (3, 1)
        single = _row(x, ("branch3x3_1", 384, 1))
        double = _row(x, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.maximum else average_pool(x)
        branches = [
            _row(x, ("branch1x1", 320, 1)),
            _row(single, ("branch3x3_2a", 384, across)),
            _row(single, ("branch3x3_2b", 384, down)),
            _row(double, ("branch3x3dbl_3a", 384, across)),
            _row(double, ("branch3x3dbl_3b", 384, down)),
            _row(pooled, ("branch_pool", 192, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class _Classes(nn.Module):
    """The last layer, whose bias the Inception Score leaves out."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        kernel = parameter(self, "kernel", Initializer("normal", _he_size), (x.shape[-1], self.features))
        parameter(self, "bias", zeros, (self.features,))
        return flat_matmul(x, kernel)


class InceptionV3(nn.Module):
    """Images `[B, 299, 299, 3]`, (x - 128) / 128 of 8-bit pixels -> `InceptionFeatures`, float32.

    Raises:
        InvalidArgumentError: images of another size or number of channels.
    """

    num_classes: int = 1008

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> InceptionFeatures:
        if x.shape[1:] != (SIDE, SIDE, 3):
            raise InvalidArgumentError(f"images must be [B, {SIDE}, {SIDE}, 3], got {x.shape}: resize them")
        x = _row(x, ("Conv2d_1a_3x3", 32, 3), stride=2)
        x = BasicConv2d(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = halving_pool(_row(x, ("Conv2d_2b_3x3", 64, 3)))
        x = _row(x, ("Conv2d_3b_1x1", 80, 1))
        x = halving_pool(BasicConv2d(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = InceptionA(pool_features, name=name)(x)
        x = InceptionB(name="Mixed_6a")(x)
        firsts = {}
        for name, features in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x, firsts[name] = InceptionC(features, name=name)(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(False, name="Mixed_7b")(x)
        pool = InceptionE(True, name="Mixed_7c")(x).mean((1, 2))
        spatial = firsts["Mixed_6d"][..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        return InceptionFeatures(pool, spatial, _Classes(self.num_classes, name="fc")(pool))

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        return (jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32),)
