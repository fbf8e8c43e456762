"""Qwen3, a language model: the text encoder of Z-Image and FLUX.2 klein."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.entries import read_value
from jaxldm.errors import CheckpointError, one_of, shown
from jaxldm.models.config import check
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
class Qwen3Config(TransformersConfig):
    """Config of `Qwen3Model`; names and defaults are those of transformers.

    Attributes:
        num_key_value_heads: heads of keys and values, each shared by num_attention_heads /
            num_key_value_heads heads of queries; None: as many as of queries.
        head_dim: channels per head; num_attention_heads * head_dim need not be hidden_size.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    dtype: str = "float32"

    model_type: ClassVar[str] = "qwen3"
    qk_norm: ClassVar[bool] = True
    fixed: ClassVar = {**TransformersConfig.fixed, "use_sliding_window": False, "rope_scaling": None}
    ignored: ClassVar = frozenset(GENERIC.split()) | {"sliding_window", "max_window_layers"}

    def check_values(self) -> None:
        one_of("hidden_act", self.hidden_act, ("silu",))
        check(
            self.num_attention_heads % self.key_value_heads == 0,
            f"{self.num_attention_heads} heads of queries cannot share {self.key_value_heads} of keys",
        )
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even, for rotary positions")
        compute_dtype(self.dtype)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def output_bias(self) -> bool:
        """Whether the last projection of an attention has a bias."""
        return self.attention_bias

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """As in `ModelConfig`; transformers 5 writes the rotary settings as `rope_parameters`.

        Raises:
            CheckpointError: an unknown key, sliding-window attention, or scaled positions.
        """
        entries = dict(entries)
        place = "config.json: rope_parameters"
        rope = dict(read_value(entries.pop("rope_parameters", None), dict | None, place) or {})
        if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
            raise CheckpointError(f"config.json has rope_parameters {rope}; only rope_theta is supported")
        rope.pop("rope_type", None)
        check_layer_types(entries.pop("layer_types", None))
        return super().from_dict(entries | rope)


def check_layer_types(value: Any) -> None:
    """Raise `CheckpointError` for a value of `layer_types` in which a layer sees a part of the text alone."""
    layers = read_value(value, tuple[str, ...] | None, "config.json: layer_types") or (FULL,)
    if set(layers) != {FULL}:
        other = next(kind for kind in layers if kind != FULL)
        raise CheckpointError(f"config.json has layer_types {shown(other)}; only {FULL!r} is supported")


class Qwen3Attention(nn.Module):
    """Causal attention with rotary positions, queries and keys RMS-normalised. x `[B, T, D]` -> float32.

    Grouped queries: Ainslie et al. 2023, section 2.2. Qwen2.5 has biases in place of the norms.

    Attributes:
        config: `Qwen3Config`, or one with the same fields and properties.
    """

    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array | None) -> Float[Array, "B T D"]:
        config = self.config
        heads, shared, length = config.num_attention_heads, config.key_value_heads, x.shape[1]
        cos, sin = rotary_embedding(np.arange(length), config.head_dim, config.rope_theta)

        def project(name: str, count: int) -> Float[Array, "B T H D"]:
            linear = Linear(
                count * config.head_dim, config.attention_bias, config.dtype, KERNEL_INIT, zeros, name=name
            )
            return linear(x).reshape(*x.shape[:2], count, config.head_dim)

        def rotated(name: str, part: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
            if config.qk_norm:
                part = RMSNorm(config.rms_norm_eps, config.dtype, name=name)(part)
            return apply_rotary(part, cast(Any, cos), cast(Any, sin), interleaved=False)

        query = rotated("q_norm", project("q_proj", heads))
        key, value = rotated("k_norm", project("k_proj", shared)), project("v_proj", shared)
        key, value = (jnp.repeat(part, heads // shared, axis=2) for part in (key, value))
        query, key, value = (part.reshape(*x.shape[:2], -1) for part in (query, key, value))
        h = attend(self, query, key, value, heads, mask=mask, causal=True)
        options: dict[str, Any] = {"kernel_init": KERNEL_INIT, "bias_init": zeros, "output_dtype": "float32"}
        return Linear(x.shape[-1], config.output_bias, config.dtype, **options, name="o_proj")(h)


class Qwen3DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). x `[B, T, D]`, float32 like T5's states."""

    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array | None) -> Float[Array, "B T D"]:
        config = self.config

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(config.rms_norm_eps, config.dtype, name=name)(x)

        x = x + Qwen3Attention(config, name="self_attn")(norm("input_layernorm", x), mask)
        names = ("gate_proj", "up_proj", "down_proj")
        mlp = SwiGLU(config.intermediate_size, names, config.dtype, KERNEL_INIT, "float32", name="mlp")
        return x + mlp(norm("post_attention_layernorm", x))


class QwenModel(nn.Module):
    """The layers of a language model of Qwen, without the last one, which predicts tokens.

    Call: input_ids int32 `[B, T]`; attention_mask `[B, T]`, 0 at padding, on the right of the text, or None
    -> `TextEncoding` without `pooled` and `text_embeds`. `last_hidden_state` and `hidden_states[-1]` are the
    same, normalised, in `config.dtype`; the other states are float32 with any dtype, since they exceed the
    range of float16.

    Raises:
        InvalidArgumentError: more tokens than `max_position_embeddings`.
    """

    config: Any

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        config = self.config
        check_tokens(input_ids, config.max_position_embeddings)
        mask = padding_mask(attention_mask)
        embed = Embedding(
            config.vocab_size, config.hidden_size, config.dtype, KERNEL_INIT, name="embed_tokens"
        )
        states = [embed(input_ids).astype(jnp.float32)]
        for index in range(config.num_hidden_layers):
            states.append(Qwen3DecoderLayer(config, name=f"layers_{index}")(states[-1], mask))
        last = RMSNorm(config.rms_norm_eps, config.dtype, name="norm")(states[-1])
        return TextEncoding(last, None, None, (*states[:-1], last))

    def example_inputs(self) -> tuple:
        """The shape of the tokens that `init` traces the model with."""
        return token_shapes(8)


class Qwen3Model(QwenModel):
    """Qwen3 without its last layer, which predicts tokens. Qwen Team 2025, arXiv:2505.09388, section 2.

    Its call is that of `QwenModel`.

    >>> import jax
    >>> from jaxldm import models
    >>> module = models.build("qwen3-4b", hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                       num_attention_heads=4, num_key_value_heads=2, head_dim=4, vocab_size=50)
    >>> params = models.init(module, jax.random.key(0))
    >>> module.apply({"params": params}, jax.numpy.array([[37, 7, 1]])).hidden_states[-2].shape
    (1, 3, 8)
    """

    config: Qwen3Config

    # A whole language model also has the layer that predicts tokens.
    ignored_tensors: ClassVar[tuple[str, ...]] = (r"lm_head\.weight",)


_QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    rope_theta=1000000.0,
)

PRESETS = {
    # 4,022,468,096 parameters: the text encoder of Z-Image and FLUX.2-klein-4B.
    "qwen3-4b": _QWEN3_4B,
    # 7,568,405,504 parameters: the text encoder of FLUX.2-klein-9B.
    "qwen3-8b": dataclasses.replace(_QWEN3_4B, hidden_size=4096, intermediate_size=12288),
}
