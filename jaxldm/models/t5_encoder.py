"""The encoder of T5: the text encoder of SD3, FLUX, PixArt and DeepFloyd."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxldm.errors import one_of
from jaxldm.models.config import check
from jaxldm.models.text_encoder import (
    GENERIC,
    TextEncoding,
    TransformersConfig,
    check_tokens,
    padding_mask,
    token_shapes,
)
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.attention import attend
from jaxldm.nn.initialization import normal
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import RMSNorm

FEED_FORWARDS = {"relu": "relu", "gated-gelu": "gelu_new"}  # -> activation; T5's GELU is the tanh form


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig(TransformersConfig):
    """Config of `T5EncoderModel`; names and defaults are those of transformers' `T5Config`.

    Attributes:
        feed_forward_proj: "gated-gelu" in T5 v1.1 and later, "relu" in the first T5.
        d_kv: channels per head; num_heads * d_kv need not be d_model.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    dtype: str = "float32"

    model_type: ClassVar[str] = "t5"
    # Keys of the decoder, and those implied by feed_forward_proj.
    ignored: ClassVar = frozenset(GENERIC.split()) | {
        "num_decoder_layers",
        "scale_decoder_outputs",
        "n_positions",
        "dense_act_fn",
        "is_gated_act",
    }

    def check_values(self) -> None:
        one_of("feed_forward_proj", self.feed_forward_proj, FEED_FORWARDS)
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        check(
            buckets >= 4 and buckets % 4 == 0,
            f"relative_attention_num_buckets must be a multiple of 4, got {buckets}",
        )
        check(
            farthest > buckets // 4,
            f"relative_attention_max_distance {farthest} is too small for {buckets} buckets",
        )
        compute_dtype(self.dtype)


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "T T"]:
    """The bucket of the distance from each query to each key: int32 `[T, T]`, on the host.

    Raffel et al. 2020, section 2.1: half the buckets are for keys after the query. In each half, one bucket
    per distance for the first half of them, then logarithmically wider ones up to `max_distance`, the last
    for all beyond. In float32 as in training: at the edges rounding decides.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    scale = np.float32(math.log(max_distance / exact))
    wide = np.log(far / np.float32(exact)) / scale * np.float32(half - exact)
    wide = np.minimum(exact + np.maximum(wide, 0).astype(np.int32), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), wide)
    return (bucket + half * (distance > 0)).astype(np.int32)


class T5Attention(nn.Module):
    """Self-attention without 1/sqrt(d) and biases; the first layer's has the position bias that all share.

    x `[B, T, D]`, in `config.dtype` -> the same shape in float32, and the bias `[1, heads, T, T]`.
    """

    config: T5EncoderConfig
    has_relative_attention_bias: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], bias: Array | None, mask: Array | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "1 H T T"]]:
        config = self.config
        inner = config.num_heads * config.d_kv
        if self.has_relative_attention_bias:
            buckets = relative_position_buckets(
                x.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
            )
            shape = (config.relative_attention_num_buckets, config.num_heads)
            init = normal(config.d_model**-0.5)
            table = Embedding(*shape, embedding_init=init, name="relative_attention_bias")
            bias = table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]

        def project(name: str, spread: float) -> Array:
            return Linear(inner, False, config.dtype, normal(spread), name=name)(x)

        query = project("q", (config.d_model * config.d_kv) ** -0.5)
        key, value = project("k", config.d_model**-0.5), project("v", config.d_model**-0.5)
        h = attend(self, query, key, value, config.num_heads, scale=1.0, bias=bias, mask=mask)
        out = Linear(config.d_model, False, config.dtype, normal(inner**-0.5), None, "float32", name="o")
        return out(h), cast(Array, bias)


class T5FeedForward(nn.Module):
    """wo(gelu(wi_0 x) wi_1 x), or wo(relu(wi x)). x `[B, T, D]` in `config.dtype` -> float32.

    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6. In float16 the hidden values are clipped to its
    range.
    """

    config: T5EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config = self.config

        def up(name: str) -> Array:
            init = normal(config.d_model**-0.5)
            return Linear(config.d_ff, False, config.dtype, init, None, "float32", name=name)(x)

        act = ACTIVATIONS[FEED_FORWARDS[config.feed_forward_proj]]
        h = act(up("wi_0")) * up("wi_1") if config.feed_forward_proj == "gated-gelu" else act(up("wi"))
        largest = float(jnp.finfo(compute_dtype(config.dtype)).max)
        init = normal(config.d_ff**-0.5)
        wo = Linear(config.d_model, False, config.dtype, init, None, "float32", name="wo")
        return wo(jnp.clip(h, -largest, largest))


class T5LayerSelfAttention(nn.Module):
    """attention(norm(x)), and the position bias."""

    config: T5EncoderConfig
    has_relative_attention_bias: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T C"],
        bias: Float[Array, "1 H T T"] | None,
        mask: Bool[Array, "B 1 1 T"] | None,
    ) -> tuple[Float[Array, "B T C"], Float[Array, "1 H T T"]]:
        h = RMSNorm(self.config.layer_norm_epsilon, self.config.dtype, name="layer_norm")(x)
        attention = T5Attention(self.config, self.has_relative_attention_bias, name="SelfAttention")
        return attention(h, bias, mask)


class T5LayerFF(nn.Module):
    """feed_forward(norm(x))."""

    config: T5EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h = RMSNorm(self.config.layer_norm_epsilon, self.config.dtype, name="layer_norm")(x)
        return T5FeedForward(self.config, name="DenseReluDense")(h)


class T5Block(nn.Module):
    """x + attention, then + feed forward. The sum is float32: in a deep encoder it exceeds float16."""

    config: T5EncoderConfig
    has_relative_attention_bias: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T C"],
        bias: Float[Array, "1 H T T"] | None,
        mask: Bool[Array, "B 1 1 T"] | None,
    ) -> tuple[Float[Array, "B T C"], Float[Array, "1 H T T"]]:
        attention = T5LayerSelfAttention(self.config, self.has_relative_attention_bias, name="layer_0")
        update, bias = attention(x, bias, mask)
        x = x + update
        return x + T5LayerFF(self.config, name="layer_1")(x), bias


class T5Stack(nn.Module):
    """Embedded tokens `[B, T, D]` -> hidden states, float32, and the last one normalised."""

    config: T5EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array | None) -> TextEncoding:
        config = self.config
        states, bias = [x.astype(jnp.float32)], None
        for index in range(config.num_layers):
            block = T5Block(config, index == 0, name=f"block_{index}")
            state, bias = block(states[-1], bias, mask)
            states.append(state)
        norm = RMSNorm(config.layer_norm_epsilon, config.dtype, name="final_layer_norm")
        last = norm(states[-1])
        return TextEncoding(last, None, None, (*states[:-1], last))


class T5EncoderModel(nn.Module):
    """The encoder of T5. Raffel et al. 2020, section 2.1; v1.1 with the gated GELU of Shazeer 2020.

    Call: input_ids int32 `[B, T]`, any T; attention_mask `[B, T]`, 0 at padding, or None, as in FLUX and
    SD3 -> `TextEncoding` without `pooled` and `text_embeds`. `last_hidden_state` and
    `hidden_states[-1]` are the same, normalised, in `config.dtype`; the other states are float32.

    In float16 the states and the outputs of the layers stay float32: the published XXL weights overflow
    otherwise.

    >>> import jax
    >>> from jaxldm import models
    >>> module = models.build("t5-base", d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=50)
    >>> params = models.init(module, jax.random.key(0))
    >>> module.apply({"params": params}, jax.numpy.array([[37, 7, 1]])).last_hidden_state.shape
    (1, 3, 8)
    """

    config: T5EncoderConfig

    tied_tensors: ClassVar[Mapping[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}
    # Whole checkpoints of T5 also have the decoder.
    ignored_tensors: ClassVar[tuple[str, ...]] = (r"decoder\..*", r"lm_head\.weight")

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        config = self.config
        check_tokens(input_ids)
        embedded = Embedding(config.vocab_size, config.d_model, config.dtype, name="shared")(input_ids)
        return T5Stack(config, name="encoder")(embedded, padding_mask(attention_mask))

    def example_inputs(self) -> tuple:
        """The shape of the tokens that `init` traces the model with."""
        return token_shapes(8)


_V1_1 = T5EncoderConfig(feed_forward_proj="gated-gelu")

# T5 v1.1, the encoder only; the token embedding is counted once.
PRESETS = {
    # 109,628,544 parameters.
    "t5-base": dataclasses.replace(_V1_1, d_model=768, num_layers=12, num_heads=12),
    # 1,223,527,424 parameters.
    "t5-xl": dataclasses.replace(_V1_1, d_model=2048, d_ff=5120, num_layers=24, num_heads=32),
    # 4,762,310,656 parameters: SD3, FLUX, PixArt, DeepFloyd.
    "t5-xxl": dataclasses.replace(_V1_1, d_model=4096, d_ff=10240, num_layers=24, num_heads=64),
}
