"""BERT, and sentence embeddings made with it: all-MiniLM-L6-v2."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.arguments import array, check_dims, checked
from jaxldm.errors import one_of
from jaxldm.models.config import check_heads
from jaxldm.models.text_encoder import (
    POSITION_NUMBERS,
    TextEncoding,
    TransformersConfig,
    check_tokens,
    padding_mask,
    token_shapes,
)
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.initialization import normal, zeros
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import LayerNorm
from jaxldm.nn.transformer_encoder import ProjectedAttention


@dataclasses.dataclass(frozen=True)
class BertConfig(TransformersConfig):
    """Config of `BertModel`; names and defaults are those of transformers."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    dtype: str = "float32"

    model_type: ClassVar[str] = "bert"
    fixed: ClassVar = {**TransformersConfig.fixed, "position_embedding_type": "absolute"}

    def check_values(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)
        one_of("activation", self.hidden_act, ACTIVATIONS)
        compute_dtype(self.dtype)


def _dense(config: BertConfig, features: int) -> Linear:
    return Linear(features, True, config.dtype, normal(config.initializer_range), zeros, name="dense")


def _norm(config: BertConfig) -> LayerNorm:
    return LayerNorm(config.layer_norm_eps, config.dtype, name="LayerNorm")


class BertEmbeddings(nn.Module):
    """Tokens `[B, T]` -> norm(token + position + token type), `[B, T, D]`; the token type is 0."""

    config: BertConfig

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        config = self.config

        def embed(rows: int, indices: Array, name: str) -> Array:
            init = normal(config.initializer_range)
            return Embedding(rows, config.hidden_size, config.dtype, init, name=name)(indices)

        x = embed(config.vocab_size, input_ids, "word_embeddings")
        x = x + embed(config.type_vocab_size, jnp.zeros((1, 1), jnp.int32), "token_type_embeddings")
        positions = jnp.arange(input_ids.shape[1])[None]
        return _norm(config)(x + embed(config.max_position_embeddings, positions, "position_embeddings"))


class BertOutput(nn.Module):
    """norm(x + dense(h)), the end of each half of a layer. h `[B, T, in]`, x `[B, T, D]` -> `[B, T, D]`."""

    config: BertConfig

    @nn.compact
    def __call__(self, h: Float[Array, "B T in"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return _norm(self.config)(x + _dense(self.config, self.config.hidden_size)(h))


class BertAttention(nn.Module):
    """norm(x + attention(x)). `[B, T, D]` -> the same shape."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array | None) -> Float[Array, "B T D"]:
        config = self.config
        names, inits = ("query", "key", "value"), (normal(config.initializer_range),) * 3
        attention = ProjectedAttention(names, config.num_attention_heads, config.dtype, inits, name="self")
        return BertOutput(config, name="output")(attention(x, mask=mask), x)


class BertIntermediate(nn.Module):
    """act(dense(x)). `[B, T, D]` -> `[B, T, intermediate_size]`."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        return ACTIVATIONS[self.config.hidden_act](_dense(self.config, self.config.intermediate_size)(x))


class BertLayer(nn.Module):
    """Attention and feed forward, each normalised after its sum. Devlin et al. 2019, section 3."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array | None) -> Float[Array, "B T D"]:
        x = BertAttention(self.config, name="attention")(x, mask)
        return BertOutput(self.config, name="output")(
            BertIntermediate(self.config, name="intermediate")(x), x
        )


class BertEncoder(nn.Module):
    """The layers in sequence. `[B, T, D]` -> all states, the input first."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array | None) -> tuple[Float[Array, "B T D"], ...]:
        states = [x]
        for index in range(self.config.num_hidden_layers):
            states.append(BertLayer(self.config, name=f"layer_{index}")(states[-1], mask))
        return tuple(states)


class BertPooler(nn.Module):
    """tanh(dense(the first token's state)). `[B, T, D]` -> `[B, D]`."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return jnp.tanh(_dense(self.config, self.config.hidden_size)(x[:, 0]))


class BertModel(nn.Module):
    """BERT. Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 3.

    Call: input_ids int32 `[B, T]`, one sentence a row; attention_mask `[B, T]`, 0 at padding, or None ->
    `TextEncoding` in `config.dtype` without `text_embeds`. `last_hidden_state` is `hidden_states[-1]`.

    Raises:
        InvalidArgumentError: more tokens than positions.
    """

    config: BertConfig

    ignored_tensors: ClassVar[tuple[str, ...]] = POSITION_NUMBERS

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        config = self.config
        check_tokens(input_ids, config.max_position_embeddings)
        embedded = BertEmbeddings(config, name="embeddings")(input_ids)
        states = BertEncoder(config, name="encoder")(embedded, padding_mask(attention_mask))
        return TextEncoding(states[-1], BertPooler(config, name="pooler")(states[-1]), None, states)

    def example_inputs(self) -> tuple:
        """The shape of the tokens that `init` traces the model with."""
        return token_shapes(min(8, self.config.max_position_embeddings))


@checked(
    last_hidden_state=array("floating", "[B, T, D]", axes=3), attention_mask=array("any", "[B, T]", axes=2)
)
def sentence_embedding(
    last_hidden_state: Float[Array, "B T D"], attention_mask: Int[Array, "B T"]
) -> Float[Array, "B D"]:
    """A unit vector per sentence: the normalised mean of its tokens' states. float32 `[B, D]`.

    Reimers & Gurevych 2019, "Sentence-BERT", section 3. The product of two is their cosine similarity.

    >>> import jax.numpy as jnp
    >>> sentence_embedding(jnp.array([[[3.0, 4.0], [9.0, 9.0]]]), jnp.array([[1, 0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    check_dims(last_hidden_state=(last_hidden_state, "B T D"), attention_mask=(attention_mask, "B T"))
    weight = (attention_mask != 0).astype(jnp.float32)[:, :, None]
    mean = (last_hidden_state.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1e-9)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


PRESETS = {
    # all-MiniLM-L6-v2: 22,713,216 parameters. Its embeddings do not use the pooler (147,840 of them).
    "minilm": BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
}
