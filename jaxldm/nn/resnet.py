"""Residual blocks and the up- and down-sampling between resolutions, named as in diffusers."""

from __future__ import annotations

from typing import cast

import chex
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import GroupNorm
from jaxldm.nn.spatial_norm import SpatialNorm


class ResnetBlock2D(nn.Module):
    """shortcut(x) + conv2(dropout(act(norm2(conv1(act(norm1(x))) + time)))). `[B, H, W, C]` in.

    Ho et al. 2020, appendix B. The time embedding enters as `time_emb_proj(act(temb))`: added before `norm2`
    ("default"), or as (1 + scale) and shift after it ("scale_shift", Dhariwal & Nichol 2021, section 4.3).
    "spatial" has no time: the latents of an autoencoder are in its place, for both norms, see `SpatialNorm`.
    Returns `[B, h, w, out_channels]`; the shortcut is a 1x1 convolution where the channels change.

    Attributes:
        act: a name in `ACTIVATIONS`.
        skip_time_act: the activation was applied to the time embedding before.
        output_scale_factor: the sum is divided by it: sqrt(2) keeps the variance (Song et al. 2021, appendix
            H).
        resample: "down" halves the image before `conv1` and in the shortcut, by the mean of 2x2 pixels
            (an odd side loses its last row), "up" doubles it by nearest neighbour (Song et al. 2021, as in
            BigGAN).
    """

    out_channels: int
    num_groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    time_scale_shift: str = "default"
    dtype: str = "float32"
    act: str = "silu"
    skip_time_act: bool = False
    output_scale_factor: float = 1.0
    resample: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "B ..."] | None = None, train: bool = False
    ) -> Float[Array, "B h w out"]:
        """Apply the block.

        Args:
            x: `[B, H, W, C]`.
            temb: `[B, time]`, or None for blocks without time (autoencoders); latents `[B, h, w, c]`.
            train: draw dropout from the rng stream "dropout".
        """
        chex.assert_rank(x, 4)
        act = ACTIVATIONS[self.act]
        norm = {"num_groups": self.num_groups, "eps": self.eps, "dtype": self.dtype}
        spatial = self.time_scale_shift == "spatial"

        def normalized(name: str, y: Array) -> Array:
            if spatial:
                return SpatialNorm(dtype=self.dtype, name=name)(y, cast(Array, temb))
            return GroupNorm(**norm, name=name)(y)

        h = act(normalized("norm1", x))
        if self.resample == "down":
            x, h = average_2x2(x), average_2x2(h)
        doubled = self.resample == "up"  # h by the convolution itself
        x = upsample_nearest(x) if doubled else x
        h = Conv2d(self.out_channels, dtype=self.dtype, doubled=doubled, name="conv1")(h)
        scale_shift = self.time_scale_shift == "scale_shift"
        time = None
        if temb is not None and not spatial:
            features = 2 * self.out_channels if scale_shift else self.out_channels
            active = temb if self.skip_time_act else act(temb)
            time = Linear(features, dtype=self.dtype, name="time_emb_proj")(active)[:, None, None, :]
        if time is not None and not scale_shift:
            h = h + time
        h = normalized("norm2", h)
        if time is not None and scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = h * (1 + scale) + shift
        h = act(h)
        if self.dropout > 0.0:
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv2d(self.out_channels, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.out_channels:
            x = Conv2d(self.out_channels, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        h = x.astype(h.dtype) + h
        return h if self.output_scale_factor == 1.0 else h / self.output_scale_factor


class Downsample2D(nn.Module):
    """3x3 convolution with stride 2. `[B, H, W, C]` -> `[B, h, w, C]`.

    `padding` 1 gives h = ceil(H / 2) (U-Nets); 0 pads one row below and one column to the right only, h =
    floor(H / 2) (autoencoders of latent diffusion).
    """

    padding: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        sides = (1, 1) if self.padding == 1 else (0, 1)
        return Conv2d(x.shape[-1], stride=2, padding=sides, dtype=self.dtype, name="conv")(x)


def average_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Every 2x2 square becomes its mean, in float32; the last row or column of an odd side is dropped."""
    batch, height, width, channels = x.shape
    squares = x[:, : height // 2 * 2, : width // 2 * 2].astype(jnp.float32)
    squares = squares.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return squares.mean((2, 4)).astype(x.dtype)


def upsample_nearest(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Every pixel becomes a 2x2 square of itself."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class Upsample2D(nn.Module):
    """A 3x3 convolution of the image doubled by nearest neighbour, `[B, H, W, C]` -> `[B, 2H, 2W, C]`.

    `output_size` (h, w), each side 2H or 2H - 1, is the size of the skip connection that joins this output:
    a U-Net that halves 7 to 4 must return to 7. Nearest interpolation to 2H - 1 is the doubled image
    without its last row.

    Raises:
        InvalidArgumentError: another `output_size`.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], output_size: tuple[int, int] | None = None
    ) -> Float[Array, "B h w C"]:
        height, width, channels = x.shape[1:]
        if output_size is None or tuple(output_size) == (2 * height, 2 * width):
            return Conv2d(channels, dtype=self.dtype, doubled=True, name="conv")(x)
        for side, wanted in zip((height, width), output_size, strict=True):
            if not 2 * side - 1 <= wanted <= 2 * side:
                size = "x".join(map(str, output_size))
                raise InvalidArgumentError(
                    f"{height}x{width} pixels cannot be doubled to {size}: without padding "
                    "(downsample_padding 0) the sides must be even on every level"
                )
        up = upsample_nearest(x)[:, : output_size[0], : output_size[1], :]
        return Conv2d(channels, dtype=self.dtype, name="conv")(up)
