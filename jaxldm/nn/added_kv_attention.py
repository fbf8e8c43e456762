"""The attention of DeepFloyd IF's U-Nets: pixels attend to the text and to each other in one softmax."""

from __future__ import annotations

import dataclasses
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.attention import attend, projections
from jaxldm.nn.initialization import normal, parameter
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import GroupNorm, LayerNorm

EPS = 1e-5  # of the group norms, whatever `norm_eps` the U-Net has
CONTEXT_GROUPS = 32  # of the text's channels


@dataclasses.dataclass(frozen=True)
class AddedKVOptions:
    """The attention of one level of a U-Net.

    Attributes:
        head_dim: channels per head.
        only_cross_attention: pixels attend to the text alone.
        context_norm: normalise the text, in groups of its channels, over all tokens together.
    """

    head_dim: int
    only_cross_attention: bool = False
    context_norm: bool = False


class AddedKVAttention(nn.Module):
    """x + to_out(softmax(Q [K_text; K]^T / sqrt(d)) [V_text; V]), Q, K, V from group_norm(x).

    Nichol et al. 2021 (GLIDE), section 4.1; Saharia et al. 2022 (Imagen), section 2.4. Parameters as in
    diffusers' `Attention`: `group_norm`, `norm_cross`, `to_q`, `to_k`, `to_v`, `add_k_proj`, `add_v_proj`,
    `to_out_0`.
    """

    options: AddedKVOptions
    num_groups: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        context: Float[Array, "B T D"],
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Attend to the text and the pixels, and add the result to x.

        Args:
            x: `[B, H, W, C]`; the result has this shape.
            context: `[B, T, D]`, the text.
            mask: `[B, T]`, nonzero for the tokens to attend to; None means all.

        Raises:
            InvalidArgumentError: channels that cannot be split into heads, or a text into groups.
        """
        batch, height, width, channels = x.shape
        if channels % self.options.head_dim:
            raise InvalidArgumentError(
                f"{channels} channels cannot be split into heads of {self.options.head_dim}"
            )
        linear = {"use_bias": True, "dtype": self.dtype}
        context = self._normalised(context)
        key, value = projections(context, ("add_k_proj", "add_v_proj"), channels, **linear)
        h = GroupNorm(self.num_groups, EPS, self.dtype, name="group_norm")(x)
        h = h.reshape(batch, height * width, channels)
        allowed = None if mask is None else mask != 0
        if self.options.only_cross_attention:
            (query,) = projections(h, ("to_q",), channels, **linear)
        else:
            query, *own = projections(h, ("to_q", "to_k", "to_v"), channels, **linear)
            key, value = (jnp.concatenate(pair, axis=1) for pair in zip((key, value), own, strict=True))
            if mask is not None:
                allowed = jnp.pad(cast(Array, allowed), ((0, 0), (0, height * width)), constant_values=True)
        allowed = None if allowed is None else allowed[:, None, None, :]
        h = attend(self, query, key, value, channels // self.options.head_dim, mask=allowed)
        h = Linear(channels, dtype=self.dtype, name="to_out_0")(h)
        return x.astype(h.dtype) + h.reshape(x.shape)

    def _normalised(self, context: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Group norm of the text, with moments over the tokens too, padding included, as in training."""
        if not self.options.context_norm:
            return context
        if context.shape[-1] % CONTEXT_GROUPS:
            raise InvalidArgumentError(
                f"a text {context.shape[-1]} wide cannot be normalised in {CONTEXT_GROUPS} groups "
                "(cross_attention_norm)"
            )
        # The padding of a short text is one state many times over: centred first, because the norm's
        # one-pass variance loses what is small compared with the mean.
        groups = context.astype(jnp.float32).reshape(*context.shape[:2], CONTEXT_GROUPS, -1)
        centred = (groups - groups.mean((1, 3), keepdims=True)).reshape(context.shape)
        norm = GroupNorm(CONTEXT_GROUPS, EPS, self.dtype, name="norm_cross")
        return norm(centred[:, :, None, :])[:, :, 0, :]


class AttentionPooling(nn.Module):
    """A text as one vector: its mean plus a learned position attends to itself and to all tokens.

    `[B, T, D]` -> `[B, D]`. Radford et al. 2021 (CLIP), section 2.4, in the form of DeepFloyd IF. Parameters
    `positional_embedding` `[1, D]`, `q_proj`, `k_proj`, `v_proj`.
    """

    num_heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        width = x.shape[-1]
        x = x.astype(compute_dtype(self.dtype))
        position = parameter(self, "positional_embedding", normal(width**-0.5), (1, width))
        mean = x.astype(jnp.float32).mean(axis=1, keepdims=True).astype(x.dtype)
        mean = mean + position.astype(x.dtype)[None]
        tokens = jnp.concatenate([mean, x], axis=1)
        (query,) = projections(mean, ("q_proj",), width, use_bias=True, dtype=self.dtype)
        key, value = projections(tokens, ("k_proj", "v_proj"), width, use_bias=True, dtype=self.dtype)
        return attend(self, query, key, value, self.num_heads)[:, 0]


class TextPoolingEmbedding(nn.Module):
    """norm2(proj(pool(norm1(text)))), added to the time embedding. `[B, T, D]` -> `[B, dim]`.

    Saharia et al. 2022 (Imagen), section 2.3. All tokens count, padding too.

    Raises:
        InvalidArgumentError: a text that cannot be split into the heads.
    """

    dim: int
    num_heads: int = 64
    dtype: str = "float32"

    @nn.compact
    def __call__(self, text: Float[Array, "B T D"]) -> Float[Array, "B dim"]:
        if text.shape[-1] % self.num_heads:
            raise InvalidArgumentError(
                f"a text {text.shape[-1]} wide cannot be split into the {self.num_heads} heads of "
                "addition_embed_type_num_heads"
            )
        h = LayerNorm(dtype=self.dtype, name="norm1")(text)
        h = AttentionPooling(self.num_heads, self.dtype, name="pool")(h)
        h = Linear(self.dim, dtype=self.dtype, name="proj")(h)
        return LayerNorm(dtype=self.dtype, name="norm2")(h)
