"""An autoencoder whose decoder draws: the consistency decoder of DALL-E 3, for Stable Diffusion's latents."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import one_of
from jaxldm.models.autoencoder import DiagonalGaussian, split_moments
from jaxldm.models.autoencoder_kl import Encoder, ImageAutoencoderConfig
from jaxldm.models.config import ModelConfig, check, check_groups
from jaxldm.models.inputs import image_shape
from jaxldm.nn.activations import silu
from jaxldm.nn.blocks_2d import DownBlock2D, MidBlock2D, UpBlock2D, apply_levels
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.embeddings import TimestepEmbedding
from jaxldm.nn.linear import Embedding, compute_dtype
from jaxldm.nn.normalization import GroupNorm
from jaxldm.nn.resizing import resize_nearest

TIMESTEPS = (1008, 512)  # the two calls of the network
SIGMA_DATA = 0.5
# Of the scaled latents of Stable Diffusion, channel by channel.
MEANS = (0.38862467, 0.02253063, 0.07381133, -0.0171294)
STDS = (0.9654121, 1.0440036, 0.76147926, 0.77022034)
DOWN, UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"


@dataclasses.dataclass(frozen=True)
class ConsistencyDecoderVAEConfig(ModelConfig):
    """Config of `ConsistencyDecoderVAE`; names and defaults are those of diffusers."""

    scaling_factor: float = 0.18215
    latent_channels: int = 4
    sample_size: int | tuple[int, int] = 32
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    encoder_in_channels: int = 3
    encoder_layers_per_block: int = 2
    encoder_norm_num_groups: int = 32
    encoder_out_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] = (320, 640, 1024, 1024)
    decoder_down_block_types: tuple[str, ...] = (DOWN,) * 4
    decoder_in_channels: int = 7
    decoder_layers_per_block: int = 3
    decoder_norm_eps: float = 1e-5
    decoder_norm_num_groups: int = 32
    decoder_num_train_timesteps: int = 1024
    decoder_out_channels: int = 6
    decoder_resnet_time_scale_shift: str = "scale_shift"
    decoder_up_block_types: tuple[str, ...] = (UP,) * 4
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {
        "encoder_act_fn": "silu",
        "encoder_double_z": True,
        "decoder_add_attention": False,
        "decoder_downsample_padding": 1,
        "decoder_time_embedding_type": "learned",
    }
    ignored: ClassVar = frozenset({"block_out_channels", "force_upcast"})  # diffusers adds them itself

    def check_values(self) -> None:
        channels, kinds = len(MEANS), (self.decoder_down_block_types, self.decoder_up_block_types)
        check(
            self.latent_channels == self.encoder_out_channels == channels,
            f"the consistency decoder is for latents of {channels} channels, not {self.latent_channels}",
        )
        for types, known in zip(kinds, (DOWN, UP), strict=True):
            levels = len(self.decoder_block_out_channels)
            check(
                len(types) == levels,
                f"{levels} decoder_block_out_channels need {levels} block types, not {len(types)}",
            )
            for kind in types:
                one_of("block type", kind, (known,))
        check(self.decoder_layers_per_block > 0, "decoder_layers_per_block must be positive")
        shift = self.decoder_resnet_time_scale_shift
        one_of("decoder_resnet_time_scale_shift", shift, ("default", "scale_shift"))
        check(
            self.decoder_num_train_timesteps > TIMESTEPS[0],
            f"decoder_num_train_timesteps must be more than {TIMESTEPS[0]}, the first timestep",
        )
        pixels = self.encoder_in_channels
        check(
            self.decoder_in_channels == pixels + channels and self.decoder_out_channels >= pixels,
            f"the decoder takes {pixels} + {channels} channels and gives {pixels} or more, not "
            f"{self.decoder_in_channels} and {self.decoder_out_channels}",
        )
        check_groups(self.decoder_block_out_channels, self.decoder_norm_num_groups)
        self.of_encoder()
        compute_dtype(self.dtype)

    def of_encoder(self) -> ImageAutoencoderConfig:
        """The config of an autoencoder that has the encoder of this one."""
        return ImageAutoencoderConfig(
            sample_size=self.sample_size,
            in_channels=self.encoder_in_channels,
            block_out_channels=self.encoder_block_out_channels,
            down_block_types=self.encoder_down_block_types,
            up_block_types=("UpDecoderBlock2D",) * len(self.encoder_block_out_channels),
            layers_per_block=self.encoder_layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.encoder_norm_num_groups,
            scaling_factor=self.scaling_factor,
            dtype=self.dtype,
        )

    @property
    def in_channels(self) -> int:
        """The channels of the images, under the name that other autoencoders have."""
        return self.encoder_in_channels

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The channels of each level of the encoder, likewise."""
        return self.encoder_block_out_channels


class Step(NamedTuple):
    """Factors of the noise before a call of the network, alpha and sigma, and of the call: EDM's."""

    alpha: float
    sigma: float
    c_in: float
    c_out: float
    c_skip: float


def step_at(timestep: int, num_train_timesteps: int) -> Step:
    """The factors at a timestep of the cosine schedule (Karras et al. 2022, table 1, in x / alpha).

    Before its last few timesteps no beta is cut, so that their product is a quotient of the schedule itself.
    """
    first, last = (_cosine(t / num_train_timesteps) for t in (0, timestep + 1))
    abar = last / first
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    ratio, data = sigma / alpha, SIGMA_DATA**2
    total = ratio**2 + data
    c_out = ratio * SIGMA_DATA / total**0.5
    return Step(alpha, sigma, 1 / alpha / total**0.5, c_out, data / alpha / total)


def _cosine(t: float) -> float:
    """alphas_cumprod at t in [0, 1], not normalised (Nichol & Dhariwal 2021, eq. 17)."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


class ConsistencyUNet(nn.Module):
    """A U-Net without attention, its time a table of embeddings."""

    config: ConsistencyDecoderVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], timestep: int) -> Float[Array, "B H W out"]:
        config, channels = self.config, self.config.decoder_block_out_channels
        table = Embedding(config.decoder_num_train_timesteps, channels[0], config.dtype, name="time_proj")
        temb = TimestepEmbedding(4 * channels[0], config.dtype, name="time_embedding")(
            table(jnp.full(len(x), timestep, jnp.int32))
        )
        levels: dict[str, Any] = {
            "num_groups": config.decoder_norm_num_groups,
            "eps": config.decoder_norm_eps,
            "time_scale_shift": config.decoder_resnet_time_scale_shift,
            "resnet_resampling": True,
            "dtype": config.dtype,
        }
        last, layers = len(channels) - 1, config.decoder_layers_per_block
        down = [
            DownBlock2D(
                out_channels=width,
                num_layers=layers,
                add_downsample=i < last,
                name=f"down_blocks_{i}",
                **levels,
            )
            for i, width in enumerate(channels)
        ]
        up = [
            UpBlock2D(
                out_channels=width,
                num_layers=layers + 1,
                add_upsample=i < last,
                name=f"up_blocks_{i}",
                **levels,
            )
            for i, width in enumerate(reversed(channels))
        ]
        mid = MidBlock2D(attention=False, name="mid_block", **levels)
        h = Conv2d(channels[0], dtype=config.dtype, name="conv_in")(x)
        h = apply_levels(self, h, down, mid, up, temb, False)
        norm = GroupNorm(
            config.decoder_norm_num_groups, config.decoder_norm_eps, config.dtype, name="conv_norm_out"
        )
        return Conv2d(config.decoder_out_channels, dtype=config.dtype, name="conv_out")(silu(norm(h)))


class ConsistencyDecoderVAE(nn.Module):
    """Stable Diffusion's encoder, and a consistency model that draws the image of a latent in two steps.

    `encode`: images `[B, H, W, 3]` in [-1, 1] -> `DiagonalGaussian` of moments, not scaled. `decode`: z, not
    scaled -> images, about [-1, 1] (Betker et al. 2023; Song et al. 2023, algorithm 1). The call is
    decode(mean of encode), to initialise parameters.
    """

    config: ConsistencyDecoderVAEConfig

    def setup(self):
        config = self.config
        self.encoder = Encoder(config.of_encoder(), 2 * config.latent_channels)
        self.quant_conv = Conv2d(2 * config.latent_channels, 1, padding=0, dtype=config.dtype)
        self.decoder_unet = ConsistencyUNet(config)

    def encode(self, x: Float[Array, "B H W C"]) -> DiagonalGaussian:
        chex.assert_shape(x, (None, None, None, self.config.in_channels))
        return split_moments(self.quant_conv(self.encoder(x)).astype(x.dtype))

    def decode(
        self, z: Float[Array, "B h w c"], noise: Float[Array, "2 #B H W 3"] | None = None
    ) -> Float[Array, "B H W C"]:
        """Draw the images.

        Args:
            z: `[B, h, w, 4]`.
            noise: N(0, 1) of both steps; None: the same of a fixed key for every image.
        """
        config = self.config
        chex.assert_shape(z, (None, None, None, config.latent_channels))
        factor = 2 ** (len(config.block_out_channels) - 1)
        size = (z.shape[1] * factor, z.shape[2] * factor)
        if noise is None:
            noise = jax.random.normal(jax.random.key(0), (2, 1, *size, config.in_channels), jnp.float32)
        means, stds = (jnp.asarray(value, z.dtype).reshape(1, 1, 1, -1) for value in (MEANS, STDS))
        condition = resize_nearest((z * config.scaling_factor - means) / stds, size)
        x = jnp.zeros((len(z), *size, config.in_channels), jnp.float32)
        for timestep, fresh in zip(TIMESTEPS, noise, strict=True):
            step = step_at(timestep, config.decoder_num_train_timesteps)
            x = step.alpha * x + step.sigma * fresh  # of nothing at first
            joined = jnp.concatenate([(step.c_in * x).astype(z.dtype), condition], axis=-1)
            output = self.decoder_unet(joined, timestep)[..., : config.in_channels]
            x = step.c_out * output.astype(jnp.float32) + step.c_skip * x
        return x.astype(z.dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        return self.decode(self.encode(x).mean)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        return image_shape(self.config)


PRESETS = {"consistency-decoder": ConsistencyDecoderVAEConfig()}
