"""The language model of Mistral, and of Mistral 3, which also sees images: the text encoder of FLUX.2-dev."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxldm.entries import unknown_key
from jaxldm.errors import CheckpointError, shown
from jaxldm.models.language_model import LanguageModel, LanguageModelConfig, text_entries, with_rope_theta
from jaxldm.models.text_encoder import GENERIC, TransformersConfig

# Of a whole Mistral 3, next to `text_config`.
OF_IMAGES = """
vision_config image_token_id image_token_index multimodal_projector_bias projector_hidden_act
spatial_merge_size vision_feature_layer
"""


@dataclasses.dataclass(frozen=True)
class MistralConfig(LanguageModelConfig):
    """Config of `MistralModel`; names and defaults are those of transformers.

    Attributes:
        num_key_value_heads: as in `LanguageModelConfig`.
        head_dim: channels per head; None: hidden_size / num_attention_heads. Of Mistral Small 128, and not
            160.
        sliding_window: how many tokens a token attends to, itself among them; None: all before it. Longer
            texts are refused, so that it has no effect.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    dtype: str = "float32"
    head_dim: int | None = None
    sliding_window: int | None = 4096

    model_type: ClassVar[str] = "mistral"
    fixed: ClassVar = {**TransformersConfig.fixed, "rope_scaling": None}
    ignored: ClassVar = frozenset(GENERIC.split()) | set(OF_IMAGES.split())

    @property
    def max_tokens(self) -> int:
        """The longest text: one that the sliding window holds as a whole."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """As in `ModelConfig`; of the config of a whole Mistral 3 what concerns its language model.

        Raises:
            CheckpointError: an unknown key, scaled positions, or the language model of another family.
        """
        inner = entries.get("text_config")
        if isinstance(inner, Mapping):
            kind = inner.get("model_type", cls.model_type)
            if kind != cls.model_type:
                raise CheckpointError(
                    f"config.json has a text_config of model_type {shown(kind)}; only {cls.model_type!r} is "
                    "supported"
                )
            known = cls.ignored | {"text_config"}
            odd = next((key for key in entries if key not in known and not key.startswith("_")), None)
            if odd is not None:
                raise CheckpointError(unknown_key("config.json", odd, known))
        return super().from_dict(with_rope_theta(text_entries(entries)))


class MistralModel(LanguageModel):
    """The language model of Mistral without its last layer. Jiang et al. 2023, arXiv:2310.06825, section 2.

    Its call is that of `LanguageModel`. In the files of a whole Mistral 3 (Mistral Small 3.1 and 3.2) the
    weights that see images, those of the vision tower and of the projector, are not read.

    >>> import jax
    >>> from jaxldm import models
    >>> module = models.build("mistral-small-3.2", hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                       num_attention_heads=4, num_key_value_heads=2, head_dim=4, vocab_size=50)
    >>> params = models.init(module, jax.random.key(0))
    >>> module.apply({"params": params}, jax.numpy.array([[37, 7, 1]])).hidden_states[-2].shape
    (1, 3, 8)
    """

    config: MistralConfig

    # Of the whole model, in both of its namings: the layer that predicts tokens, and what sees images.
    ignored_tensors: ClassVar[tuple[str, ...]] = (
        r"(language_model\.)?lm_head\.weight",
        r"(model\.)?(vision_tower|multi_modal_projector)\..+",
    )
    # What a folder of this module lacks next to the published one: `pipelines.save` warns of it.
    saved_without: ClassVar[str] = "the weights that see images"


PRESETS = {
    # 22,901,314,560 parameters: the text encoder of FLUX.2-dev, of Mistral-Small-3.2-24B-Instruct-2506. These
    # sizes are the defaults of transformers for a Mistral 3.
    "mistral-small-3.2": MistralConfig(
        vocab_size=131072,
        hidden_size=5120,
        intermediate_size=32768,
        num_hidden_layers=40,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=1000000000.0,
        sliding_window=None,
    ),
}
