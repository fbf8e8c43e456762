"""The autoencoder of Qwen-Image: `AutoencoderKLQwenImage` of diffusers, for single images.

It is one of videos (that of Wan2.1), whose convolutions see a frame and the two before it. Before an image
there are no frames, but zeros: of each kernel the last slice alone has an effect, and the convolution is one
of two dimensions. Convolutions between frames are left out of the first frame, and so here altogether; their
parameters are kept as they are.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.models.autoencoder import DiagonalGaussian, split_moments
from jaxldm.models.config import ModelConfig, check
from jaxldm.nn.activations import silu
from jaxldm.nn.attention import attend
from jaxldm.nn.convolution import DIMENSIONS, Conv2d
from jaxldm.nn.initialization import fan_in_uniform, ones, parameter
from jaxldm.nn.linear import compute_dtype, product_dtype

FRAMES = 3  # that a kernel sees


@dataclasses.dataclass(frozen=True)
class AutoencoderKLQwenImageConfig(ModelConfig):
    """Config of `AutoencoderKLQwenImage`; names and defaults are those of diffusers.

    Attributes:
        base_dim: channels next to the pixels; a level has `dim_mult` times as many.
        z_dim: channels of the latents.
        num_res_blocks: of a level of the encoder; the decoder has one more.
        temperal_downsample: for each change of size, whether it is one of time as well.
        input_channels: of the images, 3.
        latents_mean, latents_std: of z, a number per channel: see `encode_latents`.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    input_channels: int = 3
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {"attn_scales": [], "dropout": 0.0}
    scaling_factor: ClassVar[float] = 1.0
    sample_size: ClassVar[int] = 256  # of a tile

    def check_values(self) -> None:
        check(
            len(self.temperal_downsample) == len(self.dim_mult) - 1 > 0,
            f"dim_mult {self.dim_mult} needs one number more than temperal_downsample "
            f"{self.temperal_downsample}, which has one for each change of size",
        )
        for name in ("latents_mean", "latents_std"):
            given = len(getattr(self, name))
            check(given == self.z_dim, f"{name} must have z_dim = {self.z_dim} numbers, not {given}")
        check(all(value > 0 for value in self.latents_std), "latents_std must be numbers above 0")
        check(
            all(channels % 2 == 0 for channels in self.block_out_channels[1:]),
            f"channels of levels must be even, not {self.block_out_channels}",
        )
        compute_dtype(self.dtype)

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The channels of each level, under the name that other autoencoders have."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, under the name that other autoencoders have."""
        return self.z_dim

    @property
    def in_channels(self) -> int:
        """Channels of the images, under the name that other autoencoders have."""
        return self.input_channels

    @property
    def out_channels(self) -> int:
        """The same, of what is decoded."""
        return self.input_channels


class CausalConv3d(nn.Module):
    """A convolution over frames, of the first one: `[B, H, W, C]` -> `[B, H, W, features]`, stride 1.

    The kernel `[size, size, size, C, features]` has the frames first; before this one there are zeros, so
    that its last slice alone is used.
    """

    features: int
    size: int = 3
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        dtype, size, channels = compute_dtype(self.dtype), self.size, x.shape[-1]
        default = fan_in_uniform(size**3 * channels)
        kernel = parameter(self, "kernel", default, (size, size, size, channels, self.features))
        bias = parameter(self, "bias", default, (self.features,))
        wide = product_dtype(dtype)
        x, of_frame = (value.astype(dtype).astype(wide) for value in (x, kernel[-1]))
        if size == 1:
            y = x @ of_frame[0, 0]
        else:
            sides = (size // 2, size // 2)
            y = jax.lax.conv_general_dilated(
                x, of_frame, (1, 1), (sides, sides), dimension_numbers=DIMENSIONS
            )
        return (y + bias.astype(wide).reshape(1, 1, 1, -1)).astype(dtype)


class TimeConvolution(nn.Module):
    """The parameters of a convolution between frames, which no single image goes through."""

    features: int

    @nn.compact
    def __call__(self, channels: int) -> None:
        default = fan_in_uniform(FRAMES * channels)
        parameter(self, "kernel", default, (FRAMES, 1, 1, channels, self.features))
        parameter(self, "bias", default, (self.features,))


class ChannelNorm(nn.Module):
    """x / |x| sqrt(C) gamma, |x| over the channels of a pixel, in float32. `[B, H, W, C]` -> the same shape.

    Zhang & Sennrich 2019, eq. 4, without eps.

    Attributes:
        trailing: axes of length 1 behind the channels in the published gamma.
    """

    trailing: int = 3
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        gamma = parameter(self, "gamma", ones, (channels, *(1,) * self.trailing)).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        # No smaller than 1e-12 is the length, as in the reference; its root has a gradient at 0.
        length = jnp.sqrt(jnp.maximum(jnp.square(x32).sum(-1, keepdims=True), 1e-24))
        y = x32 / length * (channels**0.5 * gamma.reshape(1, 1, 1, -1))
        return y.astype(compute_dtype(self.dtype))


class ResidualBlock(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))). `[B, H, W, C]` -> `[B, H, W, features]`."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        h = x
        for number in (1, 2):
            h = silu(ChannelNorm(dtype=self.dtype, name=f"norm{number}")(h))
            h = CausalConv3d(self.features, dtype=self.dtype, name=f"conv{number}")(h)
        if x.shape[-1] != self.features:
            x = CausalConv3d(self.features, 1, self.dtype, name="conv_shortcut")(x)
        return x.astype(h.dtype) + h


class AttentionBlock(nn.Module):
    """x + attention of one head among the pixels. `[B, H, W, C]` -> the same shape."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels, one = x.shape[-1], {"kernel_size": 1, "padding": 0, "dtype": self.dtype}
        h = ChannelNorm(2, self.dtype, name="norm")(x)
        h = Conv2d(3 * channels, **one, name="to_qkv")(h).reshape(x.shape[0], -1, 3 * channels)
        q, k, v = jnp.split(h, 3, axis=-1)
        h = attend(self, q, k, v, 1).reshape(x.shape)
        return x.astype(h.dtype) + Conv2d(channels, **one, name="proj")(h)


class Resample(nn.Module):
    """Half the size by a convolution of stride 2, or twice the size and half the channels."""

    up: bool
    with_time: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        channels = x.shape[-1]
        if self.with_time:
            TimeConvolution(2 * channels if self.up else channels, name="time_conv")(channels)
        if self.up:
            return Conv2d(channels // 2, dtype=self.dtype, doubled=True, name="resample_1")(x)
        return Conv2d(channels, stride=2, padding=(0, 1), dtype=self.dtype, name="resample_1")(x)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = ResidualBlock(x.shape[-1], self.dtype, name="resnets_0")(x)
        x = AttentionBlock(self.dtype, name="attentions_0")(x)
        return ResidualBlock(x.shape[-1], self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """Images -> moments; residual blocks and changes of size are numbered in one sequence."""

    config: AutoencoderKLQwenImageConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w moments"]:
        config, dtype, number = self.config, self.config.dtype, 0
        h = CausalConv3d(config.base_dim, dtype=dtype, name="conv_in")(x)
        for level, channels in enumerate(config.block_out_channels):
            for _ in range(config.num_res_blocks):
                h = ResidualBlock(channels, dtype, name=f"down_blocks_{number}")(h)
                number += 1
            if level < len(config.temperal_downsample):
                with_time = config.temperal_downsample[level]
                h = Resample(False, with_time, dtype, name=f"down_blocks_{number}")(h)
                number += 1
        h = silu(ChannelNorm(dtype=dtype, name="norm_out")(MidBlock(dtype, name="mid_block")(h)))
        return CausalConv3d(2 * config.z_dim, dtype=dtype, name="conv_out")(h)


class UpBlock(nn.Module):
    """The residual blocks of a level, then twice the size unless `with_time` is None."""

    features: int
    count: int
    with_time: bool | None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W out"]:
        for number in range(self.count):
            x = ResidualBlock(self.features, self.dtype, name=f"resnets_{number}")(x)
        if self.with_time is None:
            return x
        return Resample(True, self.with_time, self.dtype, name="upsamplers_0")(x)


class Decoder(nn.Module):
    """Latents -> images."""

    config: AutoencoderKLQwenImageConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        config, dtype = self.config, self.config.dtype
        h = CausalConv3d(config.block_out_channels[-1], dtype=dtype, name="conv_in")(z)
        h = MidBlock(dtype, name="mid_block")(h)
        changes = (*reversed(config.temperal_downsample), None)
        for level, channels in enumerate(reversed(config.block_out_channels)):
            count = config.num_res_blocks + 1
            h = UpBlock(channels, count, changes[level], dtype, name=f"up_blocks_{level}")(h)
        h = silu(ChannelNorm(dtype=dtype, name="norm_out")(h))
        return CausalConv3d(config.input_channels, dtype=dtype, name="conv_out")(h)


class AutoencoderKLQwenImage(nn.Module):
    """The KL autoencoder of Qwen-Image, f = 8. Wu et al. 2025, arXiv:2508.02324, section 2.

    `encode`: images `[B, H, W, input_channels]` in [-1, 1] -> `DiagonalGaussian` of moments `[B, h, w,
    z_dim]`, not scaled, h = H / 2^(levels - 1). `decode`: z, not scaled -> images, clipped to [-1, 1]. The
    call is decode(mean of encode), to initialise parameters.
    """

    config: AutoencoderKLQwenImageConfig

    def setup(self):
        config = self.config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 1, config.dtype)
        self.post_quant_conv = CausalConv3d(config.z_dim, 1, config.dtype)

    def encode(self, x: Float[Array, "B H W C"]) -> DiagonalGaussian:
        chex.assert_shape(x, (None, None, None, self.config.input_channels))
        return split_moments(self.quant_conv(self.encoder(x)).astype(x.dtype))

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        chex.assert_shape(z, (None, None, None, self.config.z_dim))
        return jnp.clip(self.decoder(self.post_quant_conv(z)).astype(z.dtype), -1.0, 1.0)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        return self.decode(self.encode(x).mean)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        side = 2 ** (len(self.config.dim_mult) - 1)
        return (jax.ShapeDtypeStruct((1, side, side, self.config.input_channels), jnp.float32),)


PRESETS = {
    # 126,892,531 parameters, of which convolutions between frames have 2,324,544.
    "qwen-image-vae": AutoencoderKLQwenImageConfig(),
}
