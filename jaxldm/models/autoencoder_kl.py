"""The KL autoencoder of latent diffusion and Stable Diffusion: `AutoencoderKL` of diffusers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import chex
import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxldm.errors import one_of
from jaxldm.models.autoencoder import DiagonalGaussian, split_moments
from jaxldm.models.config import ModelConfig, check, check_groups
from jaxldm.models.inputs import image_shape
from jaxldm.nn.blocks_2d import DownBlock2D, MidBlock2D, UpBlock2D
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import compute_dtype
from jaxldm.nn.normalization import GroupNorm

EPS = 1e-6  # of every normalisation in this architecture


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(ModelConfig):
    """Config of `AutoencoderKL`; names and defaults are those of diffusers. A level per channel count.

    scaling_factor, shift_factor: diffusion works on (z - shift_factor) * scaling_factor, see
      `encode_latents`.
    dtype: compute dtype. The SDXL weights overflow in float16: use float32 or bfloat16 with them.
    """

    sample_size: int | tuple[int, int] = 32
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
    ignored: ClassVar = frozenset({"force_upcast"})

    def __post_init__(self):
        levels = len(self.block_out_channels)
        check(
            len(self.down_block_types) == len(self.up_block_types) == levels,
            f"{levels} block_out_channels need as many down_block_types and up_block_types",
        )
        for kind in self.down_block_types:
            one_of("block type", kind, ("DownEncoderBlock2D",))
        for kind in self.up_block_types:
            one_of("block type", kind, ("UpDecoderBlock2D",))
        check_groups(self.block_out_channels, self.norm_num_groups)
        check(self.scaling_factor > 0, "scaling_factor must be positive")
        compute_dtype(self.dtype)


def _mid_block(config: AutoencoderKLConfig) -> MidBlock2D:
    return MidBlock2D(
        num_groups=config.norm_num_groups,
        eps=EPS,
        attention=config.mid_block_add_attention,
        attention_groups=config.norm_num_groups,
        dtype=config.dtype,
        name="mid_block",
    )


def _norm_out(config: AutoencoderKLConfig) -> GroupNorm:
    return GroupNorm(config.norm_num_groups, EPS, config.dtype, name="conv_norm_out")


class Encoder(nn.Module):
    """Images `[B, H, W, in]` -> moments `[B, h, w, 2 latent_channels]`. Rombach et al. 2022, appendix G."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w 2c"]:
        config = self.config
        h = Conv2d(config.block_out_channels[0], dtype=config.dtype, name="conv_in")(x)
        for i, channels in enumerate(config.block_out_channels):
            h, _ = DownBlock2D(
                out_channels=channels,
                num_layers=config.layers_per_block,
                num_groups=config.norm_num_groups,
                eps=EPS,
                dtype=config.dtype,
                add_downsample=i < len(config.block_out_channels) - 1,
                downsample_padding=0,
                name=f"down_blocks_{i}",
            )(h)
        h = nn.silu(_norm_out(config)(_mid_block(config)(h)))
        return Conv2d(2 * config.latent_channels, dtype=config.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Latents `[B, h, w, c]` -> images `[B, H, W, out]`: the encoder mirrored, one layer more per level."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        config = self.config
        h = Conv2d(config.block_out_channels[-1], dtype=config.dtype, name="conv_in")(z)
        h = _mid_block(config)(h)
        for i, channels in enumerate(reversed(config.block_out_channels)):
            h = UpBlock2D(
                out_channels=channels,
                num_layers=config.layers_per_block + 1,
                num_groups=config.norm_num_groups,
                eps=EPS,
                dtype=config.dtype,
                add_upsample=i < len(config.block_out_channels) - 1,
                name=f"up_blocks_{i}",
            )(h)
        h = nn.silu(_norm_out(config)(h))
        return Conv2d(config.out_channels, dtype=config.dtype, name="conv_out")(h)


class AutoencoderKL(nn.Module):
    """Convolutional KL autoencoder with attention at the lowest resolution. Rombach et al. 2022, appendix G.

    `encode`: images `[B, H, W, in_channels]` in [-1, 1] -> `DiagonalGaussian` of moments `[B, h, w,
    latent_channels]`, not scaled, h = H / 2^(levels - 1). `decode`: z, not scaled -> images, about [-1, 1]
    (no final tanh). The call is decode(mean of encode), to start parameters.
    """

    config: AutoencoderKLConfig

    def setup(self):
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        one_by_one = {"kernel_size": 1, "padding": 0, "dtype": config.dtype}
        self.quant_conv = Conv2d(2 * config.latent_channels, **one_by_one) if config.use_quant_conv else None
        self.post_quant_conv = (
            Conv2d(config.latent_channels, **one_by_one) if config.use_post_quant_conv else None
        )

    def encode(self, x: Float[Array, "B H W C"]) -> DiagonalGaussian:
        chex.assert_shape(x, (None, None, None, self.config.in_channels))
        moments = self.encoder(x)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return split_moments(moments.astype(x.dtype))

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        chex.assert_shape(z, (None, None, None, self.config.latent_channels))
        h = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(h).astype(z.dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.decode(self.encode(x).mean)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        return image_shape(self.config)


_STABLE_DIFFUSION = AutoencoderKLConfig(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)

PRESETS = {
    # The published autoencoder of Stable Diffusion 1.x and 2.x: f = 8, 4 latent channels, 84 M parameters.
    "sd-autoencoder": _STABLE_DIFFUSION,
    "sdxl-autoencoder": dataclasses.replace(_STABLE_DIFFUSION, sample_size=1024, scaling_factor=0.13025),
}
