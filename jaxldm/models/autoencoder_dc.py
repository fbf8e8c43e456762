"""The deep compression autoencoder of SANA: `AutoencoderDC` of diffusers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from jaxldm.errors import one_of
from jaxldm.models.config import ModelConfig, check
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.efficient_vit import EfficientViTBlock, channel_norm
from jaxldm.nn.initialization import shapes_of
from jaxldm.nn.linear import compute_dtype
from jaxldm.nn.normalization import RMSNorm
from jaxldm.nn.pixel_shuffle import pixel_shuffle, pixel_unshuffle

BLOCKS = ("ResBlock", "EfficientViTBlock")
NORMS = ("rms_norm", "batch_norm")
UPSAMPLING, DOWNSAMPLING = ("pixel_shuffle", "interpolate"), ("pixel_unshuffle", "conv")
SIDES = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class AutoencoderDCConfig(ModelConfig):
    """Config of `AutoencoderDC`; names and defaults are those of diffusers. Levels from the pixels on.

    Attributes:
        encoder_block_types, decoder_block_types: one of `BLOCKS` for all levels, or one for each; and so
            `decoder_norm_types` of `NORMS`, and `decoder_act_fns`.
        encoder_layers_per_block, decoder_layers_per_block: blocks of each level; with 0 the first level is
            left out, and two pixels are taken as one.
        encoder_qkv_multiscales, decoder_qkv_multiscales: of each level the sizes of the neighbourhoods over
            which its attention gathers queries, keys and values.
        encoder_out_shortcut, decoder_in_shortcut: the means of channels, or copies of them, are added to the
            convolution on either side of the latents.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = "ResBlock"
    decoder_block_types: str | tuple[str, ...] = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    decoder_act_fns: str | tuple[str, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0
    dtype: str = "float32"

    published: ClassVar = True
    sample_size: ClassVar[int] = 512  # of a tile

    def check_values(self) -> None:
        check(
            len(self.encoder_block_out_channels) == len(self.decoder_block_out_channels) > 1,
            f"encoder and decoder need as many levels, two or more, not "
            f"{len(self.encoder_block_out_channels)} and {len(self.decoder_block_out_channels)}",
        )
        for side in SIDES:
            self._check_side(side)
        for name in ("decoder_norm_types", "decoder_act_fns"):
            value = getattr(self, name)
            check(
                isinstance(value, str) or len(value) == self.num_levels,
                f"{name} has {len(value)} levels, decoder_block_out_channels {self.num_levels}",
            )
        for level in range(self.num_levels):
            one_of("decoder_norm_types", self.of_level("decoder_norm_types", level), NORMS)
            one_of("decoder_act_fns", self.of_level("decoder_act_fns", level), ACTIVATIONS)
        one_of("decoder_conv_act_fn", self.decoder_conv_act_fn, ACTIVATIONS)
        one_of("upsample_block_type", self.upsample_block_type, UPSAMPLING)
        one_of("downsample_block_type", self.downsample_block_type.lower(), DOWNSAMPLING)
        check(self.scaling_factor > 0, "scaling_factor must be positive")
        compute_dtype(self.dtype)

    def _check_side(self, side: str) -> None:
        channels = getattr(self, f"{side}_block_out_channels")
        for name in ("layers_per_block", "qkv_multiscales", "block_types"):
            value = getattr(self, f"{side}_{name}")
            check(
                isinstance(value, str) or len(value) == len(channels),
                f"{side}_{name} has {len(value)} levels, {side}_block_out_channels {len(channels)}",
            )
        layers = getattr(self, f"{side}_layers_per_block")
        check(min(layers[1:]) > 0, f"{side}_layers_per_block can be 0 for the first level alone")
        for level, width in enumerate(channels):
            kind = one_of("block type", self.of_level(f"{side}_block_types", level), BLOCKS)
            check(
                kind == "ResBlock" or width % self.attention_head_dim == 0,
                f"{width} channels cannot be split into heads of {self.attention_head_dim}",
            )
        for finer, coarser in itertools.pairwise(channels):
            check(
                4 * finer % coarser == 0 and coarser % 4 == 0,
                f"{side}_block_out_channels {finer} and {coarser}: four pixels must become whole channels",
            )
        check(
            channels[-1] % self.latent_channels == 0,
            f"{channels[-1]} channels are no multiple of {self.latent_channels} latent channels",
        )

    def of_level(self, name: str, level: int) -> str:
        """The value of a field that may be one for all levels or one for each."""
        value = getattr(self, name)
        return value if isinstance(value, str) else value[level]

    @property
    def num_levels(self) -> int:
        """Resolutions, each half of the one before."""
        return len(self.encoder_block_out_channels)

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The channels of each level, under the name that other autoencoders have."""
        return self.decoder_block_out_channels


class ResBlock(nn.Module):
    """x + norm(conv2(act(conv1(x)))), 3x3. `[B, H, W, C]` -> the same shape."""

    norm: str = "rms_norm"
    act: str = "silu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        h = ACTIVATIONS[self.act](Conv2d(x.shape[-1], dtype=self.dtype, name="conv1")(x))
        h = Conv2d(x.shape[-1], dtype=self.dtype, use_bias=False, name="conv2")(h)
        return x.astype(h.dtype) + channel_norm(self.norm, self.dtype, "norm")(h)


class DCDownBlock2d(nn.Module):
    """Half the size by a convolution, plus means of the pixels' channels. Chen et al. 2024, section 3.2."""

    out_channels: int
    unshuffle: bool
    shortcut: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        if self.unshuffle:
            h = pixel_unshuffle(Conv2d(self.out_channels // 4, dtype=self.dtype, name="conv")(x), 2)
        else:
            h = Conv2d(self.out_channels, stride=2, dtype=self.dtype, name="conv")(x)
        return h + means_of_channels(pixel_unshuffle(x, 2), self.out_channels) if self.shortcut else h


class DCUpBlock2d(nn.Module):
    """Twice the size by a convolution, plus copies of channels as pixels. Chen et al. 2024, section 3.2."""

    out_channels: int
    interpolate: bool
    shortcut: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W out"]:
        if self.interpolate:
            h = Conv2d(self.out_channels, dtype=self.dtype, doubled=True, name="conv")(x)
        else:
            h = pixel_shuffle(Conv2d(4 * self.out_channels, dtype=self.dtype, name="conv")(x), 2)
        if not self.shortcut:
            return h
        return h + pixel_shuffle(copies_of_channels(x, 4 * self.out_channels), 2)


def means_of_channels(x: Float[Array, "B H W C"], channels: int) -> Float[Array, "B H W {channels}"]:
    """The mean of each group of neighbouring channels."""
    return x.reshape(*x.shape[:-1], channels, -1).mean(-1)


def copies_of_channels(x: Float[Array, "B H W C"], channels: int) -> Float[Array, "B H W {channels}"]:
    """Each channel several times, side by side."""
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)


class _Level(nn.Module):
    """The blocks of a level, and the change of size before or behind them, numbered in one sequence."""

    config: AutoencoderDCConfig
    side: str
    level: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        config, side, level = self.config, self.side, self.level
        channels = getattr(config, f"{side}_block_out_channels")
        count = getattr(config, f"{side}_layers_per_block")[level]
        resized = level < config.num_levels - 1 and count > 0
        first = int(resized and side == "decoder")
        if first:
            interpolate = config.upsample_block_type == "interpolate"
            x = DCUpBlock2d(channels[level], interpolate, dtype=config.dtype, name="0")(x)
        for i in range(first, first + count):
            x = self._block(str(i))(x)
        if resized and side == "encoder":
            unshuffle = config.downsample_block_type == "pixel_unshuffle"
            x = DCDownBlock2d(channels[level + 1], unshuffle, dtype=config.dtype, name=str(count))(x)
        return x

    def _block(self, name: str) -> nn.Module:
        config, level, decodes = self.config, self.level, self.side == "decoder"
        norm = config.of_level("decoder_norm_types", level) if decodes else "rms_norm"
        if config.of_level(f"{self.side}_block_types", level) == "EfficientViTBlock":
            scales = getattr(config, f"{self.side}_qkv_multiscales")[level]
            return EfficientViTBlock(config.attention_head_dim, scales, norm, config.dtype, name=name)
        act = config.of_level("decoder_act_fns", level) if decodes else "silu"
        return ResBlock(norm, act, config.dtype, name=name)


class Encoder(nn.Module):
    """Images -> latents."""

    config: AutoencoderDCConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        config, channels = self.config, self.config.encoder_block_out_channels
        if config.encoder_layers_per_block[0] > 0:
            h = Conv2d(channels[0], dtype=config.dtype, name="conv_in")(x)
        else:
            unshuffle = config.downsample_block_type == "pixel_unshuffle"
            h = DCDownBlock2d(channels[1], unshuffle, False, config.dtype, name="conv_in")(x)
        for level in range(config.num_levels):
            h = _Level(config, "encoder", level, name=f"down_blocks_{level}")(h)
        z = Conv2d(config.latent_channels, dtype=config.dtype, name="conv_out")(h)
        return z + means_of_channels(h, config.latent_channels) if config.encoder_out_shortcut else z


class Decoder(nn.Module):
    """Latents -> images."""

    config: AutoencoderDCConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        config, channels = self.config, self.config.decoder_block_out_channels
        h = Conv2d(channels[-1], dtype=config.dtype, name="conv_in")(z)
        if config.decoder_in_shortcut:
            h = h + copies_of_channels(z, channels[-1])
        for level in reversed(range(config.num_levels)):
            h = _Level(config, "decoder", level, name=f"up_blocks_{level}")(h)
        h = RMSNorm(1e-5, config.dtype, use_bias=True, name="norm_out")(h)
        h = ACTIVATIONS[config.decoder_conv_act_fn](h)
        if config.decoder_layers_per_block[0] > 0:
            return Conv2d(config.in_channels, dtype=config.dtype, name="conv_out")(h)
        interpolate = config.upsample_block_type == "interpolate"
        return DCUpBlock2d(config.in_channels, interpolate, False, config.dtype, name="conv_out")(h)


class AutoencoderDC(nn.Module):
    """Deep compression: 32 or 64 times smaller sides. Chen et al. 2024, arXiv:2410.10733.

    `encode`: images `[B, H, W, in_channels]` in [-1, 1], sides divisible by 2^(levels - 1) -> latents
    `[B, h, w, latent_channels]`, not scaled. `decode`: such latents -> images, about [-1, 1]. The call is
    decode(encode(x)), to initialise parameters.
    """

    config: AutoencoderDCConfig

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        chex.assert_shape(x, (None, None, None, self.config.in_channels))
        return self.encoder(x).astype(x.dtype)

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        chex.assert_shape(z, (None, None, None, self.config.latent_channels))
        return self.decoder(z).astype(z.dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        return self.decode(self.encode(x))

    @property
    def untrained(self) -> tuple[str, ...]:
        """Parameters that are not trained: the running statistics of batch norms."""
        return tuple("/".join(path) for path in self._statistics(("running_mean", "running_var")))

    def constant_tensors(self) -> Mapping[str, Int[np.ndarray, ""]]:
        """PyTorch's count of batches in the running statistics: written as 0, never read."""
        norms = [".".join(path[:-1]) for path in self._statistics(("running_mean",))]
        names = [norm.replace("up_blocks_", "up_blocks.") for norm in norms]
        return {f"{name}.num_batches_tracked": np.zeros((), np.int64) for name in names}

    def _statistics(self, leaves: tuple[str, ...]) -> list[tuple[str, ...]]:
        if not any(self.config.of_level("decoder_norm_types", i) == "batch_norm" for i in self._levels):
            return []
        shapes = shapes_of(self, *self.example_inputs())["params"]
        return [path for path in traverse_util.flatten_dict(shapes) if path[-1] in leaves]

    @property
    def _levels(self) -> range:
        return range(self.config.num_levels)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        side = 2 ** (self.config.num_levels - 1)
        return (jax.ShapeDtypeStruct((1, side, side, self.config.in_channels), jnp.float32),)


_RES_AND_VIT = (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3)

PRESETS = {
    # SANA's, f = 32.
    "sana-dc-ae": AutoencoderDCConfig(
        encoder_block_types=_RES_AND_VIT,
        decoder_block_types=_RES_AND_VIT,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ),
}
