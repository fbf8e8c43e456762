"""The levels of U-Nets and convolutional autoencoders: residual blocks, attention, a change of size.

One class per direction serves what diffusers calls DownBlock2D, AttnDownBlock2D, DownEncoderBlock2D and
UpBlock2D, AttnUpBlock2D, UpDecoderBlock2D: they differ only in attention, the time embedding and skip
connections.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.nn.attention import Attention2D
from jaxldm.nn.resnet import Downsample2D, ResnetBlock2D, Upsample2D


class _Level(nn.Module):
    """What the levels share: how to make their residual and attention blocks under the published names."""

    out_channels: int
    num_layers: int
    num_groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    time_scale_shift: str = "default"
    attention: bool = False
    attention_head_dim: int | None = None
    dtype: str = "float32"

    def resnet(self, index: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            self.out_channels,
            self.num_groups,
            self.eps,
            self.dropout,
            self.time_scale_shift,
            self.dtype,
            name=f"resnets_{index}",
        )

    def attend(self, index: int) -> Attention2D:
        return Attention2D(
            self.attention_head_dim, self.num_groups, self.eps, self.dtype, name=f"attentions_{index}"
        )


class DownBlock2D(_Level):
    """`num_layers` residual blocks, each followed by attention if asked, then a stride-2 convolution.

    `[B, H, W, C]` -> (`[B, h, w, out_channels]`, the outputs of every layer and of the downsampler: the
    skip connections).
    """

    add_downsample: bool = True
    downsample_padding: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "B time"] | None = None, train: bool = False
    ) -> tuple[Float[Array, "B h w out"], tuple[Array, ...]]:
        skips = []
        for i in range(self.num_layers):
            x = self.resnet(i)(x, temb, train)
            if self.attention:
                x = self.attend(i)(x)
            skips.append(x)
        if self.add_downsample:
            x = Downsample2D(self.downsample_padding, self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, tuple(skips)


class UpBlock2D(_Level):
    """`num_layers` residual blocks, each fed a skip connection too, then nearest upsampling.

    Args of the call:
      skips: one array per layer, the last one first used; None for autoencoders, which have none.
      output_size: (h, w) to upsample to, see `Upsample2D`.
    """

    add_upsample: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        skips: tuple[Array, ...] | None = None,
        temb: Float[Array, "B time"] | None = None,
        train: bool = False,
        output_size: tuple[int, int] | None = None,
    ) -> Float[Array, "B h w out"]:
        for i in range(self.num_layers):
            if skips is not None:
                x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = self.resnet(i)(x, temb, train)
            if self.attention:
                x = self.attend(i)(x)
        if self.add_upsample:
            x = Upsample2D(self.dtype, name="upsamplers_0")(x, output_size)
        return x


class MidBlock2D(nn.Module):
    """Residual block, attention, residual block. `[B, H, W, C]` -> the same shape.

    `attention_groups` None leaves the attention without its group normalisation.
    """

    num_groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    time_scale_shift: str = "default"
    attention: bool = True
    attention_head_dim: int | None = None
    attention_groups: int | None = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "B time"] | None = None, train: bool = False
    ) -> Float[Array, "B H W C"]:
        def resnet(name: str) -> ResnetBlock2D:
            return ResnetBlock2D(
                x.shape[-1],
                self.num_groups,
                self.eps,
                self.dropout,
                self.time_scale_shift,
                self.dtype,
                name=name,
            )

        x = resnet("resnets_0")(x, temb, train)
        if self.attention:
            x = Attention2D(
                self.attention_head_dim, self.attention_groups, self.eps, self.dtype, name="attentions_0"
            )(x)
        return resnet("resnets_1")(x, temb, train)
