"""NCSN++, the U-Net of score-based models (Song et al. 2021): `UNet2DModel` of diffusers with skip blocks.

It shares with the other U-Nets of that class little but the class: config.json tells which it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.inputs import image_shape
from jaxldm.nn.activations import silu
from jaxldm.nn.blocks_2d import MidBlock2D
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.embeddings import GaussianFourier, TimestepEmbedding
from jaxldm.nn.linear import compute_dtype
from jaxldm.nn.ncsnpp_blocks_2d import (
    COLORS,
    GROUPS_OF_ATTENTION,
    SkipDownBlock2D,
    SkipUpBlock2D,
    num_groups,
)
from jaxldm.nn.normalization import GroupNorm

DOWN_BLOCKS = ("SkipDownBlock2D", "AttnSkipDownBlock2D")
UP_BLOCKS = ("SkipUpBlock2D", "AttnSkipUpBlock2D")
FREQUENCIES = 16.0  # standard deviation of those of the noise level
# What must be as in the published networks, and what diffusers has where a config.json lacks it.
_ONLY: dict[str, tuple[Any, Any]] = {
    "time_embedding_type": ("fourier", "positional"),
    "norm_num_groups": (None, 32),
    "in_channels": (COLORS, COLORS),
    "out_channels": (COLORS, COLORS),
}


@dataclasses.dataclass(frozen=True)
class NCSNppConfig(ModelConfig):
    """Config of `NCSNppModel`, a level per channel count; names are those of diffusers.

    Attributes:
        attention_head_dim: channels per head; None: one head.
        mid_block_scale_factor: divisor of the sums in the middle; sqrt(2) in published networks.
        time_embedding_type, norm_num_groups, in_channels, out_channels: these alone.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = COLORS
    out_channels: int = COLORS
    block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 256, 256, 256)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = (
        *("SkipDownBlock2D",) * 4,
        "AttnSkipDownBlock2D",
        *("SkipDownBlock2D",) * 2,
    )
    up_block_types: tuple[str, ...] = (
        *("SkipUpBlock2D",) * 2,
        "AttnSkipUpBlock2D",
        *("SkipUpBlock2D",) * 4,
    )
    mid_block_type: str | None = "UNetMidBlock2D"
    mid_block_scale_factor: float = 2**0.5
    add_attention: bool = True
    attention_head_dim: int | None = 8
    attn_norm_num_groups: int | None = None
    norm_num_groups: int | None = None
    norm_eps: float = 1e-6
    time_embedding_type: str = "fourier"
    time_embedding_dim: int | None = None
    dropout: float = 0.0
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {
        "center_input_sample": False,
        "act_fn": "silu",
        "resnet_time_scale_shift": "default",
        "class_embed_type": None,
        "num_class_embeds": None,
    }
    # Options of other blocks.
    ignored: ClassVar = frozenset(
        {
            *("num_train_timesteps", "flip_sin_to_cos", "freq_shift"),
            *("downsample_padding", "downsample_type", "upsample_type"),
        }
    )

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        otherwise = {name: absent for name, (_, absent) in _ONLY.items()}
        others = {"mid_block_scale_factor": 1.0, "norm_eps": 1e-5}
        return super().from_dict({**otherwise, **others, **entries})

    def check_values(self) -> None:
        levels, last = len(self.block_out_channels), len(self.block_out_channels) - 1
        for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            values = getattr(self, name)
            check(len(values) == levels, f"{name} has {len(values)} entries, block_out_channels {levels}")
            for value in values:
                one_of(name, value, kinds)
        for name, (only, _) in _ONLY.items():
            value = getattr(self, name)
            check(value == only, f"{name} is {only!r} in a U-Net with skip blocks, not {value!r}")
        check(self.mid_block_type in ("UNetMidBlock2D", None), "mid_block_type is 'UNetMidBlock2D' or None")
        around = any("Attn" in kind for kind in self.up_block_types)  # it normalises what it is given, too
        in_the_middle = self.add_attention and self.mid_block_type is not None
        for level, channels in enumerate(self.block_out_channels):
            attends = "Attn" in self.down_block_types[level] or "Attn" in self.up_block_types[last - level]
            multiple = GROUPS_OF_ATTENTION if attends or around else 4
            fits = channels % multiple == 0 and channels % max(num_groups(channels), 1) == 0
            check(fits, f"block_out_channels must be multiples of {multiple}, not {channels}")
            heads = attends or (level == last and in_the_middle)
            check(
                not heads or channels % (self.attention_head_dim or channels) == 0,
                f"{channels} channels cannot be split into heads of {self.attention_head_dim}",
            )
        compute_dtype(self.dtype)

    @property
    def size_multiple(self) -> int:
        """Divisor of the sides of x: every level halves them exactly."""
        return 2 ** (len(self.block_out_channels) - 1)


def has_skip_blocks(entries: Mapping[str, Any]) -> bool:
    """Whether a config.json of a `UNet2DModel` is of this network."""
    kinds = entries.get("down_block_types")
    return isinstance(kinds, list | tuple) and any(kind in DOWN_BLOCKS for kind in kinds)


class NCSNppModel(nn.Module):
    """The score of noised pictures, -eps / sigma. Song et al. 2021, arXiv:2011.13456, appendix H."""

    config: NCSNppConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W 3"], t: Float[Array, " B"], *, train: bool = False
    ) -> Float[Array, "B H W 3"]:
        """Predict the score from noisy pictures and the noise level.

        Args:
            x: `[B, H, W, 3]`, pictures of numbers in [0, 1] with noise of standard deviation t; sides that
                `config.size_multiple` divides.
            t: `[B]`, more than 0.
            train: draw dropout from the rng stream "dropout".

        Raises:
            InvalidArgumentError: sides that cannot be halved so often.
        """
        config = self.config
        chex.assert_shape(x, (None, None, None, config.in_channels))
        chex.assert_shape(t, (x.shape[0],))
        if any(side % config.size_multiple for side in x.shape[1:3]):
            raise InvalidArgumentError(
                f"x must have sides divisible by {config.size_multiple}, which residual blocks halve and "
                f"double, got {x.shape[1]} and {x.shape[2]}"
            )
        temb, width = self._embed(t), config.block_out_channels[0]
        picture, h = x, Conv2d(width, dtype=config.dtype, name="conv_in")(x)
        skips = (h,)
        for block in self._down_blocks():
            h, more, picture = block(h, picture, temb, train)
            skips += more
        if config.mid_block_type is not None:
            h = self._middle(h, temb, train)
        drawn = None
        for block in self._up_blocks():
            rest = len(skips) - block.num_layers
            h, drawn = block(h, skips[rest:], drawn, temb, train)
            skips = skips[:rest]
        h = silu(GroupNorm(num_groups(width), config.norm_eps, config.dtype, name="conv_norm_out")(h))
        h = Conv2d(config.out_channels, dtype=config.dtype, name="conv_out")(h)
        h = h.astype(jnp.float32) if drawn is None else h.astype(jnp.float32) + drawn
        return (h / t.astype(jnp.float32)[:, None, None, None]).astype(x.dtype)

    def _embed(self, t: Float[Array, " B"]) -> Float[Array, "B time"]:
        config, width = self.config, self.config.block_out_channels[0]
        features = GaussianFourier(2 * width, False, FREQUENCIES, name="time_proj")(jnp.log(t))
        dim = config.time_embedding_dim or 4 * width
        return TimestepEmbedding(dim, config.dtype, name="time_embedding")(features)

    def _options(self, kind: str, resamples: bool) -> dict[str, Any]:
        config = self.config
        return {
            "attention": "Attn" in kind,
            "attention_head_dim": config.attention_head_dim,
            "resamples": resamples,
            "eps": config.norm_eps,
            "dropout": config.dropout,
            "dtype": config.dtype,
        }

    def _down_blocks(self) -> list[SkipDownBlock2D]:
        config, last = self.config, len(self.config.block_out_channels) - 1
        levels = zip(config.down_block_types, config.block_out_channels, strict=True)
        return [
            SkipDownBlock2D(
                out_channels=channels,
                num_layers=config.layers_per_block,
                name=f"down_blocks_{level}",
                **self._options(kind, level < last),
            )
            for level, (kind, channels) in enumerate(levels)
        ]

    def _middle(self, h: Array, temb: Array, train: bool) -> Array:
        config, channels = self.config, self.config.block_out_channels[-1]
        groups = num_groups(channels)
        block = MidBlock2D(
            attention=config.add_attention,
            attention_groups=config.attn_norm_num_groups or groups,
            attention_head_dim=config.attention_head_dim,
            num_groups=groups,
            eps=config.norm_eps,
            dropout=config.dropout,
            output_scale_factor=config.mid_block_scale_factor,
            scales_attention=True,
            dtype=config.dtype,
            name="mid_block",
        )
        return block(h, temb, train)

    def _up_blocks(self) -> list[SkipUpBlock2D]:
        config, last = self.config, len(self.config.block_out_channels) - 1
        levels = zip(config.up_block_types, reversed(config.block_out_channels), strict=True)
        return [
            SkipUpBlock2D(
                out_channels=channels,
                num_layers=config.layers_per_block + 1,
                name=f"up_blocks_{level}",
                **self._options(kind, level < last),
            )
            for level, (kind, channels) in enumerate(levels)
        ]

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of (x, t) that `init` traces the model with."""
        return *image_shape(self.config), jax.ShapeDtypeStruct((1,), jnp.float32)
