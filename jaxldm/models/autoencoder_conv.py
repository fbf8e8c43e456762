"""The small convolutional autoencoder of lecture 39 as a KL autoencoder: 28x28x1 -> 7x7x4."""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.models.autoencoder import DiagonalGaussian, split_moments
from jaxldm.models.config import ModelConfig, check, check_groups, height_width
from jaxldm.models.inputs import image_shape
from jaxldm.nn.activations import silu
from jaxldm.nn.convolution import Conv2d, ConvTranspose4x4
from jaxldm.nn.linear import compute_dtype
from jaxldm.nn.normalization import GroupNorm


@dataclasses.dataclass(frozen=True)
class ConvAutoencoderConfig(ModelConfig):
    """Config of `ConvAutoencoder`. Each channel count after the first halves the image.

    Attributes:
        norm_num_groups: groups of the normalisation after every resampling convolution. None: plain
            convolutions, as in the lecture. On digits, four fifths background, those tend to get stuck at a
            constant image: tanh saturates before the latents carry information.
        scaling_factor, shift_factor: bring the latents to about N(0, 1) for the diffusion model; set after
            training.
    """

    sample_size: int | tuple[int, int] = 28
    in_channels: int = 1
    out_channels: int = 1
    block_out_channels: tuple[int, ...] = (32, 64, 64)
    latent_channels: int = 4
    norm_num_groups: int | None = 8
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    dtype: str = "float32"

    def check_values(self) -> None:
        factor = 2 ** (len(self.block_out_channels) - 1)
        for side in height_width(self.sample_size):
            check(
                side % factor == 0,
                f"a side of {side} pixels cannot be halved {len(self.block_out_channels) - 1} times",
            )
        check_groups(self.block_out_channels, 1 if self.norm_num_groups is None else self.norm_num_groups)
        check(self.scaling_factor > 0, "scaling_factor must be positive")
        compute_dtype(self.dtype)


def normalized_silu(config: ConvAutoencoderConfig, x: Float[Array, "B H W C"], name: str) -> Array:
    """Group normalisation, if the config has it, and SiLU."""
    if config.norm_num_groups is not None:
        x = GroupNorm(config.norm_num_groups, dtype=config.dtype, name=name)(x)
    return silu(x)


class ConvEncoder(nn.Module):
    """Conv 3x3, a stride-2 4x4 convolution per halving, conv 3x3 to 2 x latent_channels; with SiLU."""

    config: ConvAutoencoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w moments"]:
        config = self.config
        first, *halvings = config.block_out_channels
        x = silu(Conv2d(first, dtype=config.dtype, name="conv_in")(x))
        for i, channels in enumerate(halvings):
            x = Conv2d(channels, kernel_size=4, stride=2, dtype=config.dtype, name=f"down_{i}")(x)
            x = normalized_silu(config, x, f"norm_{i}")
        return Conv2d(2 * config.latent_channels, dtype=config.dtype, name="conv_out")(x)


class ConvDecoder(nn.Module):
    """The encoder mirrored: conv 3x3, a transposed stride-2 4x4 convolution per doubling, conv 3x3, tanh."""

    config: ConvAutoencoderConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        config = self.config
        first, *doublings = reversed(config.block_out_channels)
        x = normalized_silu(config, Conv2d(first, dtype=config.dtype, name="conv_in")(z), "norm_in")
        for i, channels in enumerate(doublings):
            x = ConvTranspose4x4(channels, dtype=config.dtype, name=f"up_{i}")(x)
            x = normalized_silu(config, x, f"norm_{i}")
        return jnp.tanh(Conv2d(config.out_channels, dtype=config.dtype, name="conv_out")(x))


class ConvAutoencoder(nn.Module):
    """A KL autoencoder of plain convolutions (Kingma & Welling 2014), small enough to train on a laptop.

    `encode`: images `[B, H, W, in_channels]` in [-1, 1] -> `DiagonalGaussian` of moments `[B, H/4, W/4,
    latent_channels]`, not scaled. `decode`: z, not scaled -> images in (-1, 1). The call is decode(mean of
    encode), to initialise parameters.
    """

    config: ConvAutoencoderConfig

    def setup(self):
        self.encoder = ConvEncoder(self.config)
        self.decoder = ConvDecoder(self.config)

    def encode(self, x: Float[Array, "B H W C"]) -> DiagonalGaussian:
        chex.assert_shape(x, (None, None, None, self.config.in_channels))
        return split_moments(self.encoder(x).astype(x.dtype))

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        chex.assert_shape(z, (None, None, None, self.config.latent_channels))
        return self.decoder(z).astype(z.dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        return self.decode(self.encode(x).mean)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        return image_shape(self.config)


PRESETS = {"mini-autoencoder": ConvAutoencoderConfig()}
