"""The U-Net of Stable Diffusion 1, 2 and XL and of DeepFloyd IF: `UNet2DConditionModel` of diffusers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real, Shaped

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import check, check_groups, check_levels
from jaxldm.models.inputs import image_shape
from jaxldm.models.unet_2d_encoder import (
    CLASS_EMBEDDINGS,
    DOWN_BLOCKS,
    RESNET_DOWN_BLOCKS,
    RESNET_UP_BLOCKS,
    Encoder2DCondition,
    Encoder2DConditionConfig,
)
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.attention import ImagePrompts, with_images
from jaxldm.nn.blocks_2d import Residuals, UpBlock2D, apply_levels
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.linear import compute_dtype
from jaxldm.nn.normalization import GroupNorm
from jaxldm.nn.token_merging import TokenMerging

UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", *RESNET_UP_BLOCKS)
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn")


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(Encoder2DConditionConfig):
    """Config of `UNet2DConditionModel`. Names and defaults are those of diffusers; a level per channel count.

    Attributes:
        layers_per_block, attention_head_dim, transformer_layers_per_block, only_cross_attention: one value
            for all levels, or one for each.
        transformer_layers_per_block: also one for each layer of a level; `reverse_` then are those of the up
            blocks, the first of which is the deepest and each of which has a layer more.
        attention_head_dim: the NUMBER of heads, despite its published name; in the SimpleCrossAttn blocks of
            DeepFloyd IF the channels per head, one number for all levels.
        cross_attention_dim: width of the text in the attention: of the text encoder's hidden states, or of
            the output of `encoder_hid_proj`, whose input is `encoder_hid_dim` wide; or that number for each
            level.
        addition_embed_type: "text_time" for SDXL's micro-conditioning: the pooled text and sinusoids of the
            `time_ids`, `addition_time_embed_dim` wide each, `projection_class_embeddings_input_dim` in all.
            "text" for IF: the text pooled by attention of `addition_embed_type_num_heads` heads.
        act_fn: a name in `ACTIVATIONS`.
        time_embedding_act_fn: an activation of the finished time embedding, or None.
        resnet_skip_time_act: the residual blocks then apply no activation to the time embedding.
        resnet_out_scale_factor, mid_block_scale_factor: divisors of the sums of residual blocks, in IF's
            blocks and in the middle.
        cross_attention_norm: "group_norm" for the text before the attention of SimpleCrossAttn blocks, or
            None.
        class_embed_type: None with `num_class_embeds` for a table of embeddings (the noise level of the x4
            upscaler), "timestep" for a sinusoid, "projection" for a vector (the image embedding of unCLIP),
            "simple_projection" for the same through one layer.
        class_embeddings_concat: the class embedding stands behind that of the time, and is not added to it.
        time_cond_proj_dim: width of LCM's guidance embedding, see `jaxldm.nn.guidance_embedding`.
        upcast_attention: kept for config.json; logits and softmax are float32 in any case.
        dtype: compute dtype.
        remat: recompute activations inside of blocks in the backward pass, to save memory.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    class_embeddings_concat: bool = False
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    time_cond_proj_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64
    dtype: str = "float32"
    remat: bool = False

    published: ClassVar = True
    fixed: ClassVar = {
        "center_input_sample": False,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
    }

    def check_values(self) -> None:
        check_levels(self, DOWN_BLOCKS, UP_BLOCKS)
        self.check_per_level()
        levels = len(self.block_out_channels)
        if self.mid_block_type is not None:
            one_of("mid_block_type", self.mid_block_type, MID_BLOCKS)
        widths = self.cross_attention_dim
        same = isinstance(widths, int) or (len(widths) == levels and len(set(widths)) == 1)
        check(same, "cross_attention_dim is one number for all levels")
        one_of("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        check(self.downsample_padding in (0, 1), "downsample_padding is 0 or 1")
        check_groups(self.block_out_channels, self.norm_num_groups)
        self.check_embeddings()
        self._check_resnet_blocks()
        compute_dtype(self.dtype)

    def _check_resnet_blocks(self):
        """Check the options of IF's blocks, two of which diffusers' other blocks ignore."""
        for name in ("act_fn", "time_embedding_act_fn"):
            one_of(name, getattr(self, name) or "silu", ACTIVATIONS)
        one_of("cross_attention_norm", self.cross_attention_norm or "none", ("none", "group_norm"))
        kinds = {*self.down_block_types, *self.up_block_types, self.mid_block_type} - {None}
        simple = {kind for kind in kinds if "Simple" in kind}
        check(
            not simple or isinstance(self.attention_head_dim, int),
            "attention_head_dim must be one number, the channels per head, with SimpleCrossAttn blocks",
        )
        others = sorted(kinds - {*RESNET_DOWN_BLOCKS, *RESNET_UP_BLOCKS, MID_BLOCKS[1]})
        check(
            not others or not (self.resnet_skip_time_act or self.resnet_out_scale_factor != 1),
            "resnet_skip_time_act and resnet_out_scale_factor are for Resnet...sampleBlock2D and "
            f"SimpleCrossAttn blocks, not for {', '.join(others)}",
        )

    @property
    def size_multiple(self) -> int:
        """Divisor of the image's sides: residual blocks cannot restore a side halved with rounding."""
        whole = {*RESNET_DOWN_BLOCKS, *RESNET_UP_BLOCKS} & {*self.down_block_types, *self.up_block_types}
        return 2 ** (len(self.block_out_channels) - 1) if whole else 1


class UNet2DConditionModel(Encoder2DCondition):
    """U-Net with spatial transformers. Rombach et al. 2022, section 3.3; Podell et al. 2023 (SDXL).

    With the SimpleCrossAttn blocks of DeepFloyd IF, the efficient U-Net of Imagen: Saharia et al. 2022,
    sections 2.3-2.5 and appendix B.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> unet = models.build("sd15-unet")
    >>> params = models.shapes(unet)
    >>> x, t, text = jnp.zeros((2, 64, 64, 4)), jnp.zeros(2), jnp.zeros((2, 77, 768))
    >>> jax.eval_shape(unet.apply, {"params": params}, x, t, text).shape
    (2, 64, 64, 4)

    Attributes:
        config: what the network is; the others are how it is called, with the same parameters.
        identity_attention: published names of blocks, such as "mid_block" or "up_blocks.1.attentions.0",
            whose self-attention is the identity (Ahn et al. 2024, arXiv:2403.17377).
        free_u: (s1, s2, b1, b2) of FreeU: factors of the skips' low frequencies, and of the backbone, in the
            first and the second up block (Si et al. 2023, arXiv:2309.11497).
        token_merging: tokens that are alike are one within the self-attention of the highest resolution that
            has any, where most of the tokens are.
    """

    config: UNet2DConditionConfig
    identity_attention: tuple[str, ...] = ()
    free_u: tuple[float, float, float, float] | None = None
    token_merging: TokenMerging | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        encoder_attention_mask: Shaped[Array, "B T"] | None = None,
        text_embeds: Float[Array, "B P"] | None = None,
        time_ids: Float[Array, "B ids"] | None = None,
        timestep_cond: Float[Array, "B guidance"] | None = None,
        class_labels: Real[Array, " B"] | Float[Array, "B labels"] | None = None,
        train: bool = False,
        *,
        down_block_additional_residuals: tuple[Float[Array, "B _ _ _"], ...] | None = None,
        mid_block_additional_residual: Float[Array, "B _ _ _"] | None = None,
        down_intrablock_additional_residuals: tuple[Float[Array, "B _ _ _"], ...] | None = None,
        image_prompts: ImagePrompts | None = None,
    ) -> Float[Array, "B H W out"]:
        """Predict the noise, v, or the noise and a variance, as trained.

        Args:
            x: `[B, H, W, in_channels]` latents, any H and W: a side halved to ceil(H / 2) is upsampled to H
                again (IF's blocks: multiples of `config.size_multiple`). For inpainting (9 channels) and
                instructions (8) the latents, then the mask and the latents of the given image; for IF's
                super-resolution (6) the noisy pixels, then those of the small image, upsampled.
            t: `[B]` floating, the path's t; may be fractional.
            encoder_hidden_states: `[B, T, config.text_dim]` of the text encoder.
            encoder_attention_mask: `[B, T]`, nonzero for the tokens to attend to; None means all.
            text_embeds: `[B, P]`, SDXL's pooled text.
            time_ids: `[B, 6]` for SDXL: height and width of the original image, top and left of the crop,
                height and width of the result, in pixels; `[B, 5]` for its refiner: the aesthetic score in
                place of the last two.
            timestep_cond: `[B, time_cond_proj_dim]`, LCM's `guidance_embedding`, or None.
            class_labels: int `[B]`, or `[B, projection_class_embeddings_input_dim]` for unCLIP; for IF's
                super-resolution the timestep of the noise in the small image.
            train: draw dropout from the rng stream "dropout".
            down_block_additional_residuals, mid_block_additional_residual: of ControlNets.
            down_intrablock_additional_residuals: of T2I-Adapters. See `jaxldm.nn.blocks_2d.Residuals`.
            image_prompts: of IP-Adapters, whose layers are in the parameters (`pipelines.with_ip_adapter`).

        Returns:
            `[B, H, W, out_channels]` in the dtype of x.

        Raises:
            InvalidArgumentError: an input that is missing, that the network does not take, or of a
                width or size that this network does not take.
        """
        config = self.config
        chex.assert_rank([x, t, encoder_hidden_states], [4, 1, 3])
        chex.assert_equal_shape_prefix([x, t, encoder_hidden_states], 1)
        self._check_widths(x, encoder_hidden_states)
        given = (text_embeds, time_ids, timestep_cond, class_labels)
        condition = self._condition(t, encoder_hidden_states, encoder_attention_mask, *given, train)
        temb, _, states, mask = condition
        condition = (temb, train, with_images(states, image_prompts), mask)
        h = Conv2d(config.block_out_channels[0], dtype=config.dtype, name="conv_in")(x)
        mid = None if config.mid_block_type is None else self._mid_block()
        residuals = Residuals(
            down_block_additional_residuals,
            mid_block_additional_residual,
            down_intrablock_additional_residuals,
        )
        blocks = self._down_blocks(), mid, self._up_blocks()
        h = apply_levels(self, h, *blocks, *condition, residuals=residuals)
        h = GroupNorm(config.norm_num_groups, config.norm_eps, config.dtype, name="conv_norm_out")(h)
        h = Conv2d(config.out_channels, dtype=config.dtype, name="conv_out")(ACTIVATIONS[config.act_fn](h))
        return h.astype(x.dtype)

    def _up_blocks(self) -> list[UpBlock2D]:
        config = self.config
        last = len(config.block_out_channels) - 1
        return [
            UpBlock2D(
                out_channels=config.block_out_channels[last - i],
                num_layers=config.of_level("layers_per_block", last - i) + 1,
                add_upsample=i < last,
                name=f"up_blocks_{i}",
                identity_attention=self._identity_attention(f"up_blocks.{i}"),
                free_u=(self.free_u[2 + i], self.free_u[i]) if self.free_u and i < 2 else None,
                **self._level_options(),
                **self._block_options(kind, last - i),
            )
            for i, kind in enumerate(config.up_block_types)
        ]

    def _check_widths(self, x: Float[Array, "B H W C"], encoder_hidden_states: Float[Array, "B T D"]) -> None:
        config = self.config
        if x.shape[-1] != config.in_channels:
            raise InvalidArgumentError(
                f"x has {x.shape[-1]} channels; this U-Net takes {config.in_channels} (4: latents, 9: with "
                "mask and masked image, 8: with the image to edit; DeepFloyd IF 3: pixels, 6: with the "
                "small image)"
            )
        if encoder_hidden_states.shape[-1] != config.text_dim:
            raise InvalidArgumentError(
                f"encoder_hidden_states are {encoder_hidden_states.shape[-1]} wide; this U-Net takes "
                f"{config.text_dim}: they come from another text encoder"
            )
        multiple, (height, width) = config.size_multiple, x.shape[1:3]
        if height % multiple or width % multiple:
            raise InvalidArgumentError(
                f"images of {height}x{width}; this U-Net takes sides that are multiples of {multiple}"
            )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of the inputs to trace the network with; None for those that it does not take."""
        config = self.config

        def row(width: int | None) -> jax.ShapeDtypeStruct | None:
            return None if width is None else jax.ShapeDtypeStruct((1, width), jnp.float32)

        text = time_ids = labels = None
        if config.addition_embed_type == "text_time":  # the config does not have the number of time_ids
            total, dim = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
            text, time_ids = row(cast(int, total) - cast(int, dim)), row(1)
        if config.class_embed_type in CLASS_EMBEDDINGS[1:]:
            labels = row(config.projection_class_embeddings_input_dim)
        elif config.has_classes:
            labels = jax.ShapeDtypeStruct((1,), jnp.int32)
        t = jax.ShapeDtypeStruct((1,), jnp.float32)
        states = jax.ShapeDtypeStruct((1, 77, config.text_dim), jnp.float32)
        return (*image_shape(config), t, states, None, text, time_ids, row(config.time_cond_proj_dim), labels)
