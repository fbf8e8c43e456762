"""The language model of Qwen2.5-VL, for texts alone: the text encoder of Qwen-Image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxldm.entries import read_value
from jaxldm.errors import CheckpointError, shown
from jaxldm.models.language_model import (
    LanguageModel,
    LanguageModelConfig,
    check_layer_types,
    text_entries,
)
from jaxldm.models.text_encoder import GENERIC, TransformersConfig

ROPE = ("rope_scaling", "rope_parameters")  # of transformers 4, and of 5
PLAIN = ("default", "mrope")  # the kinds of rotary positions that are those of Qwen3 for a text
OF_IMAGES = """
vision_config image_token_id video_token_id vision_token_id vision_start_token_id vision_end_token_id
sliding_window max_window_layers
"""


@dataclasses.dataclass(frozen=True)
class Qwen2_5_VLTextConfig(LanguageModelConfig):
    """Config of `Qwen2_5_VLTextModel`; names and defaults are those of transformers.

    Attributes:
        num_key_value_heads: as in `LanguageModelConfig`.
        mrope_section: pairs of a head's channels that rotate with a token's time, row and column. Those of a
            text are one number, its place, so that the split has no effect here; it is kept for others.
    """

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    dtype: str = "float32"
    mrope_section: tuple[int, ...] | None = None

    model_type: ClassVar[str] = "qwen2_5_vl_text"
    attention_bias: ClassVar[bool] = True
    fixed: ClassVar = {**TransformersConfig.fixed, "use_sliding_window": False}
    ignored: ClassVar = frozenset(GENERIC.split()) | set(OF_IMAGES.split())

    def to_dict(self) -> dict[str, Any]:
        """As in `ModelConfig`; the rotary settings as transformers 4 has them, which 5 reads as well."""
        entries = super().to_dict()
        section = entries.pop("mrope_section")
        if section is not None:
            entries["rope_scaling"] = {"rope_type": "default", "mrope_section": section}
        return entries

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """As in `ModelConfig`; of the config of a whole Qwen2.5-VL what concerns its language model.

        Raises:
            CheckpointError: an unknown key, sliding-window attention, or scaled positions.
        """
        entries = text_entries(entries)
        rope: dict[str, Any] = {}
        for name in ROPE:
            given = read_value(entries.pop(name, None), dict | None, f"config.json: {name}") or {}
            kinds = [given.get(key, "default") for key in ("rope_type", "type")]
            unknown = given.keys() - {"rope_type", "type", "rope_theta", "mrope_section"}
            if unknown or not all(isinstance(kind, str) and kind in PLAIN for kind in kinds):
                raise CheckpointError(
                    f"config.json has {name} {shown(given)}; only rope_theta and mrope_section are supported"
                )
            rope |= {key: given[key] for key in ("rope_theta", "mrope_section") if key in given}
        check_layer_types(entries.pop("layer_types", None))
        return super().from_dict(entries | rope)


class Qwen2_5_VLTextModel(LanguageModel):
    """The language model of Qwen2.5-VL without its last layer. Bai et al. 2025, arXiv:2502.13923, section 2.

    Its call is that of `LanguageModel`. In a text the time, row and column of a token are all its place, so
    that its rotary positions are Qwen3's. Weights of the part that sees images, in the same files, are not
    read.

    >>> import jax
    >>> from jaxldm import models
    >>> module = models.build("qwen2.5-vl-7b", hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                       num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    >>> params = models.init(module, jax.random.key(0))
    >>> module.apply({"params": params}, jax.numpy.array([[37, 7, 1]])).last_hidden_state.shape
    (1, 3, 8)
    """

    config: Qwen2_5_VLTextConfig

    # Of the whole model: the layer that predicts tokens, and the tower of images.
    ignored_tensors: ClassVar[tuple[str, ...]] = (r"lm_head\.weight", r"(model\.)?visual\..+")
    # What a folder of this module lacks next to the published one: `pipelines.save` warns of it.
    saved_without: ClassVar[str] = "the weights that see images"


PRESETS = {
    # 7,070,619,136 parameters: the text encoder of Qwen-Image.
    "qwen2.5-vl-7b": Qwen2_5_VLTextConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        mrope_section=(16, 24, 24),
    ),
}
