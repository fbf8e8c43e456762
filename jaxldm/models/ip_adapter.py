"""Pictures as prompts: what an IP-Adapter makes of an image encoder's output. Ye et al. 2023.

The submodules have the names of the published files, below `image_proj`. What the U-Net does with the tokens
is `jaxldm.nn.attention.ImagePromptAttention`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.nn.activations import gelu
from jaxldm.nn.attention import attend
from jaxldm.nn.initialization import normal, parameter
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import LayerNorm

PLAIN_TOKENS = 4  # that the plain adapter makes of a picture
HEAD_DIM = 64  # of the resampler of the plus adapter


class ImageProjection(nn.Module):
    """Of the plain adapter: norm(proj(embedding of a picture)), in four tokens. Ye et al. 2023, section 3.2.

    Call: `[B, in_features]`, `image_embeds` of the encoder -> `[B, 4, features]`.
    """

    in_features: int
    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image_embeds: Float[Array, "B D"]) -> Float[Array, "B tokens F"]:
        tokens = Linear(PLAIN_TOKENS * self.features, dtype=self.dtype, name="proj")(image_embeds)
        tokens = tokens.reshape(-1, PLAIN_TOKENS, self.features)
        return LayerNorm(dtype=self.dtype, name="norm")(tokens)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of an embedding."""
        return (jax.ShapeDtypeStruct((1, self.in_features), jnp.float32),)


class Resampler(nn.Module):
    """Of the plus adapter: learned queries that attend to all patches of a picture (Flamingo's resampler).

    Call: `[B, N, in_features]`, the encoder's states before its last layer -> `[B, num_queries, features]`.
    """

    in_features: int
    features: int
    width: int
    num_queries: int
    num_heads: int
    num_layers: int
    ffn_width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, states: Float[Array, "B N D"]) -> Float[Array, "B tokens F"]:
        latents = parameter(self, "latents", normal(self.width**-0.5), (1, self.num_queries, self.width))
        x = Linear(self.width, dtype=self.dtype, name="proj_in")(states)
        latents = jnp.broadcast_to(latents.astype(x.dtype), (len(x), *latents.shape[1:]))
        for i in range(self.num_layers):
            block = _ResamplerLayer(self.num_heads, self.ffn_width, self.dtype, name=f"layers_{i}")
            latents = block(x, latents)
        latents = Linear(self.features, dtype=self.dtype, name="proj_out")(latents)
        return LayerNorm(dtype=self.dtype, name="norm_out")(latents)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the states of a picture."""
        return (jax.ShapeDtypeStruct((1, 2, self.in_features), jnp.float32),)


class _ResamplerLayer(nn.Module):
    """Attention of the latents to the patches and to themselves, then a feed-forward part."""

    num_heads: int
    ffn_width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], latents: Float[Array, "B Q C"]) -> Float[Array, "B Q C"]:
        latents = latents + _ResamplerAttention(self.num_heads, self.dtype, name="0")(x, latents)
        return latents + _ResamplerFeedForward(self.ffn_width, self.dtype, name="1")(latents)


class _ResamplerAttention(nn.Module):
    """to_out(softmax(Q K^T / 8) V), Q of the latents, K and V of patches and latents, all normalised."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], latents: Float[Array, "B Q C"]) -> Float[Array, "B Q C"]:
        inner, options = self.num_heads * HEAD_DIM, {"use_bias": False, "dtype": self.dtype}
        x = LayerNorm(dtype=self.dtype, name="norm1")(x)
        latents = LayerNorm(dtype=self.dtype, name="norm2")(latents)
        query = Linear(inner, name="to_q", **options)(latents)
        both = jnp.concatenate([x, latents], axis=1)
        key, value = jnp.split(Linear(2 * inner, name="to_kv", **options)(both), 2, axis=-1)
        h = attend(self, query, key, value, self.num_heads)
        return Linear(latents.shape[-1], name="to_out", **options)(h)


class _ResamplerFeedForward(nn.Module):
    """W gelu(V norm(x)), without biases; named by their places in one sequence."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B Q C"]) -> Float[Array, "B Q C"]:
        options = {"use_bias": False, "dtype": self.dtype}
        h = Linear(self.width, name="1", **options)(LayerNorm(dtype=self.dtype, name="0")(x))
        return Linear(x.shape[-1], name="3", **options)(gelu(h))
