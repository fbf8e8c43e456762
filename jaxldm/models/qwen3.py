"""Qwen3, a language model: the text encoder of Z-Image and FLUX.2 klein."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxldm.models.language_model import LanguageModel, LanguageModelConfig, with_rope_theta
from jaxldm.models.text_encoder import GENERIC, TransformersConfig


@dataclasses.dataclass(frozen=True)
class Qwen3Config(LanguageModelConfig):
    """Config of `Qwen3Model`; names and defaults are those of transformers.

    Attributes:
        num_key_value_heads: as in `LanguageModelConfig`.
        head_dim: channels per head; num_attention_heads * head_dim need not be hidden_size.
        attention_bias: biases of all four projections of an attention.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    dtype: str = "float32"
    head_dim: int = 128
    attention_bias: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]

    model_type: ClassVar[str] = "qwen3"
    qk_norm: ClassVar[bool] = True
    fixed: ClassVar = {**TransformersConfig.fixed, "use_sliding_window": False, "rope_scaling": None}
    ignored: ClassVar = frozenset(GENERIC.split()) | {"sliding_window", "max_window_layers"}

    @property
    def output_bias(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the last projection of an attention has a bias."""
        return self.attention_bias

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """As in `ModelConfig`; transformers 5 writes the rotary settings as `rope_parameters`.

        Raises:
            CheckpointError: an unknown key, sliding-window attention, or scaled positions.
        """
        return super().from_dict(with_rope_theta(entries))


class Qwen3Model(LanguageModel):
    """Qwen3 without its last layer, which predicts tokens. Qwen Team 2025, arXiv:2505.09388, section 2.

    Its call is that of `LanguageModel`.

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
