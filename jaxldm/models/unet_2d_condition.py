"""The U-Net of Stable Diffusion 1, 2 and XL and of DeepFloyd IF: `UNet2DConditionModel` of diffusers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Real, Shaped

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check, check_groups, check_levels
from jaxldm.models.inputs import image_shape
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.added_kv_attention import AddedKVOptions, TextPoolingEmbedding
from jaxldm.nn.blocks_2d import DownBlock2D, MidBlock2D, UpBlock2D, apply_levels
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.embeddings import TimestepEmbedding, timestep_embedding
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import GroupNorm
from jaxldm.nn.transformer_2d import TransformerOptions

RESNET_DOWN_BLOCKS = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
RESNET_UP_BLOCKS = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", *RESNET_DOWN_BLOCKS)
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", *RESNET_UP_BLOCKS)
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn")
CLASS_EMBEDDINGS = ("timestep", "projection", "simple_projection")
PER_LEVEL = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block", "only_cross_attention")


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(ModelConfig):
    """Config of `UNet2DConditionModel`. Names and defaults are those of diffusers; a level per channel count.

    Attributes:
        layers_per_block, attention_head_dim, transformer_layers_per_block, only_cross_attention: one value
            for all levels, or one for each.
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
    transformer_layers_per_block: int | tuple[int, ...] = 1
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
        "reverse_transformer_layers_per_block": None,
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
        levels = len(self.block_out_channels)
        for name in PER_LEVEL:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,) * levels
            check(
                len(values) == levels and all(isinstance(one, int) for one in values),
                f"{name} {value} should be one value, or one for each of the {levels} block_out_channels",
            )
        if self.mid_block_type is not None:
            one_of("mid_block_type", self.mid_block_type, MID_BLOCKS)
        widths = self.cross_attention_dim
        same = isinstance(widths, int) or (len(widths) == levels and len(set(widths)) == 1)
        check(same, "cross_attention_dim is one number for all levels")
        one_of("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        check(self.downsample_padding in (0, 1), "downsample_padding is 0 or 1")
        check_groups(self.block_out_channels, self.norm_num_groups)
        self._check_embeddings()
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

    def _check_embeddings(self):
        one_of("class_embed_type", self.class_embed_type or "none", ("none", *CLASS_EMBEDDINGS))
        check(
            not self.class_embeddings_concat or (self.has_classes and self.addition_embed_type is None),
            "class_embeddings_concat is for a U-Net with class_embed_type and without addition_embed_type",
        )
        one_of("addition_embed_type", self.addition_embed_type or "none", ("none", "text_time", "text"))
        one_of("encoder_hid_dim_type", self.encoder_hid_dim_type or "none", ("none", "text_proj"))
        check(
            self.encoder_hid_dim is not None or self.encoder_hid_dim_type is None,
            "encoder_hid_dim_type 'text_proj' needs encoder_hid_dim, the width of the text encoder's states",
        )
        if self.addition_embed_type == "text_time" or self.class_embed_type in CLASS_EMBEDDINGS[1:]:
            needed = {"projection_class_embeddings_input_dim": self.projection_class_embeddings_input_dim}
            if self.addition_embed_type == "text_time":
                needed["addition_time_embed_dim"] = self.addition_time_embed_dim
            for name, value in needed.items():
                check(value is not None, f"{name} is missing; the embeddings of this config need it")

    @property
    def has_classes(self) -> bool:
        """Whether the network is called with `class_labels`."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def text_dim(self) -> int:
        """Width of the `encoder_hidden_states` that the network is called with."""
        return self.context_dim if self.encoder_hid_dim is None else self.encoder_hid_dim

    @property
    def context_dim(self) -> int:
        """Width of the text in the attention."""
        widths = self.cross_attention_dim
        return widths if isinstance(widths, int) else widths[0]

    @property
    def size_multiple(self) -> int:
        """Divisor of the image's sides: residual blocks cannot restore a side halved with rounding."""
        whole = {*RESNET_DOWN_BLOCKS, *RESNET_UP_BLOCKS} & {*self.down_block_types, *self.up_block_types}
        return 2 ** (len(self.block_out_channels) - 1) if whole else 1

    def of_level(self, name: str, level: int) -> Any:
        """The value of a field that may be one for all levels or one for each."""
        value = getattr(self, name)
        return value[level] if isinstance(value, tuple) else value


class UNet2DConditionModel(nn.Module):
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
        config: what the network is; the other two are how it is called, with the same parameters.
        identity_attention: published names of blocks, such as "mid_block" or "up_blocks.1.attentions.0",
            whose self-attention is the identity (Ahn et al. 2024, arXiv:2403.17377).
        free_u: (s1, s2, b1, b2) of FreeU: factors of the skips' low frequencies, and of the backbone, in the
            first and the second up block (Si et al. 2023, arXiv:2309.11497).
    """

    config: UNet2DConditionConfig
    identity_attention: tuple[str, ...] = ()
    free_u: tuple[float, float, float, float] | None = None

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
        self._check_presence(text_embeds, time_ids, timestep_cond, class_labels)
        temb = self._embed(t, timestep_cond)
        if config.has_classes:
            of_class = self._class_embedding(cast(Array, class_labels))
            joined = config.class_embeddings_concat
            temb = jnp.concatenate([temb, of_class], axis=-1) if joined else temb + of_class
        temb = self._add_embedding(temb, text_embeds, time_ids, encoder_hidden_states)
        if config.encoder_hid_dim is not None:
            project = Linear(config.context_dim, dtype=config.dtype, name="encoder_hid_proj")
            encoder_hidden_states = project(encoder_hidden_states)
        condition = (temb, train, encoder_hidden_states, encoder_attention_mask)
        h = Conv2d(config.block_out_channels[0], dtype=config.dtype, name="conv_in")(x)
        mid = None if config.mid_block_type is None else self._mid_block()
        h = apply_levels(self, h, self._down_blocks(), mid, self._up_blocks(), *condition)
        h = GroupNorm(config.norm_num_groups, config.norm_eps, config.dtype, name="conv_norm_out")(h)
        h = Conv2d(config.out_channels, dtype=config.dtype, name="conv_out")(ACTIVATIONS[config.act_fn](h))
        return h.astype(x.dtype)

    def _sinusoid(self, t: Num[Array, " N"], dim: int) -> Float[Array, "N dim"]:
        config = self.config
        return timestep_embedding(
            t, dim, flip_sin_to_cos=config.flip_sin_to_cos, downscale_freq_shift=config.freq_shift
        )

    @property
    def _time_dim(self) -> int:
        return self.config.time_embedding_dim or 4 * self.config.block_out_channels[0]

    def _embed(self, t: Float[Array, " B"], timestep_cond: Array | None) -> Float[Array, "B time"]:
        config = self.config
        embedding = TimestepEmbedding(self._time_dim, config.dtype, act=config.act_fn, name="time_embedding")
        return embedding(self._sinusoid(t, config.block_out_channels[0]), timestep_cond)

    def _class_embedding(self, labels: Array) -> Float[Array, "B time"]:
        config, name = self.config, "class_embedding"
        if config.class_embed_type is None:
            return Embedding(cast(int, config.num_class_embeds), self._time_dim, config.dtype, name=name)(
                labels
            )
        if config.class_embed_type == "simple_projection":
            return Linear(self._time_dim, dtype=config.dtype, name=name)(labels)
        act = "silu"
        if config.class_embed_type == "timestep":
            labels, act = self._sinusoid(labels, config.block_out_channels[0]), config.act_fn
        return TimestepEmbedding(self._time_dim, config.dtype, act=act, name=name)(labels)

    def _add_embedding(
        self,
        temb: Float[Array, "B time"],
        text_embeds: Float[Array, "B P"] | None,
        time_ids: Float[Array, "B ids"] | None,
        states: Float[Array, "B T D"],
    ) -> Float[Array, "B time"]:
        """Add the embeddings of `addition_embed_type`, then apply `time_embedding_act_fn`."""
        config = self.config
        if config.addition_embed_type == "text_time":
            temb = temb + self._text_time_embedding(cast(Array, text_embeds), cast(Array, time_ids))
        elif config.addition_embed_type == "text":
            heads = config.addition_embed_type_num_heads
            pool = TextPoolingEmbedding(self._time_dim, heads, config.dtype, name="add_embedding")
            temb = temb + pool(states)
        if config.time_embedding_act_fn is not None:
            temb = ACTIVATIONS[config.time_embedding_act_fn](temb)
        return temb

    def _text_time_embedding(
        self, text_embeds: Float[Array, "B P"], time_ids: Float[Array, "B ids"]
    ) -> Float[Array, "B time"]:
        """Podell et al. 2023, section 2.2: a sinusoid per number, concatenated with the pooled text."""
        config = self.config
        batch, count = time_ids.shape
        dim, wanted = cast(int, config.addition_time_embed_dim), config.projection_class_embeddings_input_dim
        pooled = text_embeds.shape[-1]
        if pooled + count * dim != wanted:
            raise InvalidArgumentError(
                f"text_embeds {pooled} wide and {count} time_ids make {pooled} + {count} x {dim} numbers; "
                f"this U-Net takes {wanted}: SDXL 1280 and 6 time_ids, its refiner 1280 and 5"
            )
        sinusoids = self._sinusoid(time_ids.reshape(-1), dim).reshape(batch, count * dim)
        joined = jnp.concatenate([text_embeds.astype(jnp.float32), sinusoids], axis=-1)
        return TimestepEmbedding(self._time_dim, config.dtype, name="add_embedding")(joined)

    def _level_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "num_groups": config.norm_num_groups,
            "eps": config.norm_eps,
            "dropout": config.dropout,
            "time_scale_shift": config.resnet_time_scale_shift,
            "act": config.act_fn,
            "skip_time_act": config.resnet_skip_time_act,
            "output_scale_factor": config.resnet_out_scale_factor,
            "dtype": config.dtype,
            "remat": config.remat,
        }

    def _block_options(self, kind: str, level: int) -> dict[str, Any]:
        """The options implied by the type of a block: its attention, and how it changes the size."""
        config = self.config
        head_dim = config.of_level("attention_head_dim", level)
        only_cross_attention = config.of_level("only_cross_attention", level)
        if kind == "UNetMidBlock2DCrossAttn":
            only_cross_attention = False
        elif kind == "UNetMidBlock2DSimpleCrossAttn":
            only_cross_attention = config.mid_block_only_cross_attention
            if only_cross_attention is None:
                only_cross_attention = config.only_cross_attention is True
        options: dict[str, Any] = {"resnet_resampling": kind in (*RESNET_DOWN_BLOCKS, *RESNET_UP_BLOCKS)}
        if "SimpleCrossAttn" in kind:
            context_norm = config.cross_attention_norm is not None
            options["added_kv"] = AddedKVOptions(head_dim, only_cross_attention, context_norm)
        elif "CrossAttn" in kind:
            layers = config.of_level("transformer_layers_per_block", level)
            options["transformer"] = TransformerOptions(
                head_dim, layers, config.use_linear_projection, only_cross_attention
            )
        return options

    def _identity_attention(self, block: str) -> tuple[str, ...]:
        """The names within a block that begin those of its transformers without self-attention."""
        if any(f"{block}.".startswith(f"{name}.") for name in self.identity_attention):
            return ("",)
        inside = [name for name in self.identity_attention if name.startswith(f"{block}.")]
        return tuple(name.removeprefix(f"{block}.").replace(".", "_") for name in inside)

    def _mid_block(self) -> MidBlock2D:
        config = self.config
        options: dict[str, Any] = {
            **self._level_options(),
            "output_scale_factor": config.mid_block_scale_factor,
        }
        options |= self._block_options(cast(str, config.mid_block_type), len(config.block_out_channels) - 1)
        options["identity_attention"] = self._identity_attention("mid_block")
        return MidBlock2D(name="mid_block", **options)

    def _down_blocks(self) -> list[DownBlock2D]:
        config = self.config
        last = len(config.block_out_channels) - 1
        return [
            DownBlock2D(
                out_channels=config.block_out_channels[level],
                num_layers=config.of_level("layers_per_block", level),
                add_downsample=level < last,
                downsample_padding=config.downsample_padding,
                name=f"down_blocks_{level}",
                identity_attention=self._identity_attention(f"down_blocks.{level}"),
                **self._level_options(),
                **self._block_options(kind, level),
            )
            for level, kind in enumerate(config.down_block_types)
        ]

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

    def _check_presence(self, text_embeds, time_ids, timestep_cond, class_labels) -> None:
        config = self.config
        needs_text = config.addition_embed_type == "text_time"
        for name, value, needed, field in (
            ("text_embeds", text_embeds, needs_text, "addition_embed_type"),
            ("time_ids", time_ids, needs_text, "addition_embed_type"),
            ("class_labels", class_labels, config.has_classes, "class_embed_type"),
        ):
            if needed and value is None:
                raise InvalidArgumentError(f"this U-Net needs {name} ({field} of its config)")
            if value is not None and not needed:
                raise InvalidArgumentError(f"{name} given to a U-Net that has no {field}")
        if timestep_cond is not None and config.time_cond_proj_dim is None:
            raise InvalidArgumentError("timestep_cond given to a U-Net that has no time_cond_proj_dim")

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
        x = image_shape(config)
        return (*x, t, states, None, text, time_ids, row(config.time_cond_proj_dim), labels)
