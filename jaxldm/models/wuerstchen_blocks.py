"""The blocks of Wuerstchen's prior and decoder: ConvNeXt, timestep and attention. Pernias et al. 2024."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.activations import gelu, silu
from jaxldm.nn.attention import CrossAttention
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.embeddings import timestep_embedding
from jaxldm.nn.initialization import Initializer
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import GlobalResponseNorm, layer_norm


def ratio_embedding(t: Float[Array, " B"], dim: int) -> Float[Array, "B dim"]:
    """Sines, then cosines, of 10000 t for t in [0, 1], in float32: `timestep_embedding` of the published r.

    Angles reach 10^4, where float32 has three decimals: the fastest sines of two implementations differ by up
    to 1e-3.
    """
    return timestep_embedding(10000.0 * t.astype(jnp.float32), dim)


class ResBlock(nn.Module):
    """x + MLP([norm(depthwise(x)), skip]), the block of ConvNeXt V2 (Woo et al. 2023, figure 5)."""

    kernel_size: int = 3
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], skip: Float[Array, "B H W S"] | None = None, train: bool = False
    ) -> Float[Array, "B H W C"]:
        """Apply the block.

        Args:
            x: `[B, H, W, C]`.
            skip: `[B, H, W, S]`, further channels for the MLP, or None.
            train: draw dropout from the rng stream "dropout".
        """
        channels, size = x.shape[-1], self.kernel_size
        depthwise = Conv2d(channels, size, 1, size // 2, self.dtype, groups=channels, name="depthwise")
        h = layer_norm(depthwise(x))
        if skip is not None:
            h = jnp.concatenate([h, skip.astype(h.dtype)], axis=-1)
        h = Linear(4 * channels, dtype=self.dtype, name="channelwise_0")(h)
        h = GlobalResponseNorm(self.dtype, name="channelwise_2")(gelu(h))
        if self.dropout > 0.0:
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return x.astype(h.dtype) + Linear(channels, dtype=self.dtype, name="channelwise_4")(h)


class TimestepBlock(nn.Module):
    """x (1 + a) + b, (a, b) a linear map of the time embedding `[B, R]`. `[B, H, W, C]` in and out."""

    dtype: str = "float32"
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], time: Float[Array, "B R"]) -> Float[Array, "B H W C"]:
        inits: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        both = Linear(2 * x.shape[-1], dtype=self.dtype, name="mapper", **inits)(time)
        scale, shift = jnp.split(both[:, None, None, :], 2, axis=-1)
        return x.astype(both.dtype) * (1 + scale) + shift


class AttnBlock(nn.Module):
    """x + attention of the normalised pixels to themselves and the condition. `[B, H, W, C]` in and out.

    Keys and values are the pixels, then the condition `[B, T, D]` after SiLU and a linear map.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], condition: Float[Array, "B T D"], train: bool = False
    ) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        context = Linear(channels, dtype=self.dtype, name="kv_mapper_1")(silu(condition))
        pixels = layer_norm(x).reshape(batch, height * width, channels).astype(context.dtype)
        attention = CrossAttention(self.num_heads, self.dtype, use_bias=True, name="attention")
        h = attention(pixels, jnp.concatenate([pixels, context], axis=1))
        if self.dropout > 0.0:
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return x.astype(h.dtype) + h.reshape(x.shape)


def check_width(what: str, array: Array, wanted: int, model: str) -> None:
    """Raise `InvalidArgumentError` unless the last axis of an input has the wanted width."""
    if array.shape[-1] != wanted:
        raise InvalidArgumentError(
            f"{what} {array.shape}, {array.shape[-1]} wide on the last axis; this {model} takes {wanted}"
        )
