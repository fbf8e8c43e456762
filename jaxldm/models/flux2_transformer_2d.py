"""FLUX.2's transformer: double blocks, then single blocks, which all share three modulations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.denoising_network import UNIT_TIME, Convention
from jaxldm.models.flux_transformer_2d import clip_to_float16
from jaxldm.nn.activations import silu
from jaxldm.nn.adaptive_norm import AdaLayerNormContinuous, Modulation, gated
from jaxldm.nn.attention import attend
from jaxldm.nn.block_stack import Within, apply_blocks
from jaxldm.nn.embeddings import TimestepEmbedding, timestep_embedding
from jaxldm.nn.joint_attention import JointAttention
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import RMSNorm, layer_norm, modulate
from jaxldm.nn.rotary import apply_rotary, rotary_embedding_of_axes

OF_REFERENCE = 10  # the first coordinate of the first picture to look at; 20 of the second, and so on


@dataclasses.dataclass(frozen=True)
class Flux2Transformer2DConfig(ModelConfig):
    """Config of `Flux2Transformer2DModel`; names and defaults are those of diffusers, FLUX.2-dev's size.

    Attributes:
        in_channels: channels of x; a token is one latent of `AutoencoderKLFlux2`, 16 pixels wide.
        out_channels: None: as in_channels.
        num_layers, num_single_layers: double and single blocks.
        timestep_guidance_channels: of the sinusoids of t and of the guidance scale.
        mlp_ratio: width between the two layers of a feed-forward, in widths of the stream.
        axes_dims_rope: channels of a head that rotate with each coordinate of a token: which image it is of,
            its row, its column, its place in the text.
        guidance_embeds: the network is guidance-distilled and takes the scale as an input (FLUX.2-dev).
        remat: keep no activations inside the blocks for the backward pass.
        scan: blocks of a kind are one `nn.scan`: see `jaxldm.nn.block_stack`.
    """

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    eps: float = 1e-6
    guidance_embeds: bool = True
    dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    published: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Any]] = {"patch_size": 1}

    def check_values(self) -> None:
        check(
            len(self.axes_dims_rope) == 4 and sum(self.axes_dims_rope) == self.attention_head_dim,
            f"axes_dims_rope {self.axes_dims_rope} must be four numbers that add up to the "
            f"{self.attention_head_dim} of attention_head_dim",
        )
        check(all(dim % 2 == 0 for dim in self.axes_dims_rope), "axes_dims_rope must be even numbers")
        check(self.mlp_ratio > 0, f"mlp_ratio must be positive, not {self.mlp_ratio}")
        check(self.rope_theta > 0, f"rope_theta must be positive, not {self.rope_theta}")
        check(self.timestep_guidance_channels > 2, "timestep_guidance_channels must be 3 or more")
        compute_dtype(self.dtype)

    def table_size(self) -> int:
        return 4096 * self.attention_head_dim

    @property
    def inner_dim(self) -> int:
        """Width of the streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Width between the two layers of a feed-forward."""
        return int(self.inner_dim * self.mlp_ratio)


def positions(num_text: int, *grids: tuple[int, int]) -> Int[np.ndarray, "N 4"]:
    """Coordinates of tokens [T + rows x columns + ..., 4]: (0, 0, 0, i) of the text's token i.

    Args:
        num_text: tokens of the text.
        grids: (rows, columns) of the image, and of the pictures next to it: theirs are (k, row, column, 0),
            with k = 0 of the image and 10, 20, ... of the pictures.
    """
    parts = [np.zeros((num_text, 4), np.int64)]
    parts[0][:, 3] = np.arange(num_text)
    for k, grid in enumerate(grids):
        row, column = np.indices(grid).reshape(2, -1)
        parts.append(np.stack([np.full_like(row, k * OF_REFERENCE), row, column, 0 * row], axis=1))
    return np.concatenate(parts)


def swiglu(x: Float[Array, "B N C"]) -> Float[Array, "B N C//2"]:
    """silu(first half of the channels) * second half. Shazeer 2020, eq. 6."""
    gate, up = jnp.split(x, 2, axis=-1)
    return silu(gate) * up


class Flux2FeedForward(nn.Module):
    """linear_out(swiglu(linear_in(x))), without biases. `[B, N, C]` -> the same shape."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        h = Linear(2 * self.features, False, self.dtype, name="linear_in")(x)
        return Linear(x.shape[-1], False, self.dtype, name="linear_out")(swiglu(h))


class Flux2TransformerBlock(nn.Module):
    """A double block: joint attention of image and text, each with weights of its own.

    (image `[B, N, C]`, text `[B, T, C]`) -> the same. of_image and of_text are shift, scale and gate of the
    attention, then of the feed-forward, `[B, C]` each; cos and sin `[T + N, D/2]`.
    """

    config: Flux2Transformer2DConfig

    @nn.compact
    def __call__(
        self,
        streams: tuple[Array, Array],
        of_image: list[Array],
        of_text: list[Array],
        cos: Array,
        sin: Array,
    ) -> tuple[Array, Array]:
        config = self.config
        image, text = streams
        attention = JointAttention(
            config.num_attention_heads,
            qk_norm=True,
            use_bias=False,
            eps=config.eps,
            dtype=config.dtype,
            name="attn",
        )
        image_out, text_out = attention(
            modulate(layer_norm(image, config.eps), *of_image[:2]),
            modulate(layer_norm(text, config.eps), *of_text[:2]),
            rotary=(cos, sin),
        )
        image = self._feed_forward(image + gated(image_out, of_image[2]), of_image[3:], "ff")
        text = self._feed_forward(text + gated(text_out, of_text[2]), of_text[3:], "ff_context")
        return image, clip_to_float16(text)

    def _feed_forward(self, x: Float[Array, "B N C"], modulation: list[Array], name: str) -> Array:
        (shift, scale, gate), config = modulation, self.config
        forward = Flux2FeedForward(config.mlp_dim, config.dtype, name=name)
        return x + gated(forward(modulate(layer_norm(x, config.eps), shift, scale)), gate)


class Flux2ParallelSelfAttention(nn.Module):
    """Attention and feed-forward in parallel: one matrix into both, one out of both. `[B, M, C]` both ways.

    Dehghani et al. 2023 (ViT-22B), section 2. The columns of the first matrix are queries, keys, values and
    the two halves of the feed-forward; the rows of the second are attention, then feed-forward.
    """

    config: Flux2Transformer2DConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B M C"], cos: Array, sin: Array) -> Float[Array, "B M C"]:
        config, width = self.config, x.shape[-1]
        h = Linear(3 * width + 2 * config.mlp_dim, False, config.dtype, name="to_qkv_mlp_proj")(x)
        query, key, value, inner = jnp.split(h, [width, 2 * width, 3 * width], axis=-1)

        def rotated(part: Float[Array, "B M C"], name: str) -> Float[Array, "B M C"]:
            heads = part.reshape(*part.shape[:2], config.num_attention_heads, -1)
            heads = RMSNorm(config.eps, config.dtype, name=name)(heads)
            return apply_rotary(heads, cos, sin).reshape(part.shape)

        query, key = rotated(query, "norm_q"), rotated(key, "norm_k")
        attended = attend(self, query, key, value, config.num_attention_heads)
        both = jnp.concatenate([attended, swiglu(inner)], axis=-1)
        return Linear(width, False, config.dtype, name="to_out")(both)


class Flux2SingleTransformerBlock(nn.Module):
    """A single block: x + gate attention_and_feed_forward(norm(x) (1 + scale) + shift).

    x `[B, T + N, C]`, text first, shift, scale and gate `[B, C]`, cos and sin `[T + N, D/2]` -> as x.
    """

    config: Flux2Transformer2DConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B M C"], modulation: list[Array], cos: Array, sin: Array
    ) -> Float[Array, "B M C"]:
        shift, scale, gate = modulation
        h = modulate(layer_norm(x, self.config.eps), shift, scale)
        h = Flux2ParallelSelfAttention(self.config, name="attn")(h, cos, sin)
        return clip_to_float16(x + gated(h, gate))


class Flux2TimestepGuidanceEmbedding(nn.Module):
    """The condition of the modulations: embeddings of t and, where it is given, of the guidance. `[B, C]`."""

    config: Flux2Transformer2DConfig

    @nn.compact
    def __call__(self, t: Float[Array, " B"], guidance: Float[Array, " B"] | None) -> Float[Array, "B C"]:
        config = self.config

        def of_number(value: Array, name: str) -> Array:
            channels = config.timestep_guidance_channels
            wave = timestep_embedding(value, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
            return TimestepEmbedding(config.inner_dim, config.dtype, use_bias=False, name=name)(wave)

        embedding = of_number(t, "timestep_embedder")
        return embedding if guidance is None else embedding + of_number(guidance, "guidance_embedder")


class Flux2Transformer2DModel(nn.Module):
    """The transformer of FLUX.2 (Black Forest Labs 2025), as diffusers has it.

    Unlike in FLUX.1 the modulations are computed once, for all blocks of a kind; a token is one latent; the
    text has positions; no layer has a bias.

    >>> from jaxldm import models
    >>> small = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 2, 2)}
    >>> module = models.build("flux2-klein-4b", num_layers=1, num_single_layers=1, **small)
    >>> module.config.inner_dim, module.config.in_channels
    (16, 128)
    """

    config: Flux2Transformer2DConfig

    convention: ClassVar[Convention] = UNIT_TIME

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        guidance: Float[Array, " B"] | None = None,
        reference: Float[Array, "B h w C"] | Sequence[Float[Array, "B _ _ C"]] | None = None,
    ) -> Float[Array, "B H W out"]:
        """Predict the velocity.

        Args:
            x: `[B, H, W, in_channels]`, noisy latents.
            t: `[B]`, the t of rectified flow: 1 is noise, 0 is data. Multiplied by 1000 inside.
            encoder_hidden_states: `[B, T, joint_attention_dim]`, states of the text from several layers of
                its encoder, joined; padding is attended to as well.
            guidance: `[B]`, the guidance scale; required with `guidance_embeds`, else None.
            reference: `[B, h, w, in_channels]`, latents of a picture of any size, whose tokens stand behind
                those of x; or of several, each of its own size.

        Returns:
            `[B, H, W, out_channels]` in the dtype of x: the velocity, noise - data.

        Raises:
            InvalidArgumentError: another number of channels, states of other text encoders, guidance that is
                missing, or given to a model without `guidance_embeds`.
        """
        config = self.config
        given: list[Any] = list(reference) if isinstance(reference, (list, tuple)) else [reference]
        given = [picture for picture in given if picture is not None]
        self._check(x, t, encoder_hidden_states, guidance, given)
        pictures = [x, *(picture.astype(x.dtype) for picture in given)]
        tokens = jnp.concatenate([z.reshape(len(z), -1, config.in_channels) for z in pictures], axis=1)
        num_text, num_image = encoder_hidden_states.shape[1], x.shape[1] * x.shape[2]

        c = Flux2TimestepGuidanceEmbedding(config, name="time_guidance_embed")(
            1000.0 * t, None if guidance is None else 1000.0 * guidance
        )
        of_image, of_text, of_both = (
            Modulation(count, config.dtype, use_bias=False, name=name)(c)
            for name, count in (
                ("double_stream_modulation_img", 6),
                ("double_stream_modulation_txt", 6),
                ("single_stream_modulation", 3),
            )
        )
        image = Linear(config.inner_dim, False, config.dtype, name="x_embedder")(tokens)
        text = Linear(config.inner_dim, False, config.dtype, name="context_embedder")(encoder_hidden_states)
        coordinates = positions(num_text, *((z.shape[1], z.shape[2]) for z in pictures))
        tables = rotary_embedding_of_axes(coordinates, config.axes_dims_rope, config.rope_theta)
        rotary = tuple(map(jnp.asarray, tables))

        double, single = (
            functools.partial(kind, config) for kind in (Flux2TransformerBlock, Flux2SingleTransformerBlock)
        )
        doubles, singles = config.num_layers, config.num_single_layers
        options: dict[str, Any] = {"scan": config.scan, "remat": config.remat}
        shared = (of_image, of_text, *rotary)
        within = Within(self, 0, singles)
        image, text = apply_blocks(
            double, "transformer_blocks", doubles, (image, text), *shared, within=within, **options
        )
        h = jnp.concatenate([text, image], axis=1)
        shared, within = (of_both, *rotary), Within(self, doubles, 0)
        h = apply_blocks(single, "single_transformer_blocks", singles, h, *shared, within=within, **options)
        h = h[:, num_text : num_text + num_image]
        h = AdaLayerNormContinuous(config.eps, config.dtype, use_bias=False, name="norm_out")(h, c)
        features = config.out_channels or config.in_channels
        tokens = Linear(features, False, config.dtype, name="proj_out")(h)
        return tokens.astype(x.dtype).reshape(*x.shape[:3], features)

    def _check(self, x, t, encoder_hidden_states, guidance, pictures) -> None:
        config = self.config
        chex.assert_rank([x, encoder_hidden_states], [4, 3])
        chex.assert_shape(t, (x.shape[0],))
        for name, value in (("x", x), *(("reference", picture) for picture in pictures)):
            if value.shape[-1] != config.in_channels:
                raise InvalidArgumentError(
                    f"{name} has {value.shape[-1]} channels; this transformer takes {config.in_channels}"
                )
        if encoder_hidden_states.shape[-1] != config.joint_attention_dim:
            raise InvalidArgumentError(
                f"encoder_hidden_states are {encoder_hidden_states.shape[-1]} wide; this transformer takes "
                f"{config.joint_attention_dim} (joint_attention_dim of its config): they come from another "
                "text encoder, or from another number of its layers"
            )
        if config.guidance_embeds and guidance is None:
            raise InvalidArgumentError("this transformer needs guidance (guidance_embeds of its config)")
        if guidance is not None:
            if not config.guidance_embeds:
                raise InvalidArgumentError("guidance given to a transformer that has no guidance_embeds")
            chex.assert_shape(guidance, (x.shape[0],))

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of an image of 1024x1024 pixels and a text of 512 tokens, to trace the network with."""
        config = self.config
        shapes = [(1, 64, 64, config.in_channels), (1,), (1, 512, config.joint_attention_dim), (1,)]
        specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return tuple(specs) if config.guidance_embeds else (*specs[:-1], None)


def _klein(num_layers: int, num_single_layers: int, heads: int, text: int) -> Flux2Transformer2DConfig:
    return Flux2Transformer2DConfig(
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        num_attention_heads=heads,
        joint_attention_dim=text,
        guidance_embeds=False,
    )


PRESETS = {
    "flux2-dev": Flux2Transformer2DConfig(),  # 32,223,281,152 parameters
    # Text of three layers of Qwen3-4B, of Qwen3-8B. 3,875,544,576 and 9,078,581,248 parameters.
    "flux2-klein-4b": _klein(5, 20, 24, 3 * 2560),
    "flux2-klein-9b": _klein(8, 24, 32, 3 * 4096),
}
