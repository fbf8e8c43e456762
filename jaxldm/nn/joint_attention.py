"""Joint attention of text and image tokens, each with weights of its own (MM-DiT)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxldm.nn.attention import attend, projections
from jaxldm.nn.linear import Linear
from jaxldm.nn.normalization import RMSNorm
from jaxldm.nn.rotary import apply_rotary

OF_IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class JointAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V over [text, image], Q, K, V by separate weights for text and image.

    Esser et al. 2024 (SD3), section 4 and figure 2b; without text it is self-attention. Parameters as in
    diffusers' `Attention`: `to_q`, `to_k`, `to_v` and `to_out_0` for the image, `add_q_proj`, `add_k_proj`,
    `add_v_proj` and `to_add_out` for the text, `norm_q`, `norm_k`, `norm_added_q`, `norm_added_k`.

    Attributes:
        num_heads: heads, all channels of x split among them.
        qk_norm: an RMS norm over each head's queries and keys, with one scale for all heads (Dehghani et al.
            2023; SD3, section 5.3.2).
        project_out: False omits `to_out_0`, for blocks with one projection of attention and feed-forward
            (FLUX's single blocks).
        project_text_out: False omits `to_add_out`, for a last block, whose text is not used.
        use_bias: of all projections.
        image_first: [image, text] in place of [text, image], so that padding of the text is at the end. The
            result does not depend on it, where `rotary`, `mask` and `lengths` are in the same order.
    """

    num_heads: int
    qk_norm: bool = False
    project_out: bool = True
    project_text_out: bool = True
    use_bias: bool = True
    eps: float = 1e-6
    dtype: str = "float32"
    image_first: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        text: Float[Array, "B T C"] | None = None,
        rotary: tuple[Float[Array, "*#B M half"], Float[Array, "*#B M half"]] | None = None,
        mask: Bool[Array, "B M"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B N C"] | tuple[Float[Array, "B N C"], Float[Array, "B T C"]]:
        """Attend within and between text and image.

        Args:
            x: `[B, N, C]`, the image.
            text: `[B, T, C]`, the tokens before x (behind it with `image_first`); None: x alone.
            rotary: (cos, sin) of `rotary_embedding`, for all T + N tokens in their order; None: no rotation.
            mask: `[B, T + N]`, True for the tokens to attend to; None: all.
            lengths: `[B]`, how many tokens are attended to, from the first on; None: all.

        Returns:
            `[B, N, C]` of the image; with a text the pair of it and `[B, T, C]`.
        """
        parts = self._query_key_value(x, OF_IMAGE)
        if text is not None:
            of_text = self._query_key_value(text, OF_TEXT)
            order = (parts, of_text) if self.image_first else (of_text, parts)
            parts = [jnp.concatenate(pair, axis=1) for pair in zip(*order, strict=True)]
        query, key, value = parts
        if rotary is not None:
            query, key = (self._rotated(part, rotary) for part in (query, key))
        allowed = None if mask is None else mask[:, None, None, :]
        h = attend(self, query, key, value, self.num_heads, mask=allowed, key_lengths=lengths)
        length = 0 if text is None else text.shape[1]
        if self.image_first:
            out, text_out = h[:, : x.shape[1]], h[:, x.shape[1] :]
        else:
            out, text_out = h[:, length:], h[:, :length]
        if self.project_out:
            out = Linear(x.shape[-1], self.use_bias, self.dtype, name="to_out_0")(out)
        if text is None:
            return out
        if self.project_text_out:
            text_out = Linear(text.shape[-1], self.use_bias, self.dtype, name="to_add_out")(text_out)
        return out, text_out

    def _query_key_value(self, x: Float[Array, "B N C"], names: tuple[str, ...]) -> list[Array]:
        *to_qkv, norm_q, norm_k = names
        query, key, value = projections(x, to_qkv, x.shape[-1], use_bias=self.use_bias, dtype=self.dtype)
        if self.qk_norm:
            query = self._normalised(query, norm_q)
            key = self._normalised(key, norm_k)
        return [query, key, value]

    def _normalised(self, x: Float[Array, "B N C"], name: str) -> Float[Array, "B N C"]:
        return RMSNorm(self.eps, self.dtype, name=name)(self._heads(x)).reshape(x.shape)

    def _rotated(
        self, x: Float[Array, "B N C"], rotary: tuple[Float[Array, "*#B M half"], Float[Array, "*#B M half"]]
    ) -> Float[Array, "B N C"]:
        return apply_rotary(self._heads(x), *rotary).reshape(x.shape)

    def _heads(self, x: Float[Array, "B N C"]) -> Float[Array, "B N H D"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)
