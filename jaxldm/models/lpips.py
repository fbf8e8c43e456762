"""LPIPS: the perceptual distance of two images, by the features of VGG16 or AlexNet.

Zhang et al. 2018, version 0.1: differences of unit feature vectors of five layers, weighted by channel with
numbers that were fitted to people's judgements. Those heads come with the package (`lpips_heads.npz`, from
lpips 0.1.4, BSD-2: `lpips_heads.LICENSE`), the networks' weights from torchvision's files.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm.arguments import checked, choice
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.initialization import ones, parameter

# The layers of torchvision's `features`: (number, channels, kernel, stride, padding), "pool" for a maximum
# of stride 2 over `_POOLS` pixels a side, and "out" behind each layer that LPIPS takes.
_VGG: tuple[Any, ...] = (
    (0, 64, 3, 1, 1), (2, 64, 3, 1, 1), "out", "pool", (5, 128, 3, 1, 1), (7, 128, 3, 1, 1), "out", "pool",
    (10, 256, 3, 1, 1), (12, 256, 3, 1, 1), (14, 256, 3, 1, 1), "out", "pool",
    (17, 512, 3, 1, 1), (19, 512, 3, 1, 1), (21, 512, 3, 1, 1), "out", "pool",
    (24, 512, 3, 1, 1), (26, 512, 3, 1, 1), (28, 512, 3, 1, 1), "out",
)  # fmt: skip
_ALEX: tuple[Any, ...] = (
    (0, 64, 11, 4, 2), "out", "pool", (3, 192, 5, 1, 2), "out", "pool",
    (6, 384, 3, 1, 1), "out", (8, 256, 3, 1, 1), "out", (10, 256, 3, 1, 1), "out",
)  # fmt: skip
BACKBONES = {"vgg": _VGG, "alex": _ALEX}
_POOLS = {"vgg": 2, "alex": 3}
_SMALLEST = {"vgg": 16, "alex": 31}  # side below which a layer has no pixel
# The published scaling: from [-1, 1] to ImageNet's mean and standard deviation.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class _Head(nn.Module):
    """The weights of one layer's channels, in the published layout [1, C, 1, 1]."""

    channels: int

    @nn.compact
    def __call__(self) -> Float[Array, "1 C 1 1"]:
        return parameter(self, "weight", ones, (1, self.channels, 1, 1))


class _HeadInDropout(nn.Module):
    """`lin0.model.1`, whose `model.0` is the dropout of its training."""

    channels: int

    @nn.compact
    def __call__(self) -> Float[Array, "1 C 1 1"]:
        return _Head(self.channels, name="model_1")()


class LPIPS(nn.Module):
    """The distance of images `[B, H, W, 3]` in [-1, 1], pair by pair: `[B]`, 0 for equal ones.

    Attributes:
        net: "vgg" or "alex": two metrics, whose numbers cannot be compared. Papers have mostly "vgg" for
            reconstructions and "alex" for the diversity of samples.

    Raises:
        UnknownNameError: another network.
        InvalidArgumentError: images of two shapes, not RGB, or too small.
    """

    net: str = "vgg"

    def setup(self):
        one_of("LPIPS network", self.net, BACKBONES)
        layers = [layer for layer in BACKBONES[self.net] if isinstance(layer, tuple)]
        for number, channels, kernel, stride, padding in layers:
            setattr(self, f"features_{number}", Conv2d(channels, kernel, stride, padding))
        for index, channels in enumerate(self.head_widths()):
            setattr(self, f"lin{index}", _HeadInDropout(channels))

    def head_widths(self) -> list[int]:
        """The channels of each of the five layers."""
        plan = BACKBONES[self.net]
        return [plan[place - 1][1] for place, layer in enumerate(plan) if layer == "out"]

    def features(self, x: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
        """The outputs of the five layers, behind their ReLU."""
        shift, scale = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE))
        x, outputs = (x.astype(jnp.float32) - shift) / scale, []
        for layer in BACKBONES[self.net]:
            if layer == "out":
                outputs.append(x)
            elif layer == "pool":
                side = _POOLS[self.net]
                x = nn.max_pool(x, (side, side), strides=(2, 2))
            else:
                x = nn.relu(getattr(self, f"features_{layer[0]}")(x))
        return outputs

    def __call__(self, x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]) -> Float[Array, " B"]:
        if x.shape != y.shape or x.shape[-1] != 3:
            raise InvalidArgumentError(
                f"LPIPS takes two batches [B, H, W, 3] of one shape, got {x.shape}, {y.shape}"
            )
        if min(x.shape[1:3]) < _SMALLEST[self.net]:
            raise InvalidArgumentError(
                f"LPIPS with {self.net} needs images of at least {_SMALLEST[self.net]} pixels a side, got "
                f"{x.shape[1]}x{x.shape[2]}"
            )
        total = jnp.zeros(x.shape[0])
        for index, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            weights = getattr(self, f"lin{index}")()
            squares = (unit_pixels(a) - unit_pixels(b)) ** 2 * weights.reshape(1, 1, 1, -1)
            total = total + squares.sum(-1).mean((1, 2))
        return total

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes of the images that `init` traces the model with."""
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        return image, image


def unit_pixels(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Each pixel's vector divided by its length; the addend is the published one.

    The bound below the root changes no result; without it a vector of zeros has NaN as its gradient.
    """
    return x / (jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-30)) + 1e-10)


@checked(net=choice("LPIPS network", BACKBONES))
def lpips_heads(net: str) -> dict[str, Float[np.ndarray, "1 C 1 1"]]:
    """The published weights of the five layers, {"lin0.model.1.weight": [1, C, 1, 1]} ... (version 0.1)."""
    file = resources.files("jaxldm.models") / "lpips_heads.npz"
    with file.open("rb") as content, np.load(content, allow_pickle=False) as heads:
        return {f"lin{n}.model.1.weight": heads[f"{net}_{n}"] for n in range(5)}
