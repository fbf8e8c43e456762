"""The U-Net of DDPM with class conditioning: `UNet2DModel` of diffusers, for even and odd image sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import chex
import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int, Num

from jaxldm.entries import read_value
from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check, check_groups, check_levels
from jaxldm.models.inputs import check_scalar_inputs, denoiser_shapes, labels_or_null, scalars_given
from jaxldm.nn.activations import silu
from jaxldm.nn.blocks_2d import DownBlock2D, MidBlock2D, UpBlock2D, apply_levels
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.embeddings import TimestepEmbedding, timestep_embedding
from jaxldm.nn.linear import Embedding, compute_dtype
from jaxldm.nn.normalization import GroupNorm

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
RESAMPLING = ("conv", "resnet")  # of levels with attention: what changes the size


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(ModelConfig):
    """Config of `UNet2DModel`. Field names and defaults are those of diffusers, apart from these.

    Attributes:
        num_classes: number of real classes; the label `num_classes` is the null class of classifier-free
            guidance, so the published `num_class_embeds` is num_classes + 1. None: not class-conditional.
        scalar_inputs: of "guidance_scale" and "step_size", those that the network takes as further inputs,
            for students that draw in few steps; diffusers does not know them. See `models.init_from`.
        dtype: compute dtype, "float32" or "bfloat16"; parameters are float32 in any case.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    add_attention: bool = True
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    num_classes: int | None = None
    scalar_inputs: tuple[str, ...] = ()
    dtype: str = "float32"

    published: ClassVar = True
    fixed: ClassVar = {
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "class_embed_type": None,
    }
    ignored: ClassVar = frozenset({"num_train_timesteps"})

    def check_values(self) -> None:
        check_levels(self, DOWN_BLOCKS, UP_BLOCKS)
        one_of("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        one_of("downsample_type", self.downsample_type, RESAMPLING)
        one_of("upsample_type", self.upsample_type, RESAMPLING)
        check(self.mid_block_type in ("UNetMidBlock2D", None), "mid_block_type is 'UNetMidBlock2D' or None")
        check(self.downsample_padding in (0, 1), "downsample_padding is 0 or 1")
        check_groups(self.block_out_channels, self.norm_num_groups)
        check_scalar_inputs(self.scalar_inputs)
        compute_dtype(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        entries = super().to_dict()
        num_classes = entries.pop("num_classes")
        return entries | {"num_class_embeds": None if num_classes is None else num_classes + 1}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> UNet2DConfig:
        entries = dict(entries)
        num_class_embeds = read_value(
            entries.pop("num_class_embeds", None), int | None, "config.json: num_class_embeds"
        )
        num_classes = None if num_class_embeds is None else num_class_embeds - 1
        return super().from_dict(entries | {"num_classes": num_classes})


class UNet2DModel(nn.Module):
    """Residual U-Net with time and class embedding. Ho et al. 2020, appendix B, in diffusers' layout."""

    config: UNet2DConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        labels: Int[Array, " B"] | None = None,
        guidance_scale: Num[Array, " B"] | None = None,
        step_size: Num[Array, " B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B H W out"]:
        """Predict from noisy images or latents, the time and the class.

        Args:
            x: `[B, H, W, in_channels]`, any H and W: a side halved to ceil(H / 2) is upsampled to H again.
                Where residual blocks change the size, H and W are divisible by 2 for each of them.
            t: `[B]` floating, the path's t; may be fractional.
            labels: int `[B]` in [0, num_classes], num_classes being the null class; None means the null class
                for all.
            guidance_scale: `[B]`, 1 for none, and step_size: `[B]` in units of t; None unless they are among
                the config's `scalar_inputs`.
            train: draw dropout from the rng stream "dropout".

        Returns:
            `[B, H, W, out_channels]` in the dtype of x.

        Raises:
            InvalidArgumentError: labels given to a model without classes; a scalar input that is missing, or
                that the network does not take; sides that are not divisible.
        """
        config = self.config
        chex.assert_shape(x, (None, None, None, config.in_channels))
        chex.assert_shape(t, (x.shape[0],))
        self._check_size(*x.shape[1:3])
        scalars = scalars_given(config.scalar_inputs, t, guidance_scale=guidance_scale, step_size=step_size)
        temb = self._embed(t, labels, scalars)
        h = Conv2d(config.block_out_channels[0], dtype=config.dtype, name="conv_in")(x)
        mid = None if config.mid_block_type is None else self._mid()
        h = apply_levels(self, h, self._down_blocks(), mid, self._up_blocks(), temb, train)
        h = GroupNorm(config.norm_num_groups, config.norm_eps, config.dtype, name="conv_norm_out")(h)
        h = Conv2d(config.out_channels, dtype=config.dtype, name="conv_out")(silu(h))
        return h.astype(x.dtype)

    def _check_size(self, height: int, width: int) -> None:
        config = self.config
        resized = [_resamples_by_resnet(kind, config.downsample_type) for kind in config.down_block_types]
        resized += [_resamples_by_resnet(kind, config.upsample_type) for kind in config.up_block_types]
        factor = 2 ** (len(config.block_out_channels) - 1)
        if any(resized) and (height % factor or width % factor):
            raise InvalidArgumentError(
                f"x must have sides divisible by {factor}, which residual blocks halve and double, got "
                f"{height} and {width}"
            )

    def _embed(
        self, t: Float[Array, " B"], labels: Int[Array, " B"] | None, scalars: Mapping[str, Any]
    ) -> Float[Array, "B time"]:
        config = self.config
        width = config.block_out_channels[0]
        dim = config.time_embedding_dim or 4 * width

        def of_number(value: Array, name: str, **options: Any) -> Array:
            flip, shift = config.flip_sin_to_cos, config.freq_shift
            wave = timestep_embedding(value, width, flip_sin_to_cos=flip, downscale_freq_shift=shift)
            return TimestepEmbedding(dim, config.dtype, name=name, **options)(wave)

        temb = of_number(t, "time_embedding")
        for name, value in scalars.items():
            temb = temb + of_number(value, f"{name}_embedding", begins_at_zero=True)
        labels = labels_or_null(labels, t, config.num_classes)
        if labels is None:
            return temb
        return temb + Embedding(cast(int, config.num_classes) + 1, dim, config.dtype, name="class_embedding")(
            labels
        )

    def _level_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "num_groups": config.norm_num_groups,
            "eps": config.norm_eps,
            "dropout": config.dropout,
            "time_scale_shift": config.resnet_time_scale_shift,
            "attention_head_dim": config.attention_head_dim,
            "dtype": config.dtype,
        }

    def _down_blocks(self) -> list[DownBlock2D]:
        config = self.config
        last = len(config.block_out_channels) - 1
        return [
            DownBlock2D(
                out_channels=channels,
                num_layers=config.layers_per_block,
                attention=kind == "AttnDownBlock2D",
                add_downsample=i < last,
                downsample_padding=config.downsample_padding,
                resnet_resampling=_resamples_by_resnet(kind, config.downsample_type),
                name=f"down_blocks_{i}",
                **self._level_options(),
            )
            for i, (kind, channels) in enumerate(
                zip(config.down_block_types, config.block_out_channels, strict=True)
            )
        ]

    def _mid(self) -> MidBlock2D:
        config = self.config
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        return MidBlock2D(
            attention=config.add_attention, attention_groups=groups, name="mid_block", **self._level_options()
        )

    def _up_blocks(self) -> list[UpBlock2D]:
        config = self.config
        last = len(config.block_out_channels) - 1
        return [
            UpBlock2D(
                out_channels=channels,
                num_layers=config.layers_per_block + 1,
                attention=kind == "AttnUpBlock2D",
                add_upsample=i < last,
                resnet_resampling=_resamples_by_resnet(kind, config.upsample_type),
                name=f"up_blocks_{i}",
                **self._level_options(),
            )
            for i, (kind, channels) in enumerate(
                zip(config.up_block_types, reversed(config.block_out_channels), strict=True)
            )
        ]

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of (x, t, labels, guidance_scale, step_size) that `init` traces the model with."""
        return denoiser_shapes(self.config)


def _resamples_by_resnet(kind: str, resampling: str) -> bool:
    """Whether a residual block changes the size: in its own kind of levels, and where attention has it so."""
    return kind.startswith("Resnet") or (kind.startswith("Attn") and resampling == "resnet")


PRESETS = {
    # The denoiser of lecture 39's mini latent diffusion: 7x7x4 latents, 7 -> 4 -> 7.
    "mini-unet": UNet2DConfig(
        sample_size=7,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        time_embedding_dim=128,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,  # one attention layer, in the middle
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        num_classes=10,
    ),
}
