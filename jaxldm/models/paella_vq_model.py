"""Wuerstchen's stage A: the small vector-quantised autoencoder of Paella."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.vq_model import VectorQuantizer
from jaxldm.models.wuerstchen_blocks import check_width
from jaxldm.nn.activations import gelu
from jaxldm.nn.convolution import Conv2d, ConvTranspose4x4
from jaxldm.nn.initialization import parameter, zeros
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import RunningBatchNorm, layer_norm
from jaxldm.nn.pixel_shuffle import pixel_shuffle, pixel_unshuffle


@dataclasses.dataclass(frozen=True)
class PaellaVQModelConfig(ModelConfig):
    """Config of `PaellaVQModel`; names and defaults are those of diffusers.

    Attributes:
        up_down_scale_factor: side of the squares of pixels that the first level takes as one.
        levels: resolutions, each half of the one before.
        embed_dim: channels of the last level.
        bottleneck_blocks: blocks of the decoder's last level.
        scale_factor: latents are scale_factor times the samples of the diffusion model.
    """

    in_channels: int = 3
    out_channels: int = 3
    up_down_scale_factor: int = 2
    levels: int = 2
    bottleneck_blocks: int = 12
    embed_dim: int = 384
    latent_channels: int = 4
    num_vq_embeddings: int = 8192
    scale_factor: float = 0.3764
    dtype: str = "float32"

    published: ClassVar[bool] = True
    package: ClassVar[str] = "wuerstchen"
    pixels_from_zero: ClassVar[bool] = True  # images in [0, 1]

    def check_values(self) -> None:
        sizes = ("levels", "bottleneck_blocks", "num_vq_embeddings", "up_down_scale_factor")
        for name in sizes:
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        check(
            self.embed_dim % 2 ** (self.levels - 1) == 0,
            f"embed_dim {self.embed_dim} cannot be halved over {self.levels} levels",
        )
        compute_dtype(self.dtype)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, those next to the pixels first."""
        return tuple(self.embed_dim // 2**level for level in reversed(range(self.levels)))

    @property
    def scaling_factor(self) -> float:
        """The factor of the latents for the diffusion model, under the name that other autoencoders have."""
        return 1 / self.scale_factor

    @property
    def shrinks(self) -> int:
        """Downsampling factor of each side: 4 as published."""
        return self.up_down_scale_factor * 2 ** (self.levels - 1)


class MixingResidualBlock(nn.Module):
    """x + g_2 depthwise(n(x) (1 + g_0) + g_1), then x + g_5 MLP(n(x) (1 + g_3) + g_4), n a layer norm.

    From Paella (Rampas et al. 2022, arXiv:2211.07292). The six numbers g, parameter `gammas`, start at 0: a
    block starts as the identity.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        gammas = parameter(self, "gammas", zeros, (6,)).astype(compute_dtype(self.dtype))
        h = layer_norm(x) * (1 + gammas[0]) + gammas[1]
        h = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        depthwise = Conv2d(channels, padding=0, dtype=self.dtype, groups=channels, name="depthwise_1")
        x = x + gammas[2] * depthwise(h)
        h = layer_norm(x) * (1 + gammas[3]) + gammas[4]
        h = gelu(Linear(4 * channels, dtype=self.dtype, name="channelwise_0")(h))
        return x + gammas[5] * Linear(channels, dtype=self.dtype, name="channelwise_2")(h)


class _Latents(nn.Module):
    """A 1x1 convolution without bias to the latents, brought to mean 0 and variance 1."""

    config: PaellaVQModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w c"]:
        config = self.config
        x = Conv2d(config.latent_channels, 1, 1, 0, config.dtype, use_bias=False, name="0")(x)
        return RunningBatchNorm(config.dtype, name="1")(x)


class _Features(nn.Module):
    """A 1x1 convolution from the latents to the widest level."""

    config: PaellaVQModelConfig

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h w C"]:
        return Conv2d(self.config.embed_dim, 1, 1, 0, self.config.dtype, name="0")(z)


class PaellaVQModel(nn.Module):
    """Stage A of Wuerstchen: the VQ-GAN of Paella. Pernias et al. 2024, section 3.1.

    `encode`: images `[B, H, W, in_channels]` in [0, 1], sides divisible by `config.shrinks` -> latents
    `[B, h, w, latent_channels]`, not quantised and not scaled. `decode`: such latents -> images, about
    [0, 1]; `quantize` replaces each by the nearest entry of the codebook, which Wuerstchen does not do. The
    call is decode(encode(x), quantize=True), to initialise parameters.

    Raises:
        InvalidArgumentError: sides that are not divisible, another number of channels.
    """

    config: PaellaVQModelConfig

    @property
    def untrained(self) -> tuple[str, ...]:
        """Parameters that are not trained: the running statistics."""
        norm = f"down_blocks_{2 * self.config.levels - 1}/1"
        return (f"{norm}/running_mean", f"{norm}/running_var")

    def setup(self):
        config, widths = self.config, self.config.widths
        one_by_one = {"kernel_size": 1, "padding": 0, "dtype": config.dtype}
        self.in_block_1 = Conv2d(widths[0], **one_by_one)
        down: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                down.append(Conv2d(width, 4, 2, 1, config.dtype))
            down.append(MixingResidualBlock(config.dtype))
        self.down_blocks = [*down, _Latents(config)]
        self.vquantizer = VectorQuantizer(config.num_vq_embeddings, config.latent_channels)
        up: list[nn.Module] = [_Features(config)]
        for level in reversed(range(config.levels)):
            count = config.bottleneck_blocks if level == config.levels - 1 else 1
            up += [MixingResidualBlock(config.dtype) for _ in range(count)]
            if level:
                up.append(ConvTranspose4x4(widths[level - 1], config.dtype))
        self.up_blocks = up
        self.out_block_0 = Conv2d(config.out_channels * config.up_down_scale_factor**2, **one_by_one)

    def encode(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        config = self.config
        check_width("images", x, config.in_channels, "autoencoder")
        height, width = x.shape[1:3]
        if height % config.shrinks or width % config.shrinks:
            raise InvalidArgumentError(
                f"images of {height}x{width}: this autoencoder needs multiples of {config.shrinks}"
            )
        h = self.in_block_1(pixel_unshuffle(x, config.up_down_scale_factor))
        for block in self.down_blocks:
            h = block(h)
        return h.astype(x.dtype)

    def decode(self, z: Float[Array, "B h w c"], quantize: bool = False) -> Float[Array, "B H W C"]:
        config = self.config
        check_width("latents", z, config.latent_channels, "autoencoder")
        h = self.vquantizer(z) if quantize else z
        for block in self.up_blocks:
            h = block(h)
        return pixel_shuffle(self.out_block_0(h), config.up_down_scale_factor).astype(z.dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        return self.decode(self.encode(x), quantize=True)

    def constant_tensors(self) -> Mapping[str, Int[np.ndarray, ""]]:
        """PyTorch's count of batches in the running statistics: written as 0, never read."""
        last = 2 * self.config.levels - 1
        return {f"down_blocks.{last}.1.num_batches_tracked": np.zeros((), np.int64)}

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        side = self.config.shrinks
        return (jax.ShapeDtypeStruct((1, side, side, self.config.in_channels), jnp.float32),)


PRESETS = {
    # 18,406,894 parameters, and 8 running statistics.
    "wuerstchen-vqgan": PaellaVQModelConfig(),
}
