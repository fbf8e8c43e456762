"""PatchGAN: the discriminator that latent diffusion and VQ-GAN train their autoencoders against."""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.models.config import ModelConfig, check, height_width
from jaxldm.models.inputs import image_shape
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.initialization import normal, ones, parameter, zeros
from jaxldm.nn.linear import compute_dtype

_KERNEL, _SLOPE, _EPS = 4, 0.2, 1e-5
_NEW_KERNEL = normal(0.02)  # Isola et al. 2017, appendix 6.2


@dataclasses.dataclass(frozen=True)
class PatchDiscriminatorConfig(ModelConfig):
    """Config of `PatchDiscriminator`.

    Attributes:
        block_out_channels: of each convolution but the last, which has one. All but the last of these halve
            the image. (64, 128, 256, 512) is the published network, `n_layers=3`, `ndf=64`.
    """

    sample_size: int | tuple[int, int] = 256
    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (64, 128, 256, 512)
    dtype: str = "float32"

    def check_values(self) -> None:
        check(len(self.block_out_channels) >= 2, "block_out_channels must be at least two numbers")
        for side in height_width(self.sample_size):
            patches = self.patches(side)
            check(
                patches >= 1,
                f"a side of {side} pixels is too small for {len(self.block_out_channels)} "
                "block_out_channels: give fewer",
            )
        compute_dtype(self.dtype)

    def patches(self, side: int) -> int:
        """How many logits a side of so many pixels has."""
        for _ in self.block_out_channels[:-1]:
            side //= 2
        return side - 2


class BatchNorm(nn.Module):
    """Batch normalisation by the moments of this batch, in float32. `[B, H, W, C]` -> the same shape.

    Ioffe and Szegedy 2015, algorithm 1. The moments are those of the whole batch also where it is split over
    devices. There are no running moments: nobody looks at a discriminator outside of its training.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        scale = parameter(self, "scale", ones, (x.shape[-1],))
        bias = parameter(self, "bias", zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean = wide.mean((0, 1, 2), keepdims=True)
        variance = jnp.square(wide - mean).mean((0, 1, 2), keepdims=True)
        unit = (wide - mean) * jax.lax.rsqrt(variance + _EPS)
        return (unit * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)).astype(x.dtype)


class PatchDiscriminator(nn.Module):
    """Images `[B, H, W, in_channels]` in [-1, 1] -> a logit for each patch `[B, h, w, 1]`, large for real.

    4x4 convolutions with leaky ReLU of slope 0.2, batch normalisation between (not behind the first and the
    last). Names are those of `NLayerDiscriminator` of taming-transformers, which latent diffusion uses; a
    published file also has running moments (`running_mean`, `running_var`, `num_batches_tracked`), which
    training never reads. Isola et al. 2017, section 3.2.2; Esser et al. 2021, section 3.1.
    """

    config: PatchDiscriminatorConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w 1"]:
        config, place = self.config, 0
        chex.assert_shape(x, (None, None, None, config.in_channels))
        *halving, last = config.block_out_channels
        for number, channels in enumerate((*halving, last)):
            stride = 2 if number < len(halving) else 1
            x = _conv(channels, stride, number == 0, config.dtype, place)(x)
            if number:
                place += 1
                x = BatchNorm(name=f"main_{place}")(x)
            x, place = nn.leaky_relu(x, _SLOPE), place + 2
        return _conv(1, 1, True, config.dtype, place)(x).astype(jnp.float32)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        return image_shape(self.config)


def _conv(channels: int, stride: int, use_bias: bool, dtype: str, place: int) -> Conv2d:
    return Conv2d(
        channels,
        kernel_size=_KERNEL,
        stride=stride,
        dtype=dtype,
        use_bias=use_bias,
        kernel_init=_NEW_KERNEL,
        name=f"main_{place}",
    )


PRESETS = {
    # The published one, and one for pictures of 28 to 64 pixels.
    "patch-gan": PatchDiscriminatorConfig(),
    "mini-patch-gan": PatchDiscriminatorConfig(
        sample_size=28, in_channels=1, block_out_channels=(32, 64, 128)
    ),
}
