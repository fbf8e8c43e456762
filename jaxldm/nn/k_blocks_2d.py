"""The blocks of the x2 latent upscaler: those of k-diffusion's U-Net, in diffusers `KDownBlock2D` and so on.

Every normalisation is modulated by the time (Dhariwal and Nichol 2021, section 4.3), groups have 32 channels,
and sizes change by a fixed low-pass filter (Karras et al. 2021, "Alias-Free GAN", use such).
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.attention import attend, projections
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import LayerNorm, group_norm

GROUP = 32  # channels that are normalised together


class AdaGroupNorm(nn.Module):
    """group_norm(x) (1 + scale) + shift, both linear in the time. `[B, H, W, C]` -> the same shape."""

    eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], temb: Float[Array, "B time"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        time = Linear(2 * channels, dtype=self.dtype, name="linear")(temb)[:, None, None, :]
        scale, shift = jnp.split(time, 2, axis=-1)
        groups = max(1, channels // GROUP)
        x = x.astype(compute_dtype(self.dtype))
        x = group_norm(x, jnp.ones(channels, x.dtype), jnp.zeros(channels, x.dtype), groups, self.eps)
        return x * (1 + scale) + shift


class KResnetBlock2D(nn.Module):
    """shortcut(x) + conv2(act(norm2(conv1(act(norm1(x)))))). `[B, H, W, C]` -> `[B, H, W, out_channels]`.

    Attributes:
        inner_channels: between the two convolutions.
    """

    out_channels: int
    inner_channels: int
    eps: float = 1e-5
    dropout: float = 0.0
    act: str = "gelu"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "B time"], train: bool = False
    ) -> Float[Array, "B H W out"]:
        act = ACTIVATIONS[self.act]
        h = act(AdaGroupNorm(self.eps, self.dtype, name="norm1")(x, temb))
        h = Conv2d(self.inner_channels, dtype=self.dtype, name="conv1")(h)
        h = act(AdaGroupNorm(self.eps, self.dtype, name="norm2")(h, temb))
        if self.dropout > 0.0:
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv2d(self.out_channels, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.out_channels:
            shortcut = Conv2d(
                self.out_channels, 1, padding=0, use_bias=False, dtype=self.dtype, name="conv_shortcut"
            )
            x = shortcut(x)
        return x.astype(h.dtype) + h


class KAttentionBlock(nn.Module):
    """x + attention among the pixels, where the level has it, then x + attention to the text.

    Attributes:
        head_dim: channels per head.
        self_attention: whether pixels attend to each other.
    """

    head_dim: int
    self_attention: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        temb: Float[Array, "B time"],
        context: Float[Array, "B T D"],
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Attend, and add the results to x.

        Args:
            x: `[B, H, W, C]`; the result has this shape.
            temb: `[B, time]`.
            context: `[B, T, D]`, the text.
            mask: `[B, T]`, nonzero for the tokens to attend to; None means all.

        Raises:
            InvalidArgumentError: channels that cannot be split into heads.
        """
        if x.shape[-1] % self.head_dim:
            raise InvalidArgumentError(
                f"{x.shape[-1]} channels cannot be split into heads of {self.head_dim}"
            )
        if self.self_attention:
            x = x + KAttention(self.head_dim, False, self.dtype, name="attn1")(self._tokens("norm1", x, temb))
        attention = KAttention(self.head_dim, True, self.dtype, name="attn2")
        return x + attention(self._tokens("norm2", x, temb), context, mask)

    def _tokens(self, name: str, x: Array, temb: Array) -> Float[Array, "B H W C"]:
        return AdaGroupNorm(dtype=self.dtype, name=name)(x, temb)


class KAttention(nn.Module):
    """Attention of pixels `[B, H, W, C]` to each other or to a text, whose states are normalised."""

    head_dim: int
    of_text: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        context: Float[Array, "B T D"] | None = None,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels)
        linear = {"use_bias": True, "dtype": self.dtype}
        if self.of_text:
            context = LayerNorm(dtype=self.dtype, name="norm_cross")(cast(Any, context))
            (query,) = projections(tokens, ("to_q",), channels, **linear)
            key, value = projections(context, ("to_k", "to_v"), channels, **linear)
        else:
            query, key, value = projections(tokens, ("to_q", "to_k", "to_v"), channels, **linear)
        allowed = None if mask is None else (mask != 0)[:, None, None, :]
        h = attend(self, query, key, value, channels // self.head_dim, mask=allowed)
        return Linear(channels, dtype=self.dtype, name="to_out_0")(h).reshape(x.shape)


def filtered_half(x: Float[Array, "B H W C"], mode: str = "reflect") -> Float[Array, "B h w C"]:
    """Every second pixel of x under the filter (1, 3, 3, 1) / 8 in both directions.

    Args:
        x: of even sides.
        mode: what is beyond the edges, "reflect" or "constant" (0).
    """
    for axis in (1, 2):
        half = x.shape[axis] // 2
        padded = jnp.pad(x, [(1, 1) if n == axis else (0, 0) for n in range(4)], mode=mode)
        parts = [_strided(padded, axis, start, half) for start in range(4)]
        x = (parts[0] + 3 * parts[1] + 3 * parts[2] + parts[3]) / 8
    return x


def filtered_double(x: Float[Array, "B H W C"], mode: str = "reflect") -> Float[Array, "B 2*H 2*W C"]:
    """x, zeros between its pixels, under the filter (1, 3, 3, 1) / 4 in both directions.

    Args:
        x: of any sides.
        mode: as in `filtered_half`.
    """
    for axis in (1, 2):
        side = x.shape[axis]
        padded = jnp.pad(x, [(1, 1) if n == axis else (0, 0) for n in range(4)], mode=mode)
        before, after = (
            padded.take(jnp.arange(start, start + side), axis=axis, mode="clip") for start in (0, 2)
        )
        pairs = jnp.stack([(before + 3 * x) / 4, (3 * x + after) / 4], axis=axis + 1)
        x = pairs.reshape(*(2 * n if place == axis else n for place, n in enumerate(x.shape)))
    return x


def _strided(x: Array, axis: int, start: int, count: int) -> Array:
    index = [slice(None)] * 4
    index[axis] = slice(start, start + 2 * count, 2)
    return x[tuple(index)]
