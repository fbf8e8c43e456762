"""What the U-Net of Stable Diffusion shares with its ControlNets: embeddings, down blocks, the middle."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check
from jaxldm.nn.activations import ACTIVATIONS
from jaxldm.nn.added_kv_attention import AddedKVOptions, TextPoolingEmbedding
from jaxldm.nn.blocks_2d import DownBlock2D, MidBlock2D
from jaxldm.nn.embeddings import TimestepEmbedding, timestep_embedding
from jaxldm.nn.linear import Embedding, Linear
from jaxldm.nn.token_merging import TokenMerging
from jaxldm.nn.transformer_2d import TransformerOptions

RESNET_DOWN_BLOCKS = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
RESNET_UP_BLOCKS = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", *RESNET_DOWN_BLOCKS)
CLASS_EMBEDDINGS = ("timestep", "projection", "simple_projection")
_DEPTH = "transformer_layers_per_block"
PER_LEVEL = ("layers_per_block", "attention_head_dim", _DEPTH, "only_cross_attention")


class Encoder2DConditionConfig(ModelConfig):
    """The checks and properties that the configs of U-Nets with texts and of their ControlNets share."""

    def check_per_level(self: Any) -> None:
        """Raise an error for a field that is neither one value nor one for each level."""
        levels = len(self.block_out_channels)
        for name in PER_LEVEL:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,) * levels
            nested = name == _DEPTH
            check(
                len(values) == levels and all(nested or isinstance(one, int) for one in values),
                f"{name} {value} should be one value, or one for each of the {levels} block_out_channels",
            )
        self._check_transformers()

    def _check_transformers(self: Any) -> None:
        """Raise an error for numbers of transformer blocks that do not fit the layers of a level."""
        last = len(self.block_out_channels) - 1
        nested = any(isinstance(self.of_level(_DEPTH, level), tuple) for level in range(last + 1))
        reverse = getattr(self, f"reverse_{_DEPTH}", None)
        check(
            reverse is not None or not nested,
            f"{_DEPTH} of each layer needs reverse_{_DEPTH}, that of the up blocks",
        )
        check(
            reverse is None or len(reverse) == last + 1,
            f"reverse_{_DEPTH} should have one value for each of the {last + 1} up blocks",
        )
        kinds = [(kind, level, 0) for level, kind in enumerate(self.down_block_types)]
        if reverse is not None:
            kinds += [(kind, last - i, 1) for i, kind in enumerate(self.up_block_types)]
        for kind, level, more in kinds:
            if "CrossAttn" not in kind:
                continue
            layers = self.transformer_layers(level, up=bool(more))
            count = self.of_level("layers_per_block", level) + more
            wanted = layers if isinstance(layers, tuple) else (layers,) * count
            name = f"reverse_{_DEPTH}" if more else _DEPTH
            check(min(wanted, default=0) > 0, f"{name} of {kind} must be 1 or more")
            check(len(wanted) == count, f"{name} of {kind} has {len(wanted)} values, its layers are {count}")

    def transformer_layers(self, level: int, up: bool = False) -> int | tuple[int, ...]:
        """The number of blocks in the transformers of a level, or one for each of its layers."""
        reverse = getattr(self, f"reverse_{_DEPTH}", None)
        if up and reverse is not None:
            return reverse[-1 - level]
        return self.of_level(_DEPTH, level)

    def check_embeddings(self: Any) -> None:
        """Raise an error for embeddings that are not known, or lack a field."""
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
    def has_classes(self: Any) -> bool:
        """Whether the network is called with `class_labels`."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def text_dim(self: Any) -> int:
        """Width of the `encoder_hidden_states` that the network is called with."""
        return self.context_dim if self.encoder_hid_dim is None else self.encoder_hid_dim

    @property
    def context_dim(self: Any) -> int:
        """Width of the text in the attention."""
        widths = self.cross_attention_dim
        return widths if isinstance(widths, int) else widths[0]

    def of_level(self, name: str, level: int) -> Any:
        """The value of a field that may be one for all levels or one for each."""
        value = getattr(self, name)
        return value[level] if isinstance(value, tuple) else value


class Encoder2DCondition(nn.Module):
    """Base of the two modules: what makes their submodules from the config.

    Attributes:
        config: an `Encoder2DConditionConfig`.
        identity_attention, token_merging: see `UNet2DConditionModel`.
    """

    config: Any
    identity_attention: tuple[str, ...] = ()
    token_merging: TokenMerging | None = None

    def _condition(
        self,
        t: Float[Array, " B"],
        states: Float[Array, "B T D"],
        mask: Array | None,
        text_embeds: Array | None,
        time_ids: Array | None,
        timestep_cond: Array | None,
        class_labels: Array | None,
        train: bool,
    ) -> tuple[Any, ...]:
        """What every block takes besides x: the time and what is added to it, train, texts, their mask."""
        config = self.config
        self._check_presence(text_embeds, time_ids, timestep_cond, class_labels)
        temb = self._embed(t, timestep_cond)
        if config.has_classes:
            of_class = self._class_embedding(cast(Array, class_labels))
            joined = config.class_embeddings_concat
            temb = jnp.concatenate([temb, of_class], axis=-1) if joined else temb + of_class
        temb = self._add_embedding(temb, text_embeds, time_ids, states)
        if config.encoder_hid_dim is not None:
            states = Linear(config.context_dim, dtype=config.dtype, name="encoder_hid_proj")(states)
        return temb, train, states, mask

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
            layers = config.transformer_layers(level, up="Up" in kind)
            merging = self.token_merging if self._merges(kind, level) else None
            options["transformer"] = TransformerOptions(
                head_dim, layers, config.use_linear_projection, only_cross_attention, merging=merging
            )
        return options

    def _merges(self, kind: str, level: int) -> bool:
        """Whether the transformers of a block are those of the highest resolution."""
        with_transformers = [i for i, down in enumerate(self.config.down_block_types) if "CrossAttn" in down]
        return level == min(with_transformers, default=-1) and not kind.startswith("UNetMid")

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
