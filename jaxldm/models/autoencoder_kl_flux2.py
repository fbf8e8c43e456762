"""FLUX.2's KL autoencoder: latents of 2x2 patches, brought to mean 0 and variance 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.autoencoder import DiagonalGaussian
from jaxldm.models.autoencoder_kl import AutoencoderKL, Decoder, Encoder, ImageAutoencoderConfig
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.flux_transformer_2d import PATCH, pack, unpack
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.initialization import ones, parameter, zeros


@dataclasses.dataclass(frozen=True)
class AutoencoderKLFlux2Config(ModelConfig):
    """Config of `AutoencoderKLFlux2`; names and defaults are those of diffusers, FLUX.2's own.

    Attributes:
        latent_channels: of a latent of the convolutions, 8 pixels wide; see `patch_channels`.
        decoder_block_out_channels: channels of the decoder's levels, where they are not the encoder's.
        batch_norm_eps: added to the variances of the latents.
        patch_size: (2, 2), the latents that are one for a diffusion model.
    """

    sample_size: int | tuple[int, int] = 1024
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, int] = (PATCH, PATCH)
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {"act_fn": "silu"}
    ignored: ClassVar = frozenset({"batch_norm_momentum", "force_upcast"})  # of training
    scaling_factor: ClassVar[float] = 1.0  # the statistics scale

    def check_values(self) -> None:
        check(self.patch_size == (PATCH, PATCH), f"patch_size must be (2, 2), not {self.patch_size}")
        levels, decoder = len(self.block_out_channels), self.decoder_block_out_channels
        check(
            decoder is None or len(decoder) == levels,
            f"decoder_block_out_channels {decoder} must have a number for each of {levels} levels",
        )
        for channels in (self.block_out_channels, decoder or self.block_out_channels):
            self.of_side(channels)
        check(self.batch_norm_eps >= 0, f"batch_norm_eps must be 0 or more, not {self.batch_norm_eps}")

    def of_side(self, block_out_channels: tuple[int, ...]) -> ImageAutoencoderConfig:
        """The config of an autoencoder with the encoder or the decoder of this one, by its channels."""
        names = {field.name for field in dataclasses.fields(ImageAutoencoderConfig)}
        shared = names & {field.name for field in dataclasses.fields(self)}
        fields: dict[str, Any] = {name: getattr(self, name) for name in shared}
        fields["block_out_channels"] = block_out_channels
        return ImageAutoencoderConfig(**fields)

    @property
    def shrinks(self) -> int:
        """How many pixels high and wide a latent of a diffusion model is: 16 as published."""
        return PATCH * 2 ** (len(self.block_out_channels) - 1)

    @property
    def patch_channels(self) -> int:
        """Channels of a latent of a diffusion model: 128 as published."""
        return PATCH**2 * self.latent_channels


class LatentStatistics(nn.Module):
    """Mean and standard deviation of each channel of the latents in training, `[1, 1, 1, C]` each."""

    channels: int
    eps: float

    def setup(self):
        self.running_mean = parameter(self, "running_mean", zeros, (self.channels,))
        self.running_var = parameter(self, "running_var", ones, (self.channels,))

    def __call__(self) -> tuple[Float[Array, "1 1 1 C"], Float[Array, "1 1 1 C"]]:
        both = (self.running_mean, self.running_var)
        mean, variance = (x.astype(jnp.float32).reshape(1, 1, 1, -1) for x in both)
        return mean, jnp.sqrt(variance + self.eps)


class AutoencoderKLFlux2(AutoencoderKL):
    """`AutoencoderKL` whose latents are 2x2 patches of those of the convolutions, normalised.

    `encode`: images `[B, H, W, in_channels]` in [-1, 1], sides divisible by `config.shrinks` ->
    `DiagonalGaussian` of latents as diffusion models have them, `[B, h, w, patch_channels]`,
    (patch - mean) / sqrt(variance + eps) by the statistics of training; the `encode` of diffusers is before
    that. `decode`: such latents -> images, about [-1, 1].

    Raises:
        InvalidArgumentError: sides that are not divisible, another number of channels.
    """

    config: AutoencoderKLFlux2Config  # pyright: ignore[reportIncompatibleVariableOverride]

    untrained: ClassVar[tuple[str, ...]] = ("bn/running_mean", "bn/running_var")

    def setup(self):
        config = self.config
        encoder, decoder = config.block_out_channels, config.decoder_block_out_channels
        self.encoder = Encoder(config.of_side(encoder), 2 * config.latent_channels)
        self.decoder = Decoder(config.of_side(decoder or encoder))
        one_by_one = {"kernel_size": 1, "padding": 0, "dtype": config.dtype}
        self.quant_conv = Conv2d(2 * config.latent_channels, **one_by_one) if config.use_quant_conv else None
        self.post_quant_conv = (
            Conv2d(config.latent_channels, **one_by_one) if config.use_post_quant_conv else None
        )
        self.bn = LatentStatistics(config.patch_channels, config.batch_norm_eps)

    def encode(self, x: Float[Array, "B H W C"]) -> DiagonalGaussian:
        height, width = x.shape[1:3]
        shrinks = self.config.shrinks
        if height % shrinks or width % shrinks:
            raise InvalidArgumentError(
                f"images of {height}x{width}: this autoencoder needs multiples of {shrinks}"
            )
        raw, (mean, std) = super().encode(x), self.bn()
        normalised = (_patches(raw.mean) - mean) / std
        log_variance = _patches(raw.log_variance) - 2 * jnp.log(std)
        return DiagonalGaussian(normalised.astype(x.dtype), log_variance.astype(x.dtype))

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        channels = self.config.patch_channels
        if z.ndim != 4 or z.shape[-1] != channels:
            raise InvalidArgumentError(f"latents must be [B, h, w, {channels}], not {list(z.shape)}")
        mean, std = self.bn()
        height, width = (PATCH * side for side in z.shape[1:3])
        patches = (z * std + mean).astype(z.dtype)
        return super().decode(unpack(patches.reshape(len(z), -1, channels), height, width))

    def constant_tensors(self) -> Mapping[str, Int[np.ndarray, ""]]:
        """PyTorch's count of batches in the running statistics: written as 0, never read."""
        return {"bn.num_batches_tracked": np.zeros((), np.int64)}

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        side = self.config.shrinks
        return (jax.ShapeDtypeStruct((1, side, side, self.config.in_channels), jnp.float32),)


def _patches(latents: Float[Array, "B h w c"]) -> Float[Array, "B h/2 w/2 4*c"]:
    """2x2 latents as one, the latent's channels the outer axis."""
    batch, height, width, channels = latents.shape
    return pack(latents).reshape(batch, height // PATCH, width // PATCH, PATCH**2 * channels)


PRESETS = {
    # 84,046,115 parameters, and 256 running statistics.
    "flux2-vae": AutoencoderKLFlux2Config(),
}
