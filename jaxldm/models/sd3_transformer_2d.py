"""MM-DiT, the transformer of Stable Diffusion 3 and 3.5: `SD3Transformer2DModel` of diffusers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.denoising_network import Convention
from jaxldm.nn.adaptive_norm import AdaLayerNormContinuous, Modulation, gated
from jaxldm.nn.block_stack import Within, add_after, apply_blocks
from jaxldm.nn.embeddings import (
    PatchProjection,
    TimestepTextEmbedding,
    sincos_position_embedding_2d,
    unpatchify,
)
from jaxldm.nn.initialization import Initializer, parameter, zeros
from jaxldm.nn.joint_attention import JointAttention
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import layer_norm, modulate
from jaxldm.nn.transformer_2d import FeedForward

EPS = 1e-6  # of all norms


@dataclasses.dataclass(frozen=True)
class SD3Transformer2DConfig(ModelConfig):
    """Config of `SD3Transformer2DModel`. Names and defaults are those of diffusers.

    Attributes:
        sample_size: side of the latents for which the positions are made, 128 for images of 1024x1024.
        num_attention_heads, attention_head_dim: their product is the width, equal to
            caption_projection_dim.
        joint_attention_dim, pooled_projection_dim: widths of the text's states and of the pooled text.
        pos_embed_max_size: largest side in patches, and side of the table of positions.
        dual_attention_layers: blocks with a second attention among the image tokens (SD 3.5 medium).
        qk_norm: "rms_norm" (SD 3.5) or None (SD 3).
        dtype: compute dtype.
        scan: compile one block for each run of equal blocks, see `apply_blocks`.
        remat: recompute activations inside of blocks in the backward pass, to save memory.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    dtype: str = "float32"
    scan: bool = True
    remat: bool = False

    published: ClassVar = True

    def check_values(self) -> None:
        check(
            isinstance(self.sample_size, int) and self.sample_size >= self.patch_size,
            f"sample_size {self.sample_size} must be one number, at least the patch size",
        )
        check(self.num_layers > 0, f"num_layers must be at least 1, not {self.num_layers}")
        check(
            self.caption_projection_dim == self.hidden_size,
            f"caption_projection_dim {self.caption_projection_dim} is not the width, "
            f"{self.num_attention_heads} heads of {self.attention_head_dim}",
        )
        check(self.hidden_size % 4 == 0, f"the width {self.hidden_size} must be a multiple of 4")
        check(
            all(0 <= layer < self.num_layers for layer in self.dual_attention_layers),
            f"dual_attention_layers {self.dual_attention_layers} must be of the {self.num_layers} layers",
        )
        check(isinstance(self.pos_embed_max_size, int), "pos_embed_max_size is a number of patches")
        one_of("qk_norm", self.qk_norm or "none", ("none", "rms_norm"))
        compute_dtype(self.dtype)

    def table_size(self) -> int:
        return self.pos_embed_max_size * self.hidden_size

    @property
    def hidden_size(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def runs(self) -> list[tuple[int, int, bool, bool]]:
        """Runs of equal blocks: (index of the first, how many, with dual attention, the last of all)."""
        kinds = [(i in self.dual_attention_layers, i == self.num_layers - 1) for i in range(self.num_layers)]
        first, runs = 0, []
        for kind, blocks in itertools.groupby(kinds):
            count = len(list(blocks))
            runs.append((first, count, *kind))
            first += count
        return runs


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SinCosTable(Initializer):
    """The sin-cos positions of a square grid, `[1, side * side, C]`, stretched to `base_size`."""

    base_size: int = 1

    def __call__(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, " ..."]:
        # A quarter of a gigabyte at full size: the host computes the axes, the device their product.
        side, width = math.isqrt(shape[1]), shape[2] // 2
        axis = sincos_position_embedding_2d(shape[2], 1, side, base_size=self.base_size)[:, :width]
        columns, rows = (jnp.broadcast_to(part, (side, side, width)) for part in (axis[None], axis[:, None]))
        return jnp.concatenate([columns, rows], axis=-1).reshape(shape).astype(dtype)


class PatchEmbed(nn.Module):
    """Patches through `proj`, plus the middle of the table `pos_embed`. `[B, H, W, C]` -> `[B, N, width]`.

    The table is part of the published weights although it is not trained: it is loaded and not computed,
    because a file's positions need not be those of its config. It gets no gradient.
    """

    config: SD3Transformer2DConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B N width"]:
        config = self.config
        side, width, p = config.pos_embed_max_size, config.hidden_size, config.patch_size
        tokens = PatchProjection(width, p, config.dtype, name="proj")(x)
        rows, columns = x.shape[1] // p, x.shape[2] // p
        if max(rows, columns) > side:
            raise InvalidArgumentError(
                f"latents of {x.shape[1]}x{x.shape[2]} are too large: this network has positions for "
                f"{side * p}x{side * p} (pos_embed_max_size {side})"
            )
        init = SinCosTable("constant", 0.0, config.sample_size // p)
        table = parameter(self, "pos_embed", init, (1, side * side, width))
        top, left = (side - rows) // 2, (side - columns) // 2
        middle = table.reshape(side, side, width)[top : top + rows, left : left + columns]
        return tokens + jax.lax.stop_gradient(middle).reshape(1, -1, width).astype(tokens.dtype)


class JointTransformerBlock(nn.Module):
    """Joint attention of text and image, then a feed-forward for each; all modulated by c.

    Esser et al. 2024, figure 2b.

    Attributes:
        dual: a second attention of the image to itself (SD 3.5, MM-DiT-X).
        last: the text is attended to, but not updated.
    """

    config: SD3Transformer2DConfig
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(
        self, tokens: tuple[Float[Array, "B N C"], Float[Array, "B T C"]], c: Float[Array, "B C"]
    ) -> tuple[Float[Array, "B N C"], Float[Array, "B T C"]]:
        x, text = tokens
        dtype = self.config.dtype
        h = layer_norm(x, EPS)
        shift, scale, gate, *of_mlp = Modulation(9 if self.dual else 6, dtype, name="norm1")(c)
        if self.last:
            h_text = AdaLayerNormContinuous(EPS, dtype, name="norm1_context")(text, c)
        else:
            vectors = Modulation(6, dtype, name="norm1_context")(c)
            h_text = modulate(layer_norm(text, EPS), *vectors[:2])
        attention = self._attention("attn", project_text_out=not self.last)
        out, text_out = attention(modulate(h, shift, scale), h_text)
        x = x + gated(out, gate)
        if self.dual:
            shift, scale, gate = of_mlp[3:]
            x = x + gated(cast(Array, self._attention("attn2")(modulate(h, shift, scale))), gate)
        x = self._feed_forward(x, of_mlp[:3], "ff")
        if not self.last:
            text = self._feed_forward(text + gated(text_out, vectors[2]), vectors[3:], "ff_context")
        return x, text

    def _attention(self, name: str, **options: Any) -> JointAttention:
        config = self.config
        return JointAttention(
            config.num_attention_heads,
            config.qk_norm is not None,
            eps=EPS,
            dtype=config.dtype,
            name=name,
            **options,
        )

    def _feed_forward(self, x: Array, vectors: list[Array], name: str) -> Array:
        shift, scale, gate = vectors
        forward = FeedForward(self.config.dtype, activation="gelu-approximate", name=name)
        return x + gated(forward(modulate(layer_norm(x, EPS), shift, scale)), gate)


class SD3Transformer2DModel(nn.Module):
    """MM-DiT: joint attention of two streams of tokens, text and image. Esser et al. 2024, section 4.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> mmdit = models.build("sd3-medium")
    >>> params = models.shapes(mmdit)
    >>> x, t = jnp.zeros((2, 128, 96, 16)), jnp.zeros(2)
    >>> text, pooled = jnp.zeros((2, 333, 4096)), jnp.zeros((2, 2048))
    >>> jax.eval_shape(mmdit.apply, {"params": params}, x, t, text, pooled).shape
    (2, 128, 96, 16)

    Attributes:
        config: what the network is.
        skip_layers: blocks that are left out, with the same parameters (skip-layer guidance).
    """

    config: SD3Transformer2DConfig
    skip_layers: tuple[int, ...] = ()

    convention: ClassVar[Convention] = Convention(time=lambda t: 1000.0 * t, continuous=True)
    untrained: ClassVar = ("pos_embed/pos_embed",)  # not counted by `count_params`

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        pooled_projections: Float[Array, "B P"],
        *,
        block_controlnet_hidden_states: tuple[Float[Array, "B N width"], ...] | None = None,
    ) -> Float[Array, "B H W out"]:
        """Predict the velocity.

        Args:
            x: `[B, H, W, in_channels]` latents, H and W multiples of the patch size, up to
                `pos_embed_max_size` patches.
            t: `[B]` floating, 0 (data) to 1000 (noise); `models.network` takes the path's t in [0, 1].
            encoder_hidden_states: `[B, T, joint_attention_dim]`, the text's tokens.
            pooled_projections: `[B, pooled_projection_dim]`, the pooled text.
            block_controlnet_hidden_states: of a ControlNet, added to the image's tokens behind the blocks,
                each behind as many in a row as there are blocks for one; behind the last block none is.

        Returns:
            The velocity noise - data, `[B, H, W, out_channels]` in the dtype of x.

        Raises:
            InvalidArgumentError: an input of a width that this network does not take, or latents that are too
                large or not of whole patches.
        """
        config, text, pooled = self.config, encoder_hidden_states, pooled_projections
        chex.assert_rank([x, t, text, pooled], [4, 1, 3, 2])
        chex.assert_equal_shape_prefix([x, t, text, pooled], 1)
        self._check_widths(x, text, pooled)
        h = PatchEmbed(config, name="pos_embed")(x)
        c = TimestepTextEmbedding(config.hidden_size, config.dtype, name="time_text_embed")(t, pooled)
        text = Linear(config.caption_projection_dim, dtype=config.dtype, name="context_embedder")(text)
        given = block_controlnet_hidden_states or ()
        interval = config.num_layers / max(1, len(given))
        add = add_after(given, [int(i / interval) for i in range(config.num_layers)])
        for first, count, dual, last in config.runs:
            block = functools.partial(JointTransformerBlock, config, dual, last)
            within = Within(self, first, config.num_layers - first - count)
            options = {"first": first, "scan": config.scan and count > 1, "remat": config.remat}
            options |= {"within": within, "skip": self.skip_layers, "after": None if last else add}
            h, text = apply_blocks(block, "transformer_blocks", count, (h, text), c, **options)
        h = AdaLayerNormContinuous(EPS, config.dtype, name="norm_out")(h, c)
        features = config.patch_size**2 * (config.out_channels or config.in_channels)
        options: dict[str, Any] = {"dtype": config.dtype, "kernel_init": zeros, "bias_init": zeros}
        tokens = Linear(features, **options, name="proj_out")(h)
        return unpatchify(tokens.astype(x.dtype), config.patch_size, *x.shape[1:3])

    def _check_widths(
        self, x: Float[Array, "B H W C"], text: Float[Array, "B T D"], pooled: Float[Array, "B P"]
    ) -> None:
        config = self.config
        for name, array, wanted in (
            ("x", x, config.in_channels),
            ("encoder_hidden_states", text, config.joint_attention_dim),
            ("pooled_projections", pooled, config.pooled_projection_dim),
        ):
            if array.shape[-1] != wanted:
                raise InvalidArgumentError(
                    f"{name} of width {array.shape[-1]}; this transformer takes {wanted}"
                )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (x, t, encoder_hidden_states, pooled_projections) to trace the network with."""
        config = self.config
        side = config.patch_size * min(config.sample_size // config.patch_size, config.pos_embed_max_size)
        x, text = (1, side, side, config.in_channels), (1, 77, config.joint_attention_dim)
        shapes = (x, (1,), text, (1, config.pooled_projection_dim))
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


_MEDIUM = SD3Transformer2DConfig(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
)

PRESETS = {
    # Stable Diffusion 3 medium: 2 B parameters.
    "sd3-medium": _MEDIUM,
    # Stable Diffusion 3.5 medium: 2.2 B, 2.5 B with its table of positions, and large: 8.1 B.
    "sd35-medium": dataclasses.replace(
        _MEDIUM, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
    ),
    "sd35-large": dataclasses.replace(
        _MEDIUM, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
    ),
}
