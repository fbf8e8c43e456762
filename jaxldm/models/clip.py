"""Both towers of CLIP in one model, as OpenAI published it: texts and images in one space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.errors import CheckpointError, shown
from jaxldm.models.clip_text import CLIPTextConfig, CLIPTextTransformer
from jaxldm.models.clip_vision import CLIPVisionConfig, CLIPVisionTransformer, ImageEncoding, check_pixels
from jaxldm.models.text_encoder import (
    GENERIC,
    POSITION_NUMBERS,
    TextEncoding,
    TransformersConfig,
    token_shapes,
)
from jaxldm.nn.initialization import constant, normal, parameter
from jaxldm.nn.linear import Linear, compute_dtype


@dataclasses.dataclass(frozen=True)
class CLIPConfig(TransformersConfig):
    """Config of `CLIPModel`; names and defaults are those of transformers.

    Attributes:
        projection_dim: width of the space that texts and images share; the towers' own is not used.
        dtype: of both towers.
    """

    text_config: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    dtype: str = "float32"

    model_type: ClassVar[str] = "clip"
    towers: ClassVar[Mapping[str, type[TransformersConfig]]] = {
        "text_config": CLIPTextConfig,
        "vision_config": CLIPVisionConfig,
    }
    # Old files also hold these: the entries of the towers that differ from the defaults.
    ignored: ClassVar = frozenset(GENERIC.split()) | {"text_config_dict", "vision_config_dict"}

    def check_values(self) -> None:
        compute_dtype(self.dtype)
        for name in self.towers:
            object.__setattr__(self, name, dataclasses.replace(getattr(self, name), dtype=self.dtype))

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of config.json, with those of the towers nested."""
        towers = {
            name: {"model_type": kind.model_type, **getattr(self, name).to_dict()}
            for name, kind in self.towers.items()
        }
        return super().to_dict() | towers

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; raises `CheckpointError` for the keys of the towers, too."""
        entries = dict(entries)
        for name, kind in cls.towers.items():
            tower = entries.get(name) or {}
            if not isinstance(tower, Mapping):
                raise CheckpointError(f"config.json has no object under {name!r}, but {shown(tower)}")
            own = {key: value for key, value in tower.items() if key not in ("model_type", "_dtype")}
            entries[name] = kind.from_dict(own)
        return super().from_dict(entries)


class CLIPModel(nn.Module):
    """CLIP: a text tower and an image tower whose embeddings are close for matching texts and images.

    Radford et al. 2021, section 2.3. Methods: `encode_text`, as `CLIPTextModelWithProjection`;
    `encode_image`, as `CLIPVisionModelWithProjection`. The call returns exp(logit_scale) times the cosine of
    every image with every text, `[images, texts]`; CLIP score (Hessel et al. 2021) is 100 max(cosine, 0) of
    an image and its text.
    """

    config: CLIPConfig

    ignored_tensors: ClassVar[tuple[str, ...]] = POSITION_NUMBERS

    def setup(self):
        config = self.config
        text, vision = config.text_config, config.vision_config
        self.text_model = CLIPTextTransformer(text)
        self.vision_model = CLIPVisionTransformer(vision)
        self.text_projection, self.visual_projection = (
            Linear(config.projection_dim, False, config.dtype, normal(tower.hidden_size**-0.5))
            for tower in (text, vision)
        )
        self.logit_scale = parameter(self, "logit_scale", constant(config.logit_scale_init_value), ())

    def encode_text(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        encoding = self.text_model(input_ids, attention_mask)
        return encoding._replace(text_embeds=self.text_projection(cast(Array, encoding.pooled)))

    def encode_image(self, pixel_values: Float[Array, "B H W C"]) -> ImageEncoding:
        check_pixels(pixel_values, self.config.vision_config)
        states, pooled = self.vision_model(pixel_values)
        return ImageEncoding(states[-1], pooled, self.visual_projection(pooled), states)

    def __call__(
        self,
        input_ids: Int[Array, "texts T"],
        pixel_values: Float[Array, "images H W C"],
        attention_mask: Int[Array, "texts T"] | None = None,
    ) -> Float[Array, "images texts"]:
        texts = self.encode_text(input_ids, attention_mask).text_embeds
        images = self.encode_image(pixel_values).image_embeds
        texts, images = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (texts, images))
        return jnp.exp(self.logit_scale.astype(images.dtype)) * (images @ texts.T)

    def example_inputs(self) -> tuple:
        """The shapes of the tokens and images that `init` traces the model with."""
        vision = self.config.vision_config
        size = (1, vision.image_size, vision.image_size, vision.num_channels)
        return (*token_shapes(8), jax.ShapeDtypeStruct(size, jnp.float32))
