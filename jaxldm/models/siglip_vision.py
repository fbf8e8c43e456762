"""SigLIP's image tower, and the embedder with which FLUX.1 Redux makes text states of its patches."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check, check_heads
from jaxldm.models.text_encoder import POSITION_NUMBERS, TransformersConfig, pre_norm_encoder
from jaxldm.nn.activations import ACTIVATIONS, silu
from jaxldm.nn.attention import attend
from jaxldm.nn.embeddings import PatchProjection
from jaxldm.nn.initialization import normal, parameter, zeros
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import LayerNorm
from jaxldm.nn.transformer_encoder import MLP


class PatchEncoding(NamedTuple):
    """The output of SigLIP's tower.

    Attributes:
        last_hidden_state: `[B, N, D]`, a state for each patch, row by row, normalised.
        pooled: `[B, D]`, of all patches by attention; None of a tower without a head.
    """

    last_hidden_state: Float[Array, "B N D"]
    pooled: Float[Array, "B D"] | None


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(TransformersConfig):
    """Config of `SiglipVisionModel`; names and defaults are those of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True
    dtype: str = "float32"

    model_type: ClassVar[str] = "siglip_vision_model"

    def check_values(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)
        check(self.image_size >= self.patch_size, "image_size must be at least patch_size")
        one_of("activation", self.hidden_act, ACTIVATIONS)
        compute_dtype(self.dtype)


class SiglipVisionEmbeddings(nn.Module):
    """Images `[B, H, W, C]` -> patches with positions, `[B, N, D]`; a rest at the edges is cut off."""

    config: SiglipVisionConfig

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
        config = self.config
        side = config.image_size // config.patch_size * config.patch_size
        patches = PatchProjection(
            config.hidden_size, config.patch_size, config.dtype, name="patch_embedding"
        )(pixel_values[:, :side, :side])
        rows, init = patches.shape[1], normal(0.02)
        positions = Embedding(rows, config.hidden_size, config.dtype, init, name="position_embedding")
        return patches + positions(jnp.arange(rows))[None]


class PoolingAttention(nn.Module):
    """One query attends to all states; the projections are one matrix. -> `[B, 1, D]`."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, query: Float[Array, "B 1 D"], states: Float[Array, "B N D"]) -> Float[Array, "B 1 D"]:
        width, dtype = states.shape[-1], compute_dtype(self.dtype)
        matrix = parameter(self, "in_proj_weight", normal(width**-0.5), (3 * width, width)).astype(dtype)
        bias = parameter(self, "in_proj_bias", zeros, (3 * width,)).astype(dtype)
        projected = []
        for k, x in enumerate((query, states, states)):
            rows = slice(k * width, (k + 1) * width)
            projected.append(jnp.einsum("bnd,ed->bne", x, matrix[rows]) + bias[rows][None, None])
        query, key, value = projected
        h = attend(self, query, key, value, self.num_heads)
        return Linear(width, dtype=self.dtype, name="out_proj")(h)


class PoolingHead(nn.Module):
    """A learned query's attention, then x + mlp(norm(x)). `[B, N, D]` -> `[B, D]`."""

    config: SiglipVisionConfig

    @nn.compact
    def __call__(self, states: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        config = self.config
        probe = parameter(self, "probe", normal(1.0), (1, 1, config.hidden_size)).astype(states.dtype)
        probe = jnp.broadcast_to(probe, (len(states), 1, config.hidden_size))
        x = PoolingAttention(config.num_attention_heads, config.dtype, name="attention")(probe, states)
        h = LayerNorm(config.layer_norm_eps, config.dtype, name="layernorm")(x)
        h = MLP(config.intermediate_size, config.hidden_act, config.dtype, name="mlp")(h)
        return (x + h)[:, 0]


class SiglipVisionTransformer(nn.Module):
    """Images -> the states of the patches, normalised, and the pooled one."""

    config: SiglipVisionConfig

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> PatchEncoding:
        config = self.config
        embedded = SiglipVisionEmbeddings(config, name="embeddings")(pixel_values)
        states = pre_norm_encoder(config, name="encoder")(embedded)
        last = LayerNorm(config.layer_norm_eps, config.dtype, name="post_layernorm")(states[-1])
        pooled = PoolingHead(config, name="head")(last) if config.vision_use_head else None
        return PatchEncoding(last, pooled)


class SiglipVisionModel(nn.Module):
    """SigLIP's image tower. Zhai et al. 2023, arXiv:2303.15343; the head is that of Zhai et al. 2022.

    Call: pixel_values `[B, image_size, image_size, 3]` in [-1, 1] -> `PatchEncoding` in `config.dtype`.

    Raises:
        InvalidArgumentError: images of another size or number of channels.
    """

    config: SiglipVisionConfig

    ignored_tensors: ClassVar[tuple[str, ...]] = POSITION_NUMBERS

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "B H W C"]) -> PatchEncoding:
        config = self.config
        wanted = (config.image_size, config.image_size, config.num_channels)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != wanted:
            raise InvalidArgumentError(
                f"pixel_values must be [B, {', '.join(map(str, wanted))}], not {pixel_values.shape}"
            )
        return SiglipVisionTransformer(self.config, name="vision_model")(pixel_values)

    def example_inputs(self) -> tuple:
        """The shape of the images that `init` traces the model with."""
        config = self.config
        size = (1, config.image_size, config.image_size, config.num_channels)
        return (jax.ShapeDtypeStruct(size, jnp.float32),)


@dataclasses.dataclass(frozen=True)
class ReduxImageEncoderConfig(ModelConfig):
    """Config of `ReduxImageEncoder`; names and defaults are those of diffusers.

    Attributes:
        redux_dim: width of the image encoder's states.
        txt_in_features: width of the text states that FLUX.1 takes.
    """

    redux_dim: int = 1152
    txt_in_features: int = 4096
    dtype: str = "float32"

    published: ClassVar[bool] = True
    package: ClassVar[str | None] = "flux"

    def check_values(self) -> None:
        check(min(self.redux_dim, self.txt_in_features) > 0, "widths must be 1 or more")
        compute_dtype(self.dtype)


class ReduxImageEncoder(nn.Module):
    """down(silu(up(x))): a text state for each patch. `[B, N, redux_dim]` -> `[B, N, txt_in_features]`."""

    config: ReduxImageEncoderConfig

    @nn.compact
    def __call__(self, states: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        config = self.config
        if states.shape[-1] != config.redux_dim:
            raise InvalidArgumentError(
                f"states are {states.shape[-1]} wide, this embedder takes {config.redux_dim}: they are of "
                "another image encoder"
            )
        h = Linear(3 * config.txt_in_features, dtype=config.dtype, name="redux_up")(states)
        return Linear(config.txt_in_features, dtype=config.dtype, name="redux_down")(silu(h))

    def example_inputs(self) -> tuple:
        """The shape of the states that `init` traces the model with."""
        return (jax.ShapeDtypeStruct((1, 4, self.config.redux_dim), jnp.float32),)


PRESETS = {
    # SigLIP so400m/14 at 384 pixels, as FLUX.1 Redux has it: 428,225,600 parameters.
    "siglip-so400m": SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
    # 64,503,808 parameters.
    "flux-redux": ReduxImageEncoderConfig(),
}
