"""A KL autoencoder with a larger decoder that sees what inpainting keeps: `AsymmetricAutoencoderKL`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.autoencoder import DiagonalGaussian, split_moments
from jaxldm.models.autoencoder_kl import Encoder, ImageAutoencoderConfig, decode_levels
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.inputs import image_shape
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.resizing import resize_nearest

STRIDE = 16  # the encoder of the kept part has a layer for each of its halvings, and one more


@dataclasses.dataclass(frozen=True)
class AsymmetricAutoencoderKLConfig(ModelConfig):
    """Config of `AsymmetricAutoencoderKL`; names and defaults are those of diffusers."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    down_block_out_channels: tuple[int, ...] = (64,)
    layers_per_down_block: int = 1
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    up_block_out_channels: tuple[int, ...] = (64,)
    layers_per_up_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {"act_fn": "silu"}
    ignored: ClassVar = frozenset({"block_out_channels", "force_upcast"})  # diffusers adds them itself
    takes_mask: ClassVar[bool] = True  # its decoder

    def check_values(self) -> None:
        down, up = self.down_block_out_channels, self.up_block_out_channels
        check(
            len(down) == len(up),
            f"down_block_out_channels has {len(down)} levels, up_block_out_channels {len(up)}: they must be "
            "as many",
        )
        for side in ("down", "up"):
            self.of_side(side)

    def of_side(self, side: str) -> ImageAutoencoderConfig:
        """The config of an autoencoder that has the encoder ("down") or the decoder ("up") of this one."""
        channels, kinds = getattr(self, f"{side}_block_out_channels"), getattr(self, f"{side}_block_types")
        others: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        }
        names = ("in_channels", "out_channels", "latent_channels", "norm_num_groups", "scaling_factor")
        return ImageAutoencoderConfig(
            **{name: getattr(self, name) for name in (*names, "sample_size", "dtype")},
            **(others | {f"{side}_block_types": kinds}),
            block_out_channels=channels,
            layers_per_block=getattr(self, f"layers_per_{side}_block"),
        )

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The channels of each level, under the name that other autoencoders have."""
        return self.up_block_out_channels


class MaskConditionEncoder(nn.Module):
    """The kept pixels -> features of each size, the largest first. Layers relu'd in between."""

    channels: int
    deepest: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        features = []
        for i, channels in enumerate(self.widths):
            options: dict[str, Any] = {} if i < 2 else {"kernel_size": 4, "stride": 2}
            x = Conv2d(channels, dtype=self.dtype, name=f"layers_{i}", **options)(x)
            features.append(x)
            x = jax.nn.relu(x)
        return tuple(features)

    @property
    def widths(self) -> list[int]:
        """Channels of each layer: doubled from one to the next, up to the deepest."""
        widths, width, stride = [], self.channels, STRIDE
        while stride > 1:
            stride //= 2
            width = min(width, self.deepest)
            widths.append(width)
            last = self.deepest if stride == 1 else 2 * width
            width *= 2
        return [*widths, last]


class MaskConditionDecoder(nn.Module):
    """Latents -> images; what the mask keeps is put in from features of the image itself on every level."""

    config: ImageAutoencoderConfig

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "B h w c"],
        image: Float[Array, "B H W C"] | None = None,
        mask: Float[Array, "B H W 1"] | None = None,
    ) -> Float[Array, "B H W C"]:
        if image is None or mask is None:
            return decode_levels(self.config, z)
        channels, dtype = self.config.block_out_channels, self.config.dtype
        encode = MaskConditionEncoder(channels[0], channels[-1], dtype, name="condition_encoder")
        features = {kept.shape: kept for kept in encode((1 - mask) * image)}
        return decode_levels(self.config, z, blend=_blending(features, mask))


def _blending(features: dict, mask: Float[Array, "B H W 1"]) -> Callable[[Array], Array]:
    """Where the mask is 0, features of the kept pixels in place of those of the decoder."""

    def blend(h: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        if h.shape not in features:
            raise InvalidArgumentError(
                f"this decoder has features of {list(h.shape[1:])} and none of the kept pixels: its "
                "up_block_out_channels must double over four levels, as (192, 384, 768, 768)"
            )
        drawn = resize_nearest(mask, cast(tuple[int, int], h.shape[1:3])).astype(h.dtype)
        return h * drawn + features[h.shape] * (1 - drawn)

    return blend


class AsymmetricAutoencoderKL(nn.Module):
    """The encoder of Stable Diffusion's autoencoder with a decoder for inpainting. Zhu et al. 2023.

    `encode`: images `[B, H, W, in_channels]` in [-1, 1] -> `DiagonalGaussian` of moments, not scaled.
    `decode`: z, not scaled -> images, about [-1, 1]; with the image in [-1, 1] and a mask `[B, H, W, 1]`, 1
    where it is drawn again, the kept pixels come through as they are (arXiv:2306.04632). The call is
    decode(mean of encode, x, mask), to initialise parameters.
    """

    config: AsymmetricAutoencoderKLConfig

    def setup(self):
        config, one_by_one = self.config, {"kernel_size": 1, "padding": 0, "dtype": self.config.dtype}
        self.encoder = Encoder(config.of_side("down"), 2 * config.latent_channels)
        self.decoder = MaskConditionDecoder(config.of_side("up"))
        self.quant_conv = Conv2d(2 * config.latent_channels, **one_by_one)
        self.post_quant_conv = Conv2d(config.latent_channels, **one_by_one)

    def encode(self, x: Float[Array, "B H W C"]) -> DiagonalGaussian:
        chex.assert_shape(x, (None, None, None, self.config.in_channels))
        return split_moments(self.quant_conv(self.encoder(x)).astype(x.dtype))

    def decode(
        self,
        z: Float[Array, "B h w c"],
        image: Float[Array, "B H W C"] | None = None,
        mask: Float[Array, "B H W 1"] | None = None,
    ) -> Float[Array, "B H W C"]:
        chex.assert_shape(z, (None, None, None, self.config.latent_channels))
        return self.decoder(self.post_quant_conv(z), image, mask).astype(z.dtype)

    def __call__(
        self, x: Float[Array, "B H W C"], mask: Float[Array, "B H W 1"] | None = None
    ) -> Float[Array, "B H W out"]:
        return self.decode(self.encode(x).mean, x, mask)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes of images and masks that `init` traces the model with."""
        (image,) = image_shape(self.config)
        return image, jax.ShapeDtypeStruct((*image.shape[:3], 1), jnp.float32)


_PUBLISHED = AsymmetricAutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    down_block_out_channels=(128, 256, 512, 512),
    layers_per_down_block=2,
    up_block_types=("UpDecoderBlock2D",) * 4,
    up_block_out_channels=(192, 384, 768, 768),
    layers_per_up_block=3,
    sample_size=256,
)

PRESETS = {
    # For Stable Diffusion 1.x and 2.x: the decoder 1.5 times as large, or 2 times.
    "asymmetric-vae-x1.5": _PUBLISHED,
    "asymmetric-vae-x2": dataclasses.replace(
        _PUBLISHED, up_block_out_channels=(256, 512, 1024, 1024), layers_per_up_block=5
    ),
}
