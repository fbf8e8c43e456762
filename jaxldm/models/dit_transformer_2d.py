"""DiT in the layout of diffusers: `DiTTransformer2DModel`, which repeats the embedders in every block."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.dit import LabelEmbedder, PatchEmbed
from jaxldm.models.inputs import denoiser_shapes, labels_or_null
from jaxldm.nn.activations import silu
from jaxldm.nn.adaptive_norm import ZERO, gated
from jaxldm.nn.attention import CrossAttention
from jaxldm.nn.block_stack import Within, apply_blocks
from jaxldm.nn.embeddings import (
    TimestepEmbedding,
    sincos_position_embedding_2d,
    timestep_embedding,
    unpatchify,
)
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import layer_norm, modulate
from jaxldm.nn.transformer_2d import FeedForward

FREQUENCIES = 256  # width of the sinusoid of t


@dataclasses.dataclass(frozen=True)
class DiTTransformer2DConfig(ModelConfig):
    """Config of `DiTTransformer2DModel`; names and defaults are those of diffusers (DiT-XL/2).

    Attributes:
        out_channels: None: in_channels. 8 as published: eps, then the interpolation weight of the variance.
        sample_size: side of the (square) latents that the positions are made for.
        num_embeds_ada_norm: number of classes without the null class.
        norm_eps: of the norm before the feed-forward alone; the others have 1e-6.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    published: ClassVar = True
    # The published DiTs have the config.json of Transformer2DModel, with more keys.
    fixed: ClassVar = {
        "dropout": 0.0,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "attention_type": "default",
        "caption_channels": None,
        "cross_attention_dim": None,
        "double_self_attention": False,
        "interpolation_scale": None,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_additional_conditions": None,
        "use_linear_projection": False,
    }
    # Softmax and logits are float32 in any case; this network has no group norm.
    ignored: ClassVar = frozenset({"upcast_attention", "norm_num_groups"})

    def check_values(self) -> None:
        check(self.num_layers >= 1, "num_layers must be 1 or more")
        check(isinstance(self.num_embeds_ada_norm, int), "num_embeds_ada_norm must be the number of classes")
        check(
            self.sample_size % self.patch_size == 0,
            f"a side of {self.sample_size} cannot be cut into patches of {self.patch_size}",
        )
        check(self.hidden_size % 4 == 0, "num_attention_heads x attention_head_dim must be a multiple of 4")
        one_of("activation_fn", self.activation_fn, ("gelu-approximate", "gelu", "geglu"))
        compute_dtype(self.dtype)

    def table_size(self) -> int:
        return (self.sample_size // self.patch_size) ** 2 * self.hidden_size

    @property
    def hidden_size(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_classes(self) -> int:
        """Number of real classes; the label `num_classes` is the null class."""
        return self.num_embeds_ada_norm


class TimestepLabelEmbedding(nn.Module):
    """Embeddings of time and class, added: sinusoids `[B, 256]` and labels `[B]` -> `[B, hidden_size]`."""

    config: DiTTransformer2DConfig

    @nn.compact
    def __call__(self, wave: Float[Array, "B 256"], labels: Int[Array, " B"]) -> Float[Array, "B C"]:
        config = self.config
        of_time = TimestepEmbedding(config.hidden_size, config.dtype, name="timestep_embedder")
        return of_time(wave) + LabelEmbedder(config, name="class_embedder")(labels)


class LabelledModulation(nn.Module):
    """The condition c `[B, C]` from own embedders (`emb`), and six vectors linear in silu(c)."""

    config: DiTTransformer2DConfig

    @nn.compact
    def __call__(
        self, wave: Float[Array, "B 256"], labels: Int[Array, " B"]
    ) -> tuple[Float[Array, "B C"], list[Float[Array, "B C"]]]:
        config = self.config
        c = TimestepLabelEmbedding(config, name="emb")(wave, labels)
        vectors = Linear(6 * config.hidden_size, dtype=config.dtype, **ZERO, name="linear")(silu(c))
        return c, jnp.split(vectors, 6, axis=-1)


class DiTTransformerBlock(nn.Module):
    """DiT's block with its own embedders. (x `[B, N, C]`, c of the first block or None) -> the same pair."""

    config: DiTTransformer2DConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B N C"], Float[Array, "B C"] | None],
        wave: Float[Array, "B 256"],
        labels: Int[Array, " B"],
    ) -> tuple[Float[Array, "B N C"], Float[Array, "B C"]]:
        config, (x, first) = self.config, carry
        c, vectors = LabelledModulation(config, name="norm1")(wave, labels)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
        attention = CrossAttention(
            config.num_attention_heads, config.dtype, use_bias=config.attention_bias, name="attn1"
        )
        x = x + gated(attention(modulate(layer_norm(x), shift_msa, scale_msa)), gate_msa)
        feed_forward = FeedForward(config.dtype, activation=config.activation_fn, name="ff")
        h = modulate(layer_norm(x, config.norm_eps), shift_mlp, scale_mlp)
        return x + gated(feed_forward(h), gate_mlp), c if first is None else first


class DiTTransformer2DModel(nn.Module):
    """Diffusion transformer in the layout of diffusers. Peebles & Xie 2023.

    `checkpoints.dit_from_diffusers` converts it to the original `DiT`, with one embedder for all blocks;
    `dit_to_diffusers` is the inverse. The frequencies of time are those of diffusers, 10000^(-k / 127); the
    original, with which the published weights were trained, has 10000^(-k / 128).
    """

    config: DiTTransformer2DConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        labels: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B H W out"]:
        """Predict from noisy latents, the time and the class.

        Args:
            x: `[B, H, W, in_channels]`; on sides other than the config's `sample_size` positions are
                stretched.
            t: `[B]` floating, the path's t; may be fractional.
            labels: int `[B]` in [0, num_classes], num_classes being the null class; None means the null class
                for all.

        Returns:
            `[B, H, W, out_channels]` in the dtype of x.

        Raises:
            InvalidArgumentError: another number of channels, or sides that cannot be cut into patches.
        """
        config = self.config
        chex.assert_rank([x, t], [4, 1])
        chex.assert_equal_shape_prefix([x, t], 1)
        _, height, width, channels = x.shape
        if channels != config.in_channels:
            raise InvalidArgumentError(f"x has {channels} channels; this DiT takes {config.in_channels}")
        wave = timestep_embedding(t, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1)
        labels = labels_or_null(labels, t, config.num_classes)
        h = PatchEmbed(config, name="pos_embed")(x) + self._positions(height, width)
        block, name = functools.partial(DiTTransformerBlock, config), "transformer_blocks"
        # The last layer uses the first block's embedders.
        carry = apply_blocks(block, name, 1, (h, None), wave, labels, remat=config.remat)
        options: dict[str, Any] = {"scan": config.scan, "remat": config.remat}
        options["within"] = Within(self)  # the first block is not of these, and always runs
        h, c = apply_blocks(block, name, config.num_layers - 1, carry, wave, labels, first=1, **options)
        shift, scale = jnp.split(
            Linear(2 * config.hidden_size, dtype=config.dtype, **ZERO, name="proj_out_1")(silu(c)),
            2,
            axis=-1,
        )
        features = config.patch_size**2 * (config.out_channels or config.in_channels)
        last = Linear(features, dtype=config.dtype, **ZERO, name="proj_out_2")
        tokens = last(modulate(layer_norm(h), shift, scale))
        return unpatchify(tokens.astype(x.dtype), config.patch_size, height, width)

    def _positions(self, height: int, width: int) -> Float[Array, "1 N C"]:
        config = self.config
        rows, columns, base = (side // config.patch_size for side in (height, width, config.sample_size))
        table = sincos_position_embedding_2d(config.hidden_size, rows, columns, base_size=base)
        return jnp.asarray(table[None], compute_dtype(config.dtype))

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of (x, t, labels) that `init` traces the model with."""
        return denoiser_shapes(self.config)
