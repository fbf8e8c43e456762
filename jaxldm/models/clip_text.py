"""The text tower of CLIP: the text encoder of Stable Diffusion, SDXL, SD3 and FLUX."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.errors import one_of
from jaxldm.models.config import check_heads
from jaxldm.models.text_encoder import (
    POSITION_NUMBERS,
    TextEncoding,
    TransformersConfig,
    check_tokens,
    padding_mask,
    pre_norm_encoder,
    token_shapes,
)
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.initialization import normal
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import LayerNorm


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(TransformersConfig):
    """Config of `CLIPTextModel`; names and defaults are those of transformers.

    Attributes:
        hidden_act: "quick_gelu" in OpenAI's CLIP, "gelu" in OpenCLIP.
        projection_dim: width of the space shared with images, for `CLIPTextModelWithProjection`.
        eos_token_id: the token whose state is `pooled`. Many published config.json have 2 by mistake; it
            means the largest token of each text.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1
    dtype: str = "float32"

    model_type: ClassVar[str] = "clip_text_model"

    def check_values(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)
        one_of("activation", self.hidden_act, ACTIVATIONS)
        compute_dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class CLIPTextWithProjectionConfig(CLIPTextConfig):
    """Config of `CLIPTextModelWithProjection`: that of `CLIPTextModel`."""


class CLIPTextEmbeddings(nn.Module):
    """Tokens `[B, T]` -> token embedding + position embedding, `[B, T, D]`."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        config = self.config
        width, init = config.hidden_size, normal(0.02)
        tokens = Embedding(config.vocab_size, width, config.dtype, init, name="token_embedding")
        positions = Embedding(
            config.max_position_embeddings, width, config.dtype, init, name="position_embedding"
        )
        return tokens(input_ids) + positions(jnp.arange(input_ids.shape[1]))[None]


class CLIPTextTransformer(nn.Module):
    """Tokens -> hidden states, with causal attention. Radford et al. 2021, section 2.4."""

    config: CLIPTextConfig

    def setup(self):
        config = self.config
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = pre_norm_encoder(config)
        self.final_layer_norm = LayerNorm(config.layer_norm_eps, config.dtype)

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        check_tokens(input_ids, self.config.max_position_embeddings)
        mask = padding_mask(attention_mask)
        states = self.encoder(self.embeddings(input_ids), mask=mask, causal=True)
        last = self.final_layer_norm(states[-1])
        pooled = pooled_at_eos(last, input_ids, self.config.eos_token_id)
        return TextEncoding(last, pooled, None, states)


def pooled_at_eos(
    states: Float[Array, "B T D"], input_ids: Int[Array, "B T"], eos_token_id: int
) -> Float[Array, "B D"]:
    """The state of each text's first end-of-text token, `[B, D]`; of its first token if it has none.

    With an `eos_token_id` of 2, which many published folders have by mistake, the state of the token with
    the largest number: the end of text in CLIP's own vocabulary.
    """
    marks = input_ids if eos_token_id == 2 else (input_ids == eos_token_id).astype(jnp.int32)
    return jnp.take_along_axis(states, jnp.argmax(marks, axis=1)[:, None, None], axis=1)[:, 0]


class CLIPTextModel(nn.Module):
    """CLIP's text tower. Radford et al. 2021, "Learning Transferable Visual Models", section 2.4.

    Call: input_ids int32 `[B, T]`, T up to 77; attention_mask `[B, T]`, 0 at padding, or None as in
    the pipelines of Stable Diffusion -> `TextEncoding` in `config.dtype`. `hidden_states[-1]` is not
    normalised; `final_layer_norm` normalises any of them, as skipping layers in Stable Diffusion 1 needs.

    Raises:
        InvalidArgumentError: more tokens than positions.

    >>> import jax
    >>> from jaxldm import models
    >>> module = models.build("clip-l", hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...                       intermediate_size=16, vocab_size=50)
    >>> params = models.init(module, jax.random.key(0))
    >>> module.apply({"params": params}, jax.numpy.array([[48, 7, 49]])).hidden_states[-2].shape
    (1, 3, 8)
    """

    config: CLIPTextConfig

    ignored_tensors: ClassVar[tuple[str, ...]] = POSITION_NUMBERS

    def setup(self):
        self.text_model = CLIPTextTransformer(self.config)

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        return self.text_model(input_ids, attention_mask)

    def final_layer_norm(self, hidden_state: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.text_model.final_layer_norm(hidden_state)

    def example_inputs(self) -> tuple:
        """The shape of the tokens that `init` traces the model with."""
        return token_shapes(min(8, self.config.max_position_embeddings))


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIP's text tower and the projection of `pooled` to `text_embeds`: SDXL's second encoder, CLIP score.

    As `CLIPTextModel`. `text_embeds` is not normalised; CLIP score does that.
    """

    def setup(self):
        config = self.config
        self.text_model = CLIPTextTransformer(config)
        self.text_projection = Linear(
            config.projection_dim,
            use_bias=False,
            dtype=config.dtype,
            kernel_init=normal(config.hidden_size**-0.5),
        )

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> TextEncoding:
        encoding = self.text_model(input_ids, attention_mask)
        return encoding._replace(text_embeds=self.text_projection(cast(Array, encoding.pooled)))


_LEGACY_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}

PRESETS = {
    # OpenAI's ViT-L/14 as in Stable Diffusion 1.x and SDXL: 123,060,480 parameters, no projection.
    "clip-l": CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        projection_dim=768,
        num_attention_heads=12,
        **_LEGACY_TOKENS,
    ),
    # OpenCLIP ViT-H/14 as in Stable Diffusion 2.x: 340,387,840 parameters. The last of its 24 layers is
    # left out, so that the penultimate layer is the output; no projection.
    "openclip-h": CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        **_LEGACY_TOKENS,
    ),
    # OpenCLIP ViT-bigG/14 as in SDXL and SD3: 694,659,840 parameters, the projection included.
    "openclip-bigg": CLIPTextWithProjectionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        **_LEGACY_TOKENS,
    ),
}
