"""The levels of NCSN++ (Song et al. 2021, appendix H): in diffusers `SkipDownBlock2D`, `SkipUpBlock2D`.

Residual blocks change the size, under a fixed low-pass filter; next to the features goes a small picture,
which the down blocks see and to which the up blocks add. Sums are divided by sqrt(2) and keep their variance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.nn.activations import silu
from jaxldm.nn.attention import Attention2D
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.k_blocks_2d import filtered_double, filtered_half
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import GroupNorm

COLORS = 3  # of the picture that goes along
GROUPS_OF_ATTENTION = 32
SCALE = 2**0.5
# Beyond the edges is nothing, where the U-Net with K blocks mirrors.
_RESAMPLING: dict[str | None, Callable[[Any], Any]] = {
    None: lambda x: x,
    "down": functools.partial(filtered_half, mode="constant"),
    "up": functools.partial(filtered_double, mode="constant"),
}


def num_groups(channels: int) -> int:
    """Groups of a normalisation of so many channels: four in each, and at most 32."""
    return min(channels // 4, 32)


class SkipResnetBlock2D(nn.Module):
    """(shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))) + time)))) / sqrt(2). `[B, H, W, C]` in.

    Attributes:
        groups: of the first normalisation.
        resample: "down" or "up": what changes the size, before `conv1` and in the shortcut; the shortcut then
            has a convolution in any case.
    """

    out_channels: int
    groups: int
    eps: float = 1e-6
    dropout: float = 0.0
    resample: str | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "B time"], train: bool = False
    ) -> Float[Array, "B h w out"]:
        resized = _RESAMPLING[self.resample]
        h = resized(silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x)))
        h = Conv2d(self.out_channels, dtype=self.dtype, name="conv1")(h)
        h = (
            h
            + Linear(self.out_channels, dtype=self.dtype, name="time_emb_proj")(silu(temb))[:, None, None, :]
        )
        h = silu(GroupNorm(num_groups(self.out_channels), self.eps, self.dtype, name="norm2")(h))
        if self.dropout > 0.0:
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv2d(self.out_channels, dtype=self.dtype, name="conv2")(h)
        x = resized(x)
        if self.resample is not None or x.shape[-1] != self.out_channels:
            x = Conv2d(self.out_channels, 1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return (x.astype(h.dtype) + h) / SCALE


class _SkipLevel(nn.Module, kw_only=True):
    """What both directions have."""

    out_channels: int
    num_layers: int
    attention: bool = False
    attention_head_dim: int | None = 8
    resamples: bool = True
    eps: float = 1e-6
    dropout: float = 0.0
    dtype: str = "float32"

    def resnet(self, name: str, groups: int, resample: str | None = None) -> SkipResnetBlock2D:
        options = (groups, self.eps, self.dropout, resample, self.dtype)
        return SkipResnetBlock2D(self.out_channels, *options, name=name)

    def attend(self, name: str, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        options = (self.attention_head_dim, GROUPS_OF_ATTENTION, self.eps, self.dtype)
        return Attention2D(*options, name=name)(x) / SCALE if self.attention else x


class SkipDownBlock2D(_SkipLevel, kw_only=True):
    """A level on the way down."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        picture: Float[Array, "B H W 3"],
        temb: Float[Array, "B time"],
        train: bool = False,
    ) -> tuple[Float[Array, "B h w out"], tuple[Any, ...], Float[Array, "B h w 3"]]:
        """(the level below, the skip connections, the picture there)."""
        skips = []
        for i in range(self.num_layers):
            x = self.resnet(f"resnets_{i}", num_groups(x.shape[-1]))(x, temb, train)
            x = self.attend(f"attentions_{i}", x)
            skips.append(x)
        if self.resamples:
            x = self.resnet("resnet_down", num_groups(self.out_channels), "down")(x, temb, train)
            picture = _RESAMPLING["down"](picture)
            seen = Conv2d(self.out_channels, 1, padding=0, dtype=self.dtype, name="skip_conv")(picture)
            x = seen + x
            skips.append(x)
        return x, tuple(skips), picture


class SkipUpBlock2D(_SkipLevel, kw_only=True):
    """A level on the way up; attention, where it has it, comes once, behind all residual blocks."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        skips: tuple[Any, ...],
        picture: Float[Array, "B _ _ 3"] | None,
        temb: Float[Array, "B time"],
        train: bool = False,
    ) -> tuple[Float[Array, "B h w out"], Float[Array, "B H W 3"] | None]:
        """(the level above, the picture of this size).

        Args:
            x: of the level below.
            skips: one for each layer, the last one used first.
            picture: of the level below; None in the first.
            temb: embedding of the time.
            train: draw dropout from the rng stream "dropout".
        """
        for i in range(self.num_layers):
            skip = skips[-1 - i]
            both, own = x.shape[-1] + skip.shape[-1], x.shape[-1]
            # In levels with attention the published networks count the groups otherwise.
            groups = min(own + skip.shape[-1] // 4, 32) if self.attention else num_groups(both)
            x = self.resnet(f"resnets_{i}", groups)(jnp.concatenate([x, skip], axis=-1), temb, train)
        x = self.attend("attentions_0", x)
        if picture is not None:
            picture = _RESAMPLING["up"](picture)
        if self.resamples:
            groups = num_groups(self.out_channels)
            drawn = silu(GroupNorm(groups, self.eps, self.dtype, name="skip_norm")(x))
            drawn = Conv2d(COLORS, dtype=self.dtype, name="skip_conv")(drawn).astype(jnp.float32)
            picture = drawn if picture is None else picture + drawn
            x = self.resnet("resnet_up", groups, "up")(x, temb, train)
        return x, picture
