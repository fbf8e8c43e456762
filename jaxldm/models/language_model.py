"""Causal language models of texts, without their last layer: what Qwen's and Mistral's have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.entries import read_value
from jaxldm.errors import CheckpointError, one_of, shown
from jaxldm.models.config import check, check_heads
from jaxldm.models.text_encoder import (
    GENERIC,
    TextEncoding,
    TransformersConfig,
    check_tokens,
    padding_mask,
    token_shapes,
)
from jaxldm.nn.attention import attend
from jaxldm.nn.initialization import normal, zeros
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import RMSNorm
from jaxldm.nn.rotary import apply_rotary, rotary_embedding
from jaxldm.nn.transformer_encoder import SwiGLU

FULL = "full_attention"
KERNEL_INIT = normal(0.02)


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(TransformersConfig):
    """Base of the configs of language models; names are those of transformers.

    Attributes:
        num_key_value_heads: heads of keys and values, each shared by num_attention_heads /
            num_key_value_heads heads of queries; None: as many as of queries.
        qk_norm: whether queries and keys are RMS-normalised.
        attention_bias: whether the projections of queries, keys and values have biases.
        output_bias: whether the last projection of an attention has one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    dtype: str

    qk_norm: ClassVar[bool] = False
    attention_bias: ClassVar[bool] = False
    output_bias: ClassVar[bool] = False
    ignored: ClassVar = frozenset(GENERIC.split())

    def check_values(self) -> None:
        one_of("hidden_act", self.hidden_act, ("silu",))
        if getattr(self, "head_dim", None) is None:
            check_heads(self.hidden_size, self.num_attention_heads)
        check(
            self.num_attention_heads % self.key_value_heads == 0,
            f"{self.num_attention_heads} heads of queries cannot share {self.key_value_heads} of keys",
        )
        channels = self.channels_per_head
        check(channels % 2 == 0, f"heads of {channels} channels must be even, for rotary positions")
        compute_dtype(self.dtype)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def channels_per_head(self) -> int:
        """Channels of a head: `head_dim`, where the config has one."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def max_tokens(self) -> int:
        """The longest text."""
        return self.max_position_embeddings


def text_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Of the entries of config.json of a model that sees images, too, those of its language model."""
    inner = read_value(entries.get("text_config"), dict | None, "config.json: text_config")
    if inner is not None:  # older files repeat it next to it
        entries = {key: value for key, value in inner.items() if key != "model_type"} | {
            key: value for key, value in entries.items() if key == "_dtype"
        }
    return {key: value for key, value in entries.items() if key != "text_config"}


def with_rope_theta(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with the rotary settings of transformers 5, `rope_parameters`, as `rope_theta`.

    Raises:
        CheckpointError: scaled positions, or a layer that sees a part of the text alone.
    """
    entries = dict(entries)
    place = "config.json: rope_parameters"
    rope = dict(read_value(entries.pop("rope_parameters", None), dict | None, place) or {})
    if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
        raise CheckpointError(f"config.json has rope_parameters {rope}; only rope_theta is supported")
    rope.pop("rope_type", None)
    check_layer_types(entries.pop("layer_types", None))
    return entries | rope


def check_layer_types(value: Any) -> None:
    """Raise `CheckpointError` for a value of `layer_types` in which a layer sees a part of the text alone."""
    layers = read_value(value, tuple[str, ...] | None, "config.json: layer_types") or (FULL,)
    if set(layers) != {FULL}:
        other = next(kind for kind in layers if kind != FULL)
        raise CheckpointError(f"config.json has layer_types {shown(other)}; only {FULL!r} is supported")


class CausalAttention(nn.Module):
    """Causal attention with rotary positions and grouped queries. x `[B, T, D]` -> float32.

    Grouped queries: Ainslie et al. 2023, section 2.2. Qwen3 normalises queries and keys (`qk_norm`); Qwen2.5
    has biases instead, Mistral neither. Padding in front of a text attends to nothing: its result is 0.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array | None) -> Float[Array, "B T D"]:
        config = self.config
        heads, shared, length = config.num_attention_heads, config.key_value_heads, x.shape[1]
        channels = config.channels_per_head
        cos, sin = rotary_embedding(np.arange(length), channels, config.rope_theta)

        def project(name: str, count: int) -> Float[Array, "B T H D"]:
            linear = Linear(
                count * channels, config.attention_bias, config.dtype, KERNEL_INIT, zeros, name=name
            )
            return linear(x).reshape(*x.shape[:2], count, channels)

        def rotated(name: str, part: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
            if config.qk_norm:
                part = RMSNorm(config.rms_norm_eps, config.dtype, name=name)(part)
            return apply_rotary(part, cast(Any, cos), cast(Any, sin), interleaved=False)

        query = rotated("q_norm", project("q_proj", heads))
        key, value = rotated("k_norm", project("k_proj", shared)), project("v_proj", shared)
        key, value = (jnp.repeat(part, heads // shared, axis=2) for part in (key, value))
        query, key, value = (part.reshape(*x.shape[:2], -1) for part in (query, key, value))
        h = attend(self, query, key, value, heads, mask=mask, causal=True)
        if mask is not None:
            h = jnp.where(jnp.cumsum(mask[:, 0, 0], axis=-1)[..., None] > 0, h, jnp.zeros((), h.dtype))
        options: dict[str, Any] = {"kernel_init": KERNEL_INIT, "bias_init": zeros, "output_dtype": "float32"}
        return Linear(x.shape[-1], config.output_bias, config.dtype, **options, name="o_proj")(h)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). x `[B, T, D]`, float32 like T5's states."""

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array | None) -> Float[Array, "B T D"]:
        config = self.config

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(config.rms_norm_eps, config.dtype, name=name)(x)

        x = x + CausalAttention(config, name="self_attn")(norm("input_layernorm", x), mask)
        names = ("gate_proj", "up_proj", "down_proj")
        mlp = SwiGLU(config.intermediate_size, names, config.dtype, KERNEL_INIT, "float32", name="mlp")
        return x + mlp(norm("post_attention_layernorm", x))


class LanguageModel(nn.Module):
    """The layers of a causal language model, without the last one, which predicts tokens.

    Call: input_ids int32 `[B, T]`; attention_mask `[B, T]`, 0 at padding, on either side of the text, or None
    -> `TextEncoding` without `pooled` and `text_embeds`. `last_hidden_state` and `hidden_states[-1]` are the
    same, normalised, in `config.dtype`; the other states are float32 with any dtype, since they exceed the
    range of float16. A token's position is its place in the row, padding included.

    Raises:
        InvalidArgumentError: more tokens than `config.max_tokens`.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        config = self.config
        check_tokens(input_ids, config.max_tokens)
        mask = padding_mask(attention_mask)
        embed = Embedding(
            config.vocab_size, config.hidden_size, config.dtype, KERNEL_INIT, name="embed_tokens"
        )
        states = [embed(input_ids).astype(jnp.float32)]
        for index in range(config.num_hidden_layers):
            states.append(DecoderLayer(config, name=f"layers_{index}")(states[-1], mask))
        last = RMSNorm(config.rms_norm_eps, config.dtype, name="norm")(states[-1])
        return TextEncoding(last, None, None, (*states[:-1], last))

    def example_inputs(self) -> tuple:
        """The shape of the tokens that `init` traces the model with."""
        return token_shapes(8)
