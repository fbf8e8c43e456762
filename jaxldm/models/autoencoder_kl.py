"""The KL autoencoder of latent diffusion and Stable Diffusion: `AutoencoderKL` of diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Self

import chex
import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxldm.models.autoencoder import DiagonalGaussian, split_moments
from jaxldm.models.config import ModelConfig, check, check_groups, check_levels
from jaxldm.models.inputs import image_shape
from jaxldm.nn.activations import silu
from jaxldm.nn.blocks_2d import DownBlock2D, MidBlock2D, UpBlock2D
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import compute_dtype
from jaxldm.nn.normalization import GroupNorm
from jaxldm.nn.spatial_norm import SpatialNorm

EPS = 1e-6  # of every normalisation in this architecture
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


@dataclasses.dataclass(frozen=True)
class ImageAutoencoderConfig(ModelConfig):
    """Base of the configs of `AutoencoderKL` and `VQModel`, named as in diffusers. A level per channel count.

    Attributes:
        scaling_factor: see `encode_latents`.
        force_upcast: the activations exceed the range of float16 (65504), as in SDXL's autoencoder: encoder
            and decoder compute in float32 when `dtype` is float16. bfloat16 has the range.
        dtype: compute dtype.
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
    scaling_factor: float = 0.18215
    force_upcast: bool = False
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {"act_fn": "silu"}

    def check_values(self) -> None:
        check_levels(self, DOWN_BLOCKS, UP_BLOCKS)
        check_groups(self.block_out_channels, self.norm_num_groups)
        check(self.scaling_factor > 0, "scaling_factor must be positive")
        compute_dtype(self.dtype)

    def upcast(self) -> Self:
        """This config with the dtype that is used, see `force_upcast`."""
        overflows = self.force_upcast and self.dtype == "float16"
        return dataclasses.replace(self, dtype="float32") if overflows else self


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(ImageAutoencoderConfig):
    """Config of `AutoencoderKL`.

    Attributes:
        scaling_factor, shift_factor, latents_mean, latents_std: of the scaled latents, see
            `encode_latents`. The last two have a number per latent channel and come together (Playground
            v2.5).
    """

    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def check_values(self) -> None:
        super().check_values()
        statistics = self.latents_mean, self.latents_std
        if statistics != (None, None):
            check(
                all(value is not None and len(value) == self.latent_channels for value in statistics),
                f"latents_mean and latents_std come together, {self.latent_channels} numbers each",
            )
            check(not self.shift_factor, "shift_factor and latents_mean exclude each other")


def _mid_block(config: ImageAutoencoderConfig, spatial: bool = False) -> MidBlock2D:
    return MidBlock2D(
        num_groups=config.norm_num_groups,
        eps=EPS,
        time_scale_shift="spatial" if spatial else "default",
        attention=config.mid_block_add_attention,
        attention_groups=config.norm_num_groups,
        dtype=config.dtype,
        name="mid_block",
    )


def _norm_out(config: ImageAutoencoderConfig) -> GroupNorm:
    return GroupNorm(config.norm_num_groups, EPS, config.dtype, name="conv_norm_out")


class Encoder(nn.Module):
    """Images `[B, H, W, in]` -> features `[B, h, w, out_channels]`. Rombach et al. 2022, appendix G."""

    config: ImageAutoencoderConfig
    out_channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        config = self.config
        h = Conv2d(config.block_out_channels[0], dtype=config.dtype, name="conv_in")(x)
        for i, channels in enumerate(config.block_out_channels):
            h, _ = DownBlock2D(
                out_channels=channels,
                num_layers=config.layers_per_block,
                num_groups=config.norm_num_groups,
                eps=EPS,
                attention=config.down_block_types[i] == "AttnDownEncoderBlock2D",
                dtype=config.dtype,
                add_downsample=i < len(config.block_out_channels) - 1,
                downsample_padding=0,
                name=f"down_blocks_{i}",
            )(h)
        h = silu(_norm_out(config)(_mid_block(config)(h)))
        return Conv2d(self.out_channels, dtype=config.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Latents `[B, h, w, c]` -> images `[B, H, W, out]`: the encoder mirrored, one layer more per level.

    With `latents` given every normalisation is a `SpatialNorm` of them.
    """

    config: ImageAutoencoderConfig

    @nn.compact
    def __call__(
        self, z: Float[Array, "B h w c"], latents: Float[Array, "B h w code"] | None = None
    ) -> Float[Array, "B H W C"]:
        return decode_levels(self.config, z, latents)


def decode_levels(
    config: ImageAutoencoderConfig,
    z: Float[Array, "B h w c"],
    latents: Float[Array, "B h w code"] | None = None,
    blend: Callable[[Array], Array] = lambda h: h,
) -> Float[Array, "B H W C"]:
    """The layers of a decoder. Call it in the compact method of the module that has them.

    Args:
        config: of the autoencoder.
        z: `[B, h, w, c]`.
        latents: of the spatial norms, see `Decoder`.
        blend: of the features before and behind each level.
    """
    spatial = latents is not None
    h = Conv2d(config.block_out_channels[-1], dtype=config.dtype, name="conv_in")(z)
    h = _mid_block(config, spatial)(h, latents)
    for i, channels in enumerate(reversed(config.block_out_channels)):
        h = UpBlock2D(
            out_channels=channels,
            num_layers=config.layers_per_block + 1,
            num_groups=config.norm_num_groups,
            eps=EPS,
            time_scale_shift="spatial" if spatial else "default",
            attention=config.up_block_types[i] == "AttnUpDecoderBlock2D",
            dtype=config.dtype,
            add_upsample=i < len(config.block_out_channels) - 1,
            name=f"up_blocks_{i}",
        )(blend(h), None, latents)
    if spatial:
        h = SpatialNorm(dtype=config.dtype, name="conv_norm_out")(blend(h), latents)
    else:
        h = _norm_out(config)(blend(h))
    return Conv2d(config.out_channels, dtype=config.dtype, name="conv_out")(silu(h))


class AutoencoderKL(nn.Module):
    """Convolutional KL autoencoder with attention at the lowest resolution. Rombach et al. 2022, appendix G.

    `encode`: images `[B, H, W, in_channels]` in [-1, 1] -> `DiagonalGaussian` of moments `[B, h, w,
    latent_channels]`, not scaled, h = H / 2^(levels - 1). `decode`: z, not scaled -> images, about [-1, 1]
    (no final tanh). The call is decode(mean of encode), to initialise parameters.
    """

    config: AutoencoderKLConfig

    def setup(self):
        config = self.config.upcast()
        self.encoder = Encoder(config, 2 * config.latent_channels)
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

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
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
_SDXL = dataclasses.replace(_STABLE_DIFFUSION, sample_size=1024, scaling_factor=0.13025)
_SIXTEEN_CHANNELS = dataclasses.replace(
    _SDXL, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
)

# The published autoencoders, all with f = 8 and 84 M parameters.
PRESETS = {
    "sd-vae": _STABLE_DIFFUSION,  # Stable Diffusion 1.x and 2.x
    "sdxl-vae": _SDXL,
    "playground-vae": dataclasses.replace(
        _SDXL,
        scaling_factor=0.5,
        latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
        latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
    ),
    "sd3-vae": dataclasses.replace(_SIXTEEN_CHANNELS, scaling_factor=1.5305, shift_factor=0.0609),
    "flux-vae": dataclasses.replace(_SIXTEEN_CHANNELS, scaling_factor=0.3611, shift_factor=0.1159),
}
