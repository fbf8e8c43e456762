"""The U-Net of the x2 latent upscaler of Stable Diffusion: `UNet2DConditionModel` of diffusers with K blocks.

The blocks, the time and the ends are those of k-diffusion's U-Net, and share nothing with the other U-Nets of
that class but the class: config.json tells which it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.embeddings import GaussianFourier, TimestepEmbedding
from jaxldm.nn.k_blocks_2d import GROUP, KAttentionBlock, KResnetBlock2D, filtered_double, filtered_half
from jaxldm.nn.linear import compute_dtype

DOWN_BLOCKS = ("KDownBlock2D", "KCrossAttnDownBlock2D")
UP_BLOCKS = ("KUpBlock2D", "KCrossAttnUpBlock2D")
# What must be as in the published network, and what diffusers has where a config.json lacks it.
_ONLY: dict[str, tuple[Any, Any]] = {
    "mid_block_type": (None, "UNetMidBlock2DCrossAttn"),
    "norm_num_groups": (None, 32),
    "time_embedding_type": ("fourier", "positional"),
    "conv_in_kernel": (1, 3),
    "conv_out_kernel": (1, 3),
}


@dataclasses.dataclass(frozen=True)
class KUNet2DConditionConfig(ModelConfig):
    """Config of `KUNet2DConditionModel`, a level per channel count; names are those of diffusers.

    Attributes:
        attention_head_dim: channels per head.
        time_cond_proj_dim: width of what is added to the time: the noise level of the picture (128) and the
            pooled text.
        timestep_post_act: the activation behind the embedding of the time.
        mid_block_type, norm_num_groups, time_embedding_type, conv_in_kernel, conv_out_kernel: these alone.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 8
    out_channels: int = 5
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3)
    mid_block_type: str | None = None
    up_block_types: tuple[str, ...] = (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D")
    block_out_channels: tuple[int, ...] = (384, 384, 768, 768)
    layers_per_block: int = 4
    dropout: float = 0.0
    act_fn: str = "gelu"
    norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    attention_head_dim: int = 64
    time_embedding_type: str = "fourier"
    time_embedding_dim: int | None = None
    timestep_post_act: str | None = "gelu"
    time_cond_proj_dim: int | None = 896
    conv_in_kernel: int = 1
    conv_out_kernel: int = 1
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {
        "center_input_sample": False,
        "num_attention_heads": None,
        "class_embed_type": None,
        "num_class_embeds": None,
        "addition_embed_type": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "time_embedding_act_fn": None,
        "class_embeddings_concat": False,
        "attention_type": "default",
    }
    # Options of other blocks.
    ignored: ClassVar = frozenset(
        {
            *("freq_shift", "downsample_padding", "mid_block_scale_factor", "only_cross_attention"),
            *("transformer_layers_per_block", "reverse_transformer_layers_per_block", "dual_cross_attention"),
            *("use_linear_projection", "upcast_attention", "resnet_time_scale_shift", "resnet_skip_time_act"),
            *("resnet_out_scale_factor", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
            *("mid_block_only_cross_attention", "cross_attention_norm", "addition_embed_type_num_heads"),
        }
    )

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        otherwise = {name: absent for name, (_, absent) in _ONLY.items()}
        others = {"act_fn": "silu", "timestep_post_act": None, "time_cond_proj_dim": None}
        return super().from_dict({**otherwise, **others, **entries})

    def check_values(self) -> None:
        levels = len(self.block_out_channels)
        for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            values = getattr(self, name)
            check(len(values) == levels, f"{name} has {len(values)} entries, block_out_channels {levels}")
            for value in values:
                one_of(name, value, kinds)
        for name, (only, _) in _ONLY.items():
            value = getattr(self, name)
            check(value == only, f"{name} is {only!r} in a U-Net with K blocks, not {value!r}")
        check(self.timestep_post_act is not None, "timestep_post_act is missing")
        for name in ("act_fn", "timestep_post_act"):
            one_of(name, getattr(self, name), ACTIVATIONS)
        for channels in self.block_out_channels:
            check(channels % GROUP == 0, f"block_out_channels must be multiples of {GROUP}, not {channels}")
            check(
                channels % self.attention_head_dim == 0,
                f"{channels} channels cannot be split into heads of {self.attention_head_dim}",
            )
        check(self.time_dim % 2 == 0, f"time_embedding_dim must be even, not {self.time_dim}")
        compute_dtype(self.dtype)

    @property
    def time_dim(self) -> int:
        """Width of the embedded time."""
        return self.time_embedding_dim or 2 * self.block_out_channels[0]

    @property
    def context_dim(self) -> int:
        """Width of the text's states."""
        return self.cross_attention_dim

    @property
    def size_multiple(self) -> int:
        """Divisor of the sides of x: every level halves them exactly."""
        return 2 ** (len(self.block_out_channels) - 1)


def has_k_blocks(entries: Mapping[str, Any]) -> bool:
    """Whether a config.json of a `UNet2DConditionModel` is of this network."""
    kinds = entries.get("down_block_types")
    return isinstance(kinds, list | tuple) and any(kind in DOWN_BLOCKS for kind in kinds)


class KUNet2DConditionModel(nn.Module):
    """A U-Net whose levels pass on one skip connection each, and the deepest none.

    Crowson and Stability AI 2022, with the preconditioning of Karras et al. 2022.
    """

    config: KUNet2DConditionConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        encoder_attention_mask: Shaped[Array, "B T"] | None = None,
        timestep_cond: Float[Array, "B D2"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B H W out"]:
        """Predict F of EDM's preconditioning and, in the last channel, a number that nothing uses.

        Args:
            x: `[B, H, W, in_channels]`, sides that `config.size_multiple` divides: latents of unit variance,
                then those of the picture.
            t: `[B]`, log(sigma) / 4 of sigma = the standard deviation of the noise where alpha is 1.
            encoder_hidden_states: `[B, T, cross_attention_dim]`.
            encoder_attention_mask: `[B, T]`, nonzero for the tokens to attend to; None means all.
            timestep_cond: `[B, time_cond_proj_dim]`, see the config.
            train: draw dropout from the rng stream "dropout".

        Raises:
            InvalidArgumentError: sides that cannot be halved so often; a text of another width.
        """
        config = self.config
        chex.assert_rank([x, t, encoder_hidden_states], [4, 1, 3])
        self._check(x, encoder_hidden_states, timestep_cond)
        temb = self._embed(t, timestep_cond)
        rest = (temb, encoder_hidden_states, encoder_attention_mask, train)
        h = Conv2d(config.block_out_channels[0], 1, padding=0, dtype=config.dtype, name="conv_in")(x)
        last, skips = len(config.block_out_channels) - 1, []
        for level, kind in enumerate(config.down_block_types):
            attention = ("CrossAttn" in kind, level == last)
            h = KLevel(config, self._down_layers(level), attention, name=f"down_blocks_{level}")(h, *rest)
            skips.append(None if level == last and "CrossAttn" in kind else h)
            h = filtered_half(h) if level < last else h
        for i, kind in enumerate(config.up_block_types):
            skip = skips.pop()
            h = h if skip is None else jnp.concatenate([h, skip], axis=-1)
            layers, itself = self._up_layers(i, kind)
            h = KLevel(config, layers, ("CrossAttn" in kind, itself), name=f"up_blocks_{i}")(h, *rest)
            h = filtered_double(h) if i < last else h
        h = Conv2d(config.out_channels, 1, padding=0, dtype=config.dtype, name="conv_out")(h)
        return h.astype(x.dtype)

    def _embed(self, t: Float[Array, " B"], timestep_cond: Array | None) -> Float[Array, "B time"]:
        config = self.config
        features = GaussianFourier(config.time_dim, config.flip_sin_to_cos, name="time_proj")(t)
        embedding = TimestepEmbedding(config.time_dim, config.dtype, act=config.act_fn, name="time_embedding")
        return ACTIVATIONS[str(config.timestep_post_act)](embedding(features, timestep_cond))

    def _down_layers(self, level: int) -> tuple[tuple[int, int], ...]:
        """(channels between, channels out) of each layer."""
        channels = self.config.block_out_channels[level]
        return ((channels, channels),) * self.config.layers_per_block

    def _up_layers(self, i: int, kind: str) -> tuple[tuple[tuple[int, int], ...], bool]:
        """The layers of an up block, the last of which has the width of the next; whether pixels attend."""
        config, widths = self.config, self.config.block_out_channels[::-1]
        own, following = widths[i], widths[min(i + 1, len(widths) - 1)]
        inner = own if "CrossAttn" in kind else following
        layers = ((own, own),) * (config.layers_per_block - 1) + ((inner, following),)
        return layers, own == following == config.time_dim

    def _check(self, x: Array, states: Array, timestep_cond: Array | None) -> None:
        config = self.config
        multiple = config.size_multiple
        if any(side % multiple for side in x.shape[1:3]):
            raise InvalidArgumentError(
                f"x is {x.shape[1]}x{x.shape[2]} pixels: sides must be multiples of {multiple}"
            )
        for name, array, width in (
            ("encoder_hidden_states", states, config.cross_attention_dim),
            ("timestep_cond", timestep_cond, config.time_cond_proj_dim),
        ):
            if array is not None and array.shape[-1] != width:
                raise InvalidArgumentError(f"{name} are {array.shape[-1]} wide; this U-Net takes {width}")

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes that `init` traces the model with."""
        config = self.config
        side = 2 * config.size_multiple
        x = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.float32)
        states = jax.ShapeDtypeStruct((1, 4, config.cross_attention_dim), jnp.float32)
        if config.time_cond_proj_dim is None:
            return x, t, states
        mask = jax.ShapeDtypeStruct((1, 4), jnp.float32)
        return x, t, states, mask, jax.ShapeDtypeStruct((1, config.time_cond_proj_dim), jnp.float32)


class KLevel(nn.Module):
    """The layers of one level, at one size: a residual block and, where it has it, attention each.

    Attributes:
        layers: (channels between, channels out) of each.
        attention: (to the text, among the pixels).
    """

    config: KUNet2DConditionConfig
    layers: tuple[tuple[int, int], ...]
    attention: tuple[bool, bool]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        temb: Float[Array, "B time"],
        context: Float[Array, "B T D"],
        mask: Shaped[Array, "B T"] | None,
        train: bool,
    ) -> Float[Array, "B H W out"]:
        config = self.config
        options = (config.norm_eps, config.dropout, config.act_fn, config.dtype)
        for i, (inner, out) in enumerate(self.layers):
            x = KResnetBlock2D(out, inner, *options, name=f"resnets_{i}")(x, temb, train)
            if self.attention[0]:
                block = KAttentionBlock(
                    config.attention_head_dim, self.attention[1], config.dtype, name=f"attentions_{i}"
                )
                x = block(x, temb, context, mask)
        return x
