"""The transformer of FLUX.1 (Black Forest Labs 2024): separate streams of text and image, then a joint one.

Described in Black Forest Labs et al. 2025, "FLUX.1 Kontext", section 2 (arXiv:2506.15742); the double blocks
are MM-DiT's (Esser et al. 2024), the single ones have parallel attention and feed-forward (Dehghani et
al. 2023, section 2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.denoising_network import UNIT_TIME, Convention
from jaxldm.nn.activations import gelu_tanh
from jaxldm.nn.adaptive_norm import AdaLayerNormContinuous, Modulation, gated
from jaxldm.nn.block_stack import Within, add_after, apply_blocks
from jaxldm.nn.embeddings import TimestepTextEmbedding, patchify, unpatchify
from jaxldm.nn.joint_attention import JointAttention
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import layer_norm, modulate
from jaxldm.nn.rotary import rotary_embedding_of_axes
from jaxldm.nn.transformer_2d import FeedForward

PATCH = 2  # a token is 2x2 latents; the config's `patch_size` applies after that
THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class FluxTransformer2DConfig(ModelConfig):
    """Config of `FluxTransformer2DModel`; names and defaults are those of diffusers, FLUX.1-schnell's size.

    Attributes:
        in_channels: channels of a token of 2x2 latents, four times `latent_channels`.
        out_channels: None: as in_channels. Fewer where x has an image as condition after the noisy latents.
        num_layers, num_single_layers: double and single blocks.
        guidance_embeds: the network is guidance-distilled and takes the scale as an input (FLUX.1-dev).
        axes_dims_rope: channels of a head that rotate with each coordinate of a token: one that is 0 for all,
            the row, the column.
        remat: keep no activations inside the blocks for the backward pass.
        scan: blocks of a kind are one `nn.scan`: see `jaxldm.nn.block_stack`.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    published: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Any]] = {"patch_size": 1}

    def check_values(self) -> None:
        for channels in (self.in_channels, self.out_channels or self.in_channels):
            check(channels % PATCH**2 == 0, f"a token of {channels} channels is not one of 2x2 latents")
        check(
            len(self.axes_dims_rope) == 3 and sum(self.axes_dims_rope) == self.attention_head_dim,
            f"axes_dims_rope {self.axes_dims_rope} must be three numbers that add up to the "
            f"{self.attention_head_dim} of attention_head_dim",
        )
        check(all(dim % 2 == 0 for dim in self.axes_dims_rope), "axes_dims_rope must be even numbers")
        check(self.num_layers >= 0 and self.num_single_layers >= 0, "a number of blocks cannot be negative")
        compute_dtype(self.dtype)

    def table_size(self) -> int:
        return 4096 * self.attention_head_dim

    @property
    def inner_dim(self) -> int:
        """Width of the streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of x: of the latents, not of the tokens."""
        return self.in_channels // PATCH**2


def pack(latents: Float[Array, "B H W C"]) -> Float[Array, "B N 4*C"]:
    """Latents -> tokens of 2x2 of them, row by row; in a token the channels are the outer axis.

    Raises:
        InvalidArgumentError: an odd height or width.
    """
    tokens = patchify(latents, PATCH)
    split = tokens.reshape(*tokens.shape[:2], PATCH**2, latents.shape[-1])
    return split.swapaxes(2, 3).reshape(tokens.shape)


def unpack(tokens: Float[Array, "B N D"], height: int, width: int) -> Float[Array, "B {height} {width} C"]:
    """The inverse of `pack`."""
    split = tokens.reshape(*tokens.shape[:2], -1, PATCH**2)
    return unpatchify(split.swapaxes(2, 3).reshape(tokens.shape), PATCH, height, width)


def positions(num_text: int, *grids: tuple[int, int]) -> Int[np.ndarray, "N 3"]:
    """Coordinates of tokens [T + rows x columns + ..., 3]: those of text are all 0.

    Args:
        grids: (rows, columns) of the image, and of a picture next to it: those of token k are (k, row,
            column).
    """
    parts = [np.zeros((num_text, 3), np.int64)]
    for k, grid in enumerate(grids):
        row, column = np.indices(grid).reshape(2, -1)
        parts.append(np.stack([np.full_like(row, k), row, column], axis=1))
    return np.concatenate(parts)


def clip_to_float16(x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Clip to the finite range of float16, where x is float16."""
    if x.dtype != jnp.float16:
        return x
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(x, -largest, largest)


class FluxTransformerBlock(nn.Module):
    """A double block: joint attention of image and text, each with weights of its own.

    (image `[B, N, C]`, text `[B, T, C]`), c `[B, C]`, cos and sin `[T + N, D/2]` -> (image, text).
    """

    config: FluxTransformer2DConfig

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], c: Float[Array, "B C"], cos: Array, sin: Array
    ) -> tuple[Array, Array]:
        config = self.config
        image, text = streams
        shift, scale, gate, *of_image = Modulation(6, config.dtype, name="norm1")(c)
        text_shift, text_scale, text_gate, *of_text = Modulation(6, config.dtype, name="norm1_context")(c)
        attention = JointAttention(config.num_attention_heads, qk_norm=True, dtype=config.dtype, name="attn")
        image_out, text_out = attention(
            modulate(layer_norm(image), shift, scale),
            modulate(layer_norm(text), text_shift, text_scale),
            rotary=(cos, sin),
        )
        image = self._feed_forward(image + gated(image_out, gate), of_image, "ff")
        text = self._feed_forward(text + gated(text_out, text_gate), of_text, "ff_context")
        return image, clip_to_float16(text)

    def _feed_forward(self, x: Float[Array, "B N C"], modulation: list[Array], name: str) -> Array:
        shift, scale, gate = modulation
        forward = FeedForward(self.config.dtype, activation="gelu-approximate", name=name)
        return x + gated(forward(modulate(layer_norm(x), shift, scale)), gate)


class FluxSingleTransformerBlock(nn.Module):
    """A single block: attention and feed-forward in parallel on one input, with one output projection.

    x `[B, T + N, C]`, text first, c `[B, C]`, cos and sin `[T + N, D/2]` -> the same shape as x.
    """

    config: FluxTransformer2DConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B M C"], c: Float[Array, "B C"], cos: Array, sin: Array
    ) -> Float[Array, "B M C"]:
        config, width = self.config, x.shape[-1]
        shift, scale, gate = Modulation(3, config.dtype, name="norm")(c)
        h = modulate(layer_norm(x), shift, scale)
        attention = JointAttention(
            config.num_attention_heads, qk_norm=True, project_out=False, dtype=config.dtype, name="attn"
        )
        inner = gelu_tanh(Linear(4 * width, dtype=config.dtype, name="proj_mlp")(h))
        both = jnp.concatenate([cast(Array, attention(h, rotary=(cos, sin))), inner], axis=-1)
        return clip_to_float16(x + gated(Linear(width, dtype=config.dtype, name="proj_out")(both), gate))


def _places(residuals: tuple[Any, ...] | None, count: int) -> list[int]:
    """Which residual each of `count` blocks gets: blocks in a row share one."""
    interval = max(1, -(-count // max(1, len(residuals or ()))))
    return [i // interval for i in range(count)]


class FluxTransformer2DModel(nn.Module):
    """The transformer of FLUX.1.

    >>> from jaxldm import models
    >>> small = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    >>> module = models.build("flux-dev", num_layers=1, num_single_layers=1, **small)
    >>> module.config.inner_dim, module.config.latent_channels
    (16, 16)
    """

    config: FluxTransformer2DConfig

    convention: ClassVar[Convention] = UNIT_TIME

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        pooled_projections: Float[Array, "B E"],
        guidance: Float[Array, " B"] | None = None,
        reference: Float[Array, "B h w C"] | None = None,
        *,
        controlnet_block_samples: tuple[Float[Array, "B N width"], ...] | None = None,
        controlnet_single_block_samples: tuple[Float[Array, "B N width"], ...] | None = None,
    ) -> Float[Array, "B H W out"]:
        """Predict the velocity.

        Args:
            x: `[B, H, W, latent_channels]`, noisy latents; H and W even.
            t: `[B]`, the t of rectified flow: 1 is noise, 0 is data. Multiplied by 1000 inside.
            encoder_hidden_states: `[B, T, joint_attention_dim]`, T5's states of the text, any T (512 in
                FLUX.1-dev, 256 in schnell); padding is attended to as well.
            pooled_projections: `[B, pooled_projection_dim]`, CLIP's pooled state of the text.
            guidance: `[B]`, the guidance scale; required with `guidance_embeds`, else None.
            reference: `[B, h, w, latent_channels]`, latents of a picture of any size, whose tokens stand
                behind those of x (FLUX.1 Kontext).
            controlnet_block_samples, controlnet_single_block_samples: of a ControlNet, added to the image's
                tokens behind the double and the single blocks, each behind as many as there are for one.

        Returns:
            `[B, H, W, out_channels / 4]` in the dtype of x: the velocity, noise - data.

        Raises:
            InvalidArgumentError: odd sides, another number of channels, states of other text encoders,
                guidance that is missing, or given to a model without `guidance_embeds`.
        """
        config = self.config
        self._check(x, t, encoder_hidden_states, pooled_projections, guidance)
        if reference is not None and reference.shape[-1] != x.shape[-1]:
            raise InvalidArgumentError(
                f"reference has {reference.shape[-1]} channels, x has {x.shape[-1]}: give latents of one kind"
            )
        options: dict[str, Any] = {"scan": config.scan, "remat": config.remat}
        height, width = x.shape[1:3]
        tokens, grids = pack(x), [(height // PATCH, width // PATCH)]
        num_image = tokens.shape[1]
        if reference is not None:
            tokens = jnp.concatenate([tokens, pack(reference.astype(x.dtype))], axis=1)
            grids.append((reference.shape[1] // PATCH, reference.shape[2] // PATCH))
        image = Linear(config.inner_dim, dtype=config.dtype, name="x_embedder")(tokens)
        text = Linear(config.inner_dim, dtype=config.dtype, name="context_embedder")(encoder_hidden_states)
        embed = TimestepTextEmbedding(config.inner_dim, config.dtype, name="time_text_embed")
        c = embed(1000.0 * t, pooled_projections, None if guidance is None else 1000.0 * guidance)
        num_text = text.shape[1]
        coordinates = positions(num_text, *grids)
        tables = map(jnp.asarray, rotary_embedding_of_axes(coordinates, config.axes_dims_rope, THETA))
        shared = (c, *tables)
        double, single = (
            functools.partial(kind, config) for kind in (FluxTransformerBlock, FluxSingleTransformerBlock)
        )
        doubles, singles = config.num_layers, config.num_single_layers
        within = Within(self, 0, singles)
        options["after"] = add_after(controlnet_block_samples, _places(controlnet_block_samples, doubles))
        image, text = apply_blocks(
            double, "transformer_blocks", doubles, (image, text), *shared, within=within, **options
        )
        given = controlnet_single_block_samples
        options["after"] = add_after(given, _places(given, singles), num_text)
        h = jnp.concatenate([text, image], axis=1)
        within = Within(self, doubles, 0)
        h = apply_blocks(single, "single_transformer_blocks", singles, h, *shared, within=within, **options)
        h = h[:, num_text : num_text + num_image]
        h = AdaLayerNormContinuous(dtype=config.dtype, name="norm_out")(h, c)
        features = config.out_channels or config.in_channels
        tokens = Linear(features, dtype=config.dtype, name="proj_out")(h)
        return unpack(tokens.astype(x.dtype), height, width)

    def _check(self, x, t, encoder_hidden_states, pooled_projections, guidance) -> None:
        config = self.config
        chex.assert_rank([x, encoder_hidden_states, pooled_projections], [4, 3, 2])
        chex.assert_shape(t, (x.shape[0],))
        if x.shape[-1] != config.latent_channels:
            raise InvalidArgumentError(
                f"x has {x.shape[-1]} channels; this transformer takes {config.latent_channels}"
            )
        for name, value, width, field in (
            (
                "encoder_hidden_states",
                encoder_hidden_states,
                config.joint_attention_dim,
                "joint_attention_dim",
            ),
            ("pooled_projections", pooled_projections, config.pooled_projection_dim, "pooled_projection_dim"),
        ):
            if value.shape[-1] != width:
                raise InvalidArgumentError(
                    f"{name} are {value.shape[-1]} wide; this transformer takes {width} ({field} of its "
                    "config): they come from another text encoder"
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
        shapes = [(1, 128, 128, config.latent_channels), (1,), (1, 512, config.joint_attention_dim)]
        shapes += [(1, config.pooled_projection_dim), (1,)]
        specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return tuple(specs) if config.guidance_embeds else (*specs[:-1], None)


PRESETS = {
    # 11,901,408,320 parameters.
    "flux-dev": FluxTransformer2DConfig(guidance_embeds=True),
    # 11,891,178,560 parameters.
    "flux-schnell": FluxTransformer2DConfig(),
}
