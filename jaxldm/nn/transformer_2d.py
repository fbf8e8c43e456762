"""The spatial transformer of latent diffusion: attention among the pixels of an image, and to a text.

Rombach et al. 2022, appendix E.2.1. Submodules are named as in diffusers' `Transformer2DModel`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.nn.activations import gelu, gelu_tanh
from jaxldm.nn.attention import Context, CrossAttention, parts_of
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import GroupNorm, LayerNorm
from jaxldm.nn.token_merging import TokenMerging, around

ACTIVATIONS = ("geglu", "gelu", "gelu-approximate")
EPS = 1e-6  # of the group norm; the layer norms have 1e-5


@dataclasses.dataclass(frozen=True)
class TransformerOptions:
    """The transformers of one level of a U-Net.

    Attributes:
        num_heads: attention heads, each as wide as the channels allow.
        num_layers: `BasicTransformerBlock`s; or how many in each transformer of the level, which is for the
            level to choose from.
        linear_projection: `proj_in` and `proj_out` are linear layers (SD 2, SDXL) and not 1x1 convolutions
            (SD 1); the arithmetic is the same.
        only_cross_attention: the first attention of every block is to the text, too (the x4 upscaler).
        identity_attention: the first attention of every block is the identity, see `CrossAttention`.
        merging: tokens that are alike are one within the attention of every block.
    """

    num_heads: int
    num_layers: int | tuple[int, ...] = 1
    linear_projection: bool = False
    only_cross_attention: bool = False
    identity_attention: bool = False
    merging: TokenMerging | None = None

    def of_layer(self, index: int) -> TransformerOptions:
        """Those of the transformer of one layer."""
        if isinstance(self.num_layers, int):
            return self
        return dataclasses.replace(self, num_layers=self.num_layers[index])


class GEGLU(nn.Module):
    """a gelu(b), (a, b) = x W + c, with the exact GELU. `[B, N, C]` -> `[B, N, features]`.

    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """

    features: int
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N features"]:
        project = Linear(2 * self.features, self.use_bias, self.dtype, name="proj")
        value, gate = jnp.split(project(x), 2, axis=-1)
        return value * gelu(gate)


class GELU(nn.Module):
    """gelu(x W + c), exact or in its tanh form. `[B, N, C]` -> `[B, N, features]`."""

    features: int
    approximate: bool
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N features"]:
        project = Linear(self.features, self.use_bias, self.dtype, name="proj")
        return (gelu_tanh if self.approximate else gelu)(project(x))


class FeedForward(nn.Module):
    """A layer with activation, then a linear layer. `[B, N, C]` -> the same shape.

    Attributes:
        inner_dim: width in between; None: four times C.
        activation: of the first layer, as diffusers calls it: "geglu", "gelu" or, its tanh form,
            "gelu-approximate".
    """

    dtype: str = "float32"
    inner_dim: int | None = None
    use_bias: bool = True
    activation: str = "geglu"

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        up = GEGLU
        if one_of("activation", self.activation, ACTIVATIONS) != "geglu":
            up = functools.partial(GELU, approximate=self.activation == "gelu-approximate")
        options = {"use_bias": self.use_bias, "dtype": self.dtype}
        h = up(self.inner_dim or 4 * x.shape[-1], **options, name="net_0")(x)
        return Linear(x.shape[-1], **options, name="net_2")(h)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each x + f(layer_norm(x)). `[B, N, C]` in and out.

    Attributes:
        size: (rows, columns) of the tokens, where they are merged.
    """

    options: TransformerOptions
    dtype: str = "float32"
    size: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        context: Context,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B N C"]:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(dtype=self.dtype, name=name)

        heads, merging = self.options.num_heads, self.options.merging
        text, images = parts_of(context)
        first = (text, mask) if self.options.only_cross_attention else (None, None)
        itself = CrossAttention(heads, self.dtype, identity=self.options.identity_attention, name="attn1")
        merged, whole = (around(options, x, self.size) for options in (merging, None))
        x = x + merged(itself, norm("norm1")(x), *first)
        of_text = merged if merging and merging.cross_attention else whole
        attention = CrossAttention(heads, self.dtype, name="attn2")
        x = x + of_text(attention, norm("norm2")(x), text, mask, images)
        of_mlp = merged if merging and merging.mlp else whole
        return x + of_mlp(FeedForward(self.dtype, name="ff"), norm("norm3")(x))


class Transformer2D(nn.Module):
    """x + proj_out(blocks(proj_in(group_norm(x)))) over the pixels. `[B, H, W, C]` in and out."""

    options: TransformerOptions
    num_groups: int = 32
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        context: Context,
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Attend among the pixels and to the context.

        Args:
            x: `[B, H, W, C]`.
            context: `[B, T, D]`, for the cross-attention: the hidden states of a text encoder, or these with
                image prompts.
            mask: `[B, T]`, nonzero for the tokens to attend to; None means all.

        Raises:
            InvalidArgumentError: the channels cannot be split into the heads.
        """
        batch, height, width, channels = x.shape
        if channels % self.options.num_heads:
            raise InvalidArgumentError(
                f"{channels} channels cannot be split into {self.options.num_heads} heads"
            )

        def project(y: Array, name: str) -> Array:
            if self.options.linear_projection:
                return Linear(channels, dtype=self.dtype, name=name)(y)
            return Conv2d(channels, kernel_size=1, padding=0, dtype=self.dtype, name=name)(y)

        h = project(GroupNorm(self.num_groups, EPS, self.dtype, name="norm")(x), "proj_in")
        h = h.reshape(batch, height * width, channels)
        block = nn.remat(BasicTransformerBlock) if self.remat else BasicTransformerBlock
        for i in range(cast(int, self.options.num_layers)):
            h = block(self.options, self.dtype, (height, width), name=f"transformer_blocks_{i}")(
                h, context, mask
            )
        return x.astype(h.dtype) + project(h.reshape(batch, height, width, channels), "proj_out")
