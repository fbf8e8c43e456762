"""The tiny autoencoder of previews and of fast decoding, TAESD: `AutoencoderTiny` of diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import one_of
from jaxldm.models.config import ModelConfig, check
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import compute_dtype

LIMIT = 3.0  # of what the decoder takes of a latent: 3 tanh(z / 3)


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig(ModelConfig):
    """Config of `AutoencoderTiny`; names and defaults are those of diffusers. A level per number of blocks.

    Attributes:
        encoder_block_out_channels, decoder_block_out_channels: channels of each level, all equal, as the
            convolutions between the levels keep their number.
        latent_magnitude, latent_shift: z / (2 magnitude) + shift is in [0, 1], for those who store latents as
            8-bit pictures. Not used here.
        scaling_factor, shift_factor: 1 and 0 as published: its latents are those of the diffusion model.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {"upsample_fn": "nearest", "upsampling_scaling_factor": 2}
    ignored: ClassVar = frozenset({"block_out_channels", "force_upcast"})  # diffusers adds them itself
    sample_size: ClassVar[int] = 512  # of a tile

    def check_values(self) -> None:
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        for side in ("encoder", "decoder"):
            channels, blocks = (
                getattr(self, f"{side}_block_out_channels"),
                getattr(self, f"num_{side}_blocks"),
            )
            check(
                len(channels) == len(blocks) > 0,
                f"num_{side}_blocks has {len(blocks)} levels, {side}_block_out_channels {len(channels)}",
            )
            check(
                len(set(channels)) == 1,
                f"{side}_block_out_channels must all be equal, not {list(channels)}: nothing changes them",
            )
        check(
            len(self.num_encoder_blocks) == len(self.num_decoder_blocks),
            f"an encoder of {len(self.num_encoder_blocks)} levels and a decoder of "
            f"{len(self.num_decoder_blocks)}: they must be as many",
        )
        check(self.scaling_factor > 0, "scaling_factor must be positive")
        check(self.latent_magnitude > 0, "latent_magnitude must be positive")
        compute_dtype(self.dtype)

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The channels of each level, under the name that other autoencoders have."""
        return self.decoder_block_out_channels


class AutoencoderTinyBlock(nn.Module):
    """relu(x + conv(act(conv(act(conv(x)))))), 3x3. `[B, H, W, C]` -> the same shape."""

    act: str = "relu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        act = ACTIVATIONS[self.act]
        h = act(Conv2d(x.shape[-1], dtype=self.dtype, name="conv_0")(x))
        h = act(Conv2d(x.shape[-1], dtype=self.dtype, name="conv_2")(h))
        return jax.nn.relu(x.astype(h.dtype) + Conv2d(x.shape[-1], dtype=self.dtype, name="conv_4")(h))


class EncoderTiny(nn.Module):
    """Images in [-1, 1] -> latents: a convolution and blocks a level, each at half the size of the last."""

    config: AutoencoderTinyConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        config = self.config
        conv, block = _counted(config)
        x = x / 2 + 0.5
        for level, count in enumerate(config.num_encoder_blocks):
            halving = {} if level == 0 else {"stride": 2, "use_bias": False}
            x = conv(config.encoder_block_out_channels[level], **halving)(x)
            for _ in range(count):
                x = block()(x)
        return conv(config.latent_channels)(x)


class DecoderTiny(nn.Module):
    """Latents -> images, about [-1, 1]: blocks and a convolution a level, the side doubled in between."""

    config: AutoencoderTinyConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        config, channels = self.config, self.config.decoder_block_out_channels
        conv, block = _counted(config)
        x = ACTIVATIONS[config.act_fn](conv(channels[0])(LIMIT * jnp.tanh(z / LIMIT)))
        conv.skip()  # the activation has a number of its own, and so has each doubling
        for level, count in enumerate(config.num_decoder_blocks[:-1]):
            for _ in range(count):
                x = block()(x)
            conv.skip()
            x = conv(channels[level], use_bias=False, doubled=True)(x)
        for _ in range(config.num_decoder_blocks[-1]):
            x = block()(x)
        return 2 * conv(config.out_channels)(x) - 1


class _Counted:
    """Makes layers that are named by their place in one sequence: layers_0, layers_1, ..."""

    def __init__(self, make: Callable[..., nn.Module], place: list[int]):
        self.make, self.place = make, place

    def __call__(self, *options, **more) -> nn.Module:
        self.skip()
        return self.make(*options, **more, name=f"layers_{self.place[0] - 1}")

    def skip(self) -> None:
        """Leave out one place."""
        self.place[0] += 1


def _counted(config: AutoencoderTinyConfig) -> tuple[_Counted, _Counted]:
    """(convolutions, blocks), counted together."""
    place = [0]

    def conv(features: int, **options) -> nn.Module:
        return Conv2d(features, dtype=config.dtype, **options)

    def block(**options) -> nn.Module:
        return AutoencoderTinyBlock(config.act_fn, config.dtype, **options)

    return _Counted(conv, place), _Counted(block, place)


class AutoencoderTiny(nn.Module):
    """Plain convolutions that approximate the autoencoder of a diffusion model. Boer Bohan 2023, TAESD.

    `encode`: images `[B, H, W, in_channels]` in [-1, 1] -> latents `[B, h, w, latent_channels]`, as they are
    (there is no Gaussian), h = ceil(H / 2^(levels - 1)). `decode`: such latents -> images, about [-1, 1]. The
    call is decode(encode(x)), to initialise parameters.
    """

    config: AutoencoderTinyConfig

    def setup(self):
        self.encoder = EncoderTiny(self.config)
        self.decoder = DecoderTiny(self.config)

    def encode(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        chex.assert_shape(x, (None, None, None, self.config.in_channels))
        return self.encoder(x).astype(x.dtype)

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        chex.assert_shape(z, (None, None, None, self.config.latent_channels))
        return self.decoder(z).astype(z.dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        return self.decode(self.encode(x))

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        side = 2 ** (len(self.config.num_encoder_blocks) - 1)
        return (jax.ShapeDtypeStruct((1, side, side, self.config.in_channels), jnp.float32),)


_TAESD = AutoencoderTinyConfig()
_SIXTEEN_CHANNELS = dataclasses.replace(_TAESD, latent_channels=16)

# The published ones, for f = 8: 2.4 million parameters, encoder and decoder half each.
PRESETS = {
    "taesd": _TAESD,  # Stable Diffusion 1.x and 2.x
    "taesdxl": _TAESD,
    "taesd3": _SIXTEEN_CHANNELS,
    "taef1": _SIXTEEN_CHANNELS,  # FLUX.1
}
