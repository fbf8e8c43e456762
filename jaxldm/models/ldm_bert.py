"""The text encoder of latent diffusion's first text-to-image model: BERT's tokens, a transformer of its own.

Rombach et al. 2022, section 4.3.1 and appendix E.2.1; trained together with the U-Net.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxldm.errors import one_of
from jaxldm.models.config import check
from jaxldm.models.text_encoder import (
    TextEncoding,
    TransformersConfig,
    check_tokens,
    padding_mask,
    token_shapes,
)
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.attention import attend
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import LayerNorm


@dataclasses.dataclass(frozen=True)
class LDMBertConfig(TransformersConfig):
    """Config of `LDMBertModel`; names and defaults are those of diffusers.

    Attributes:
        head_dim: of each head; all heads together may be narrower than the states.
    """

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    activation_function: str = "gelu"
    d_model: int = 1280
    pad_token_id: int | None = 0
    dtype: str = "float32"

    package: ClassVar[str | None] = "latent_diffusion"
    model_type: ClassVar[str] = "ldmbert"
    ignored: ClassVar = TransformersConfig.ignored | {
        *("encoder_layerdrop", "activation_dropout", "init_std", "scale_embedding", "num_hidden_layers"),
        "hidden_size",
    }

    def check_values(self) -> None:
        for name in ("encoder_layers", "encoder_attention_heads", "head_dim", "d_model"):
            check(getattr(self, name) > 0, f"{name} must be 1 or more")
        one_of("activation", self.activation_function, ACTIVATIONS)
        compute_dtype(self.dtype)


class LDMBertAttention(nn.Module):
    """Self-attention, its projections without biases but for the last. `[B, T, D]` -> the same shape."""

    config: LDMBertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 1 T"] | None) -> Array:
        config = self.config
        heads = config.encoder_attention_heads
        query, key, value = (
            Linear(heads * config.head_dim, use_bias=False, dtype=config.dtype, name=f"{name}_proj")(x)
            for name in "qkv"
        )
        h = attend(self, query, key, value, heads, mask=mask)
        return Linear(config.d_model, dtype=config.dtype, name="out_proj")(h)


class LDMBertEncoderLayer(nn.Module):
    """x + attention(norm(x)), then + fc2(act(fc1(norm(x)))). `[B, T, D]` -> the same shape."""

    config: LDMBertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 1 T"] | None) -> Array:
        config = self.config
        h = LayerNorm(1e-5, config.dtype, name="self_attn_layer_norm")(x)
        x = x + LDMBertAttention(config, name="self_attn")(h, mask)
        h = LayerNorm(1e-5, config.dtype, name="final_layer_norm")(x)
        h = Linear(config.encoder_ffn_dim, dtype=config.dtype, name="fc1")(h)
        h = ACTIVATIONS[config.activation_function](h)
        return x + Linear(config.d_model, dtype=config.dtype, name="fc2")(h)


class LDMBertEncoder(nn.Module):
    """Tokens -> the states of all layers, the embeddings first and the last one normalised at the end."""

    config: LDMBertConfig

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B T"], mask: Array | None) -> tuple[Array, ...]:
        config = self.config

        def embed(rows: int, indices: Array, name: str) -> Array:
            return Embedding(rows, config.d_model, config.dtype, name=name)(indices)

        places = jnp.arange(input_ids.shape[1])[None]
        x = embed(config.vocab_size, input_ids, "embed_tokens")
        states = [x + embed(config.max_position_embeddings, places, "embed_positions")]
        for index in range(config.encoder_layers):
            states.append(LDMBertEncoderLayer(config, name=f"layers_{index}")(states[-1], mask))
        return (*states, LayerNorm(1e-5, config.dtype, name="layer_norm")(states[-1]))


class LDMBertModel(nn.Module):
    """The text encoder of the first text-to-image latent diffusion model.

    Call: input_ids int32 `[B, T]`, T up to 77; attention_mask `[B, T]`, 0 at padding, or None, as in the
    published pipeline -> `TextEncoding` without `pooled` and `text_embeds`. `hidden_states` are not
    normalised, `last_hidden_state` is. The published table to logits is a parameter, and not used.

    Raises:
        InvalidArgumentError: more tokens than positions.
    """

    config: LDMBertConfig

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        config = self.config
        check_tokens(input_ids, config.max_position_embeddings)
        *states, last = LDMBertEncoder(config, name="model")(input_ids, padding_mask(attention_mask))
        Linear(config.vocab_size, dtype=config.dtype, name="to_logits")(last[:, :1])
        return TextEncoding(last, None, None, tuple(states))

    def example_inputs(self) -> tuple:
        """The shape of the tokens that `init` traces the model with."""
        return token_shapes(min(8, self.config.max_position_embeddings))


PRESETS = {
    # 581,994,042 parameters.
    "ldm-bert": LDMBertConfig(),
}
