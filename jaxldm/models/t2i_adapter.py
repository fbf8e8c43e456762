"""T2I-Adapters of Stable Diffusion 1 and XL: `T2IAdapter` of diffusers (Mou et al. 2023, arXiv:2302.08453).

A small convolutional network that sees a picture and neither x nor the time: it is called once for all steps.
Its features are added to the levels of the U-Net.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import compute_dtype
from jaxldm.nn.pixel_shuffle import pixel_unshuffle

TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig(ModelConfig):
    """Config of `T2IAdapter`. Names and defaults are those of diffusers.

    Attributes:
        in_channels: of the picture; 1 for drawings of lines.
        channels: of the features, one for each level of the U-Net; the light adapter repeats the last.
        num_res_blocks: of each level.
        downscale_factor: pixels that a feature of the first level is wide.
        adapter_type: "full_adapter" halves at every level, "full_adapter_xl" at the third alone,
            "light_adapter" has a quarter of the channels inside.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"
    dtype: str = "float32"

    published: ClassVar = True

    def check_values(self) -> None:
        one_of("adapter_type", self.adapter_type, TYPES)
        check(len(self.channels) > 0, "channels is empty: an adapter has one number for each level")
        light = self.adapter_type == "light_adapter"
        check(not light or min(self.channels) >= 4, "channels of a light_adapter must be 4 or more")
        compute_dtype(self.dtype)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each feature."""
        if self.adapter_type == "light_adapter":
            return (*self.channels, self.channels[-1])
        return self.channels

    def halves(self, level: int) -> bool:
        """Whether a level is half as large as the one before."""
        return level == 2 if self.adapter_type == "full_adapter_xl" else level > 0

    def num_blocks(self) -> int:
        return len(self.widths) * self.num_res_blocks


class AdapterResnetBlock(nn.Module):
    """x + block2(relu(block1(x))). `[B, h, w, C]` -> the same."""

    kernel_size: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        channels, size = x.shape[-1], self.kernel_size
        h = nn.relu(Conv2d(channels, dtype=self.dtype, name="block1")(x))
        return x + Conv2d(channels, size, padding=size // 2, dtype=self.dtype, name="block2")(h)


class AdapterBlock(nn.Module):
    """A level: the means of 2x2 pixels where it halves, the change of channels, residual blocks."""

    out_channels: int
    num_res_blocks: int
    down: bool
    light: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        options = {"kernel_size": 1, "padding": 0, "dtype": self.dtype}
        inside = self.out_channels // 4 if self.light else self.out_channels
        if self.down:
            x = mean_2x2(x)
        if self.light or x.shape[-1] != inside:
            x = Conv2d(inside, **options, name="in_conv")(x)
        for i in range(self.num_res_blocks):
            x = AdapterResnetBlock(3 if self.light else 1, self.dtype, name=f"resnets_{i}")(x)
        return Conv2d(self.out_channels, **options, name="out_conv")(x) if self.light else x


def mean_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Every 2x2 square becomes its mean; of an odd side the last row is a mean of what there is."""
    height, width = x.shape[1:3]
    ones = jnp.ones((1, height, width, 1), jnp.float32)

    def sums(array: Array) -> Array:
        pads = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
        return jax.lax.reduce_window(array, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), pads)

    return (sums(x.astype(jnp.float32)) / sums(ones)).astype(x.dtype)


class Adapter(nn.Module):
    """What the published checkpoints have below "adapter"."""

    config: T2IAdapterConfig

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        config = self.config
        light = config.adapter_type == "light_adapter"
        x = pixel_unshuffle(image, config.downscale_factor)
        if not light:
            x = Conv2d(config.channels[0], dtype=config.dtype, name="conv_in")(x)
        features = []
        for level, width in enumerate(config.widths):
            options = (width, config.num_res_blocks, config.halves(level), light, config.dtype)
            x = AdapterBlock(*options, name=f"body_{level}")(x)
            features.append(x)
        return tuple(features)


class T2IAdapter(nn.Module):
    """Mou et al. 2023, section 3.3.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> adapter = models.build("sd15-t2i-adapter")
    >>> image = jnp.zeros((1, 512, 512, 3))
    >>> given = jax.eval_shape(adapter.apply, {"params": models.shapes(adapter)}, image)
    >>> [feature.shape[1:] for feature in given["down_intrablock_additional_residuals"]]
    [(64, 64, 320), (32, 32, 640), (16, 16, 1280), (8, 8, 1280)]
    """

    config: T2IAdapterConfig

    @nn.compact
    def __call__(self, control_image: Float[Array, "B H W C"]) -> dict[str, Any]:
        """What to add to the U-Net, by the name of its argument.

        Args:
            control_image: `[B, H, W, in_channels]` in [0, 1]; sides are multiples of `downscale_factor`.

        Raises:
            InvalidArgumentError: pictures of other channels or sides.
        """
        config, shape = self.config, control_image.shape
        if shape[-1] != config.in_channels:
            raise InvalidArgumentError(
                f"control_image has {shape[-1]} channels, this adapter takes {config.in_channels}"
            )
        if shape[1] % config.downscale_factor or shape[2] % config.downscale_factor:
            raise InvalidArgumentError(
                f"control_image is {shape[1]}x{shape[2]} pixels, this adapter takes multiples of "
                f"{config.downscale_factor}"
            )
        features = Adapter(config, name="adapter")(control_image)
        return {"down_intrablock_additional_residuals": features}

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of a picture to trace the network with."""
        config = self.config
        side = config.downscale_factor * 2 ** len(config.channels)
        return (jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32),)


PRESETS = {
    "sd15-t2i-adapter": T2IAdapterConfig(),
    "sd15-light-t2i-adapter": T2IAdapterConfig(
        channels=(320, 640, 1280), num_res_blocks=4, adapter_type="light_adapter"
    ),
    "sdxl-t2i-adapter": T2IAdapterConfig(downscale_factor=16, adapter_type="full_adapter_xl"),
}
