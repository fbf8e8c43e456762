"""The U-ViT of aMUSEd: `UVit2DModel` of diffusers, from image tokens, some of them masked, to logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig, check, check_heads, height_width
from jaxldm.nn.activations import gelu, silu
from jaxldm.nn.adaptive_norm import AdaLayerNormContinuous
from jaxldm.nn.attention import CrossAttention
from jaxldm.nn.block_stack import apply_blocks
from jaxldm.nn.convolution import Conv2d, ConvTranspose2x2
from jaxldm.nn.embeddings import TimestepEmbedding, timestep_embedding
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import GlobalResponseNorm, LayerNorm, RMSNorm
from jaxldm.nn.transformer_2d import FeedForward

# Of the norms before the attention to the text between convolutions, whatever the config.
SKIP_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class UVit2DConfig(ModelConfig):
    """Config of `UVit2DModel`; names and defaults are those of diffusers.

    Attributes:
        vocab_size: rows of the token embedding: the codebook, and after it the mask token.
        codebook_size: logits for each token.
        in_channels, block_out_channels: width of the token embedding, and of the convolutions on both sides
            of the transformer, which is `hidden_size` wide and `num_hidden_layers` deep.
        downsample, upsample: the transformer runs on a quarter of the tokens, merged by 2x2 convolutions (for
            512x512 pixels).
        cond_embed_dim, encoder_hidden_size: width of the pooled text and of the text's states.
        micro_cond_encode_dim, micro_cond_embed_dim: width of the sinusoid of a micro-condition, and of all.
        sample_size: tokens per side.
        dtype: compute dtype.
        remat: recompute activations inside of layers in the backward pass, to save memory.
        scan: compile one layer for all, see `jaxldm.nn.block_stack`.
    """

    hidden_size: int = 1024
    cond_embed_dim: int = 768
    micro_cond_encode_dim: int = 256
    micro_cond_embed_dim: int = 1280
    encoder_hidden_size: int = 768
    vocab_size: int = 8256
    codebook_size: int = 8192
    in_channels: int = 768
    block_out_channels: int = 768
    num_res_blocks: int = 3
    downsample: bool = False
    upsample: bool = False
    block_num_heads: int = 12
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    layer_norm_eps: float = 1e-6
    sample_size: int | tuple[int, int] = 64
    dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    published: ClassVar = True
    fixed: ClassVar = {
        "use_bias": False,
        "ln_elementwise_affine": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }

    def check_values(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)
        check(
            self.block_out_channels % self.block_num_heads == 0,
            f"block_out_channels {self.block_out_channels} cannot be split into {self.block_num_heads} heads",
        )
        check(
            self.downsample == self.upsample, "downsample and upsample must be equal: a logit for each token"
        )
        check(
            self.vocab_size >= self.codebook_size > 0,
            f"vocab_size {self.vocab_size} must hold the {self.codebook_size} tokens of the codebook",
        )
        check(
            self.micro_cond_embed_dim % self.micro_cond_encode_dim == 0,
            f"micro_cond_embed_dim {self.micro_cond_embed_dim} is not a multiple of micro_cond_encode_dim "
            f"{self.micro_cond_encode_dim}",
        )
        compute_dtype(self.dtype)

    @property
    def num_micro_conds(self) -> int:
        """Number of micro-conditions of an image: 5 in aMUSEd."""
        return self.micro_cond_embed_dim // self.micro_cond_encode_dim


class TokenEmbedding(nn.Module):
    """Token ids `[B, h, w]` -> `[B, h, w, block_out_channels]`: a table, its norm and a 1x1 convolution."""

    config: UVit2DConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B h w"]) -> Float[Array, "B h w C"]:
        config = self.config
        h = Embedding(config.vocab_size, config.in_channels, config.dtype, name="embeddings")(tokens)
        h = RMSNorm(config.layer_norm_eps, config.dtype, name="layer_norm")(h)
        return _conv_1x1(config, config.block_out_channels, "conv")(h)


class ConvNextBlock(nn.Module):
    """(x + mlp(norm(depthwise(x)))) (1 + scale) + shift, linear in silu(c), c `[B, D]`. `[B, h, w, C]`.

    A block of ConvNeXt V2 (Woo et al. 2023, section 3.2) with a condition. The MLP acts on each pixel alone,
    apart from its global response norm.
    """

    config: UVit2DConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], c: Float[Array, "B D"]) -> Float[Array, "B h w C"]:
        config, channels = self.config, x.shape[-1]
        plain = {"use_bias": False, "dtype": config.dtype}
        h = Conv2d(channels, groups=channels, **plain, name="depthwise")(x)
        h = RMSNorm(config.layer_norm_eps, config.dtype, name="norm")(h)
        h = Linear(4 * channels, **plain, name="channelwise_linear_1")(h)
        h = GlobalResponseNorm(config.dtype, name="channelwise_norm")(gelu(h))
        h = Linear(channels, **plain, name="channelwise_linear_2")(h) + x
        both = Linear(2 * channels, **plain, name="cond_embeds_mapper")(silu(c))
        scale, shift = jnp.split(both[:, None, None, :], 2, axis=-1)
        return h * (1 + scale) + shift


class SkipFFTransformerBlock(nn.Module):
    """Twice x + attention(norm(x)) to the text, without a feed-forward. `[B, N, C]` in and out."""

    config: UVit2DConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], context: Float[Array, "B T D"]) -> Float[Array, "B N C"]:
        config = self.config
        if config.hidden_size != x.shape[-1]:
            mapped = Linear(x.shape[-1], use_bias=False, dtype=config.dtype, name="kv_mapper")
            context = mapped(silu(context))
        for i in (1, 2):
            h = RMSNorm(SKIP_EPS, config.dtype, name=f"norm{i}")(x)
            heads = config.block_num_heads
            x = x + CrossAttention(heads, config.dtype, out_bias=False, name=f"attn{i}")(h, context)
        return x


class UVitBlock(nn.Module):
    """Alternating convolutions and attention to the text. `[B, h, w, C]` -> `[B, h', w', C]`.

    Attributes:
        resize: "downsample" before them, "upsample" after them, or None.
    """

    config: UVit2DConfig
    resize: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], c: Float[Array, "B D"], context: Float[Array, "B T D"]
    ) -> Float[Array, "B H W C"]:
        config = self.config
        block, attention = ConvNextBlock, SkipFFTransformerBlock
        if config.remat:
            block, attention = nn.remat(block), nn.remat(attention)
        if self.resize == "downsample":
            x = Resize(config, down=True, name="downsample")(x)
        for i in range(config.num_res_blocks):
            x = block(config, name=f"res_blocks_{i}")(x, c)
            rows = x.reshape(x.shape[0], -1, x.shape[-1])
            x = attention(config, name=f"attention_blocks_{i}")(rows, context).reshape(x.shape)
        return Resize(config, down=False, name="upsample")(x) if self.resize == "upsample" else x


class Resize(nn.Module):
    """A norm, then a 2x2 convolution with stride 2 (`down`), or its transpose."""

    config: UVit2DConfig
    down: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        config, channels = self.config, x.shape[-1]
        x = RMSNorm(config.layer_norm_eps, config.dtype, name="norm")(x)
        if not self.down:
            return ConvTranspose2x2(channels, config.dtype, name="conv")(x)
        halve = {"kernel_size": 2, "stride": 2, "padding": 0, "use_bias": False}
        return Conv2d(channels, dtype=config.dtype, **halve, name="conv")(x)


class UVitLayer(nn.Module):
    """Self-attention, attention to the text, feed-forward, each x + f(norm(x)), norms modulated by c."""

    config: UVit2DConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], c: Float[Array, "B D"], context: Float[Array, "B T D"]
    ) -> Float[Array, "B N D"]:
        config = self.config
        plain = {"out_bias": False, "dtype": config.dtype}

        def norm(name: str, learned: type[nn.Module], **options: bool) -> AdaLayerNormContinuous:
            inner = functools.partial(learned, **options)
            return AdaLayerNormContinuous(config.layer_norm_eps, config.dtype, inner, False, name=name)

        heads = config.num_attention_heads
        x = x + CrossAttention(heads, **plain, name="attn1")(norm("norm1", RMSNorm)(x, c))
        x = x + CrossAttention(heads, **plain, name="attn2")(norm("norm2", RMSNorm)(x, c), context)
        h = norm("norm3", LayerNorm, use_bias=False)(x, c)
        return x + FeedForward(config.dtype, config.intermediate_size, use_bias=False, name="ff")(h)


class TokenLogits(nn.Module):
    """`[B, h, w, block_out_channels]` -> logits `[B, h, w, codebook_size]`."""

    config: UVit2DConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w V"]:
        config = self.config
        h = _conv_1x1(config, config.in_channels, "conv1")(x)
        h = RMSNorm(config.layer_norm_eps, config.dtype, name="layer_norm")(h)
        return _conv_1x1(config, config.codebook_size, "conv2")(h)


def _conv_1x1(config: UVit2DConfig, features: int, name: str) -> Conv2d:
    return Conv2d(features, kernel_size=1, padding=0, dtype=config.dtype, use_bias=False, name=name)


class UVit2DModel(nn.Module):
    """Image tokens -> logits of each token. Patil et al. 2024 (aMUSEd, arXiv:2401.01808), section 3.

    A transformer between convolutions (Hoogeboom et al. 2023, U-ViT), all with attention to the text.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> network = models.build("amused-256")
    >>> tokens, text = jnp.full((2, 16, 16), 8255), jnp.zeros((2, 77, 768))
    >>> condition = {"pooled_text_emb": jnp.zeros((2, 768)), "micro_conds": jnp.zeros((2, 5))}
    >>> jax.eval_shape(network.apply, {"params": models.shapes(network)}, tokens, text, **condition).shape
    (2, 16, 16, 8192)
    """

    config: UVit2DConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B h w"],
        encoder_hidden_states: Float[Array, "B T D"],
        pooled_text_emb: Float[Array, "B P"],
        micro_conds: Float[Array, "B M"],
    ) -> Float[Array, "B h w V"]:
        """Predict the logits of all tokens.

        Args:
            tokens: int `[B, h, w]`, ids of the codebook below `codebook_size`, and the mask token
                `vocab_size - 1`. h and w are even if the network halves them.
            encoder_hidden_states: `[B, T, encoder_hidden_size]` of the text encoder, the penultimate layer.
            pooled_text_emb: `[B, cond_embed_dim]`, the pooled text.
            micro_conds: `[B, 5]`: width and height of the original image, left and top of the crop, in
                pixels, and the aesthetic score.

        Returns:
            Logits `[B, h, w, codebook_size]`, float32.

        Raises:
            InvalidArgumentError: an input of a width, or tokens of a size, that this network does not take.
        """
        config = self.config
        chex.assert_rank([tokens, encoder_hidden_states, pooled_text_emb, micro_conds], [3, 3, 2, 2])
        chex.assert_equal_shape_prefix([tokens, encoder_hidden_states, pooled_text_emb, micro_conds], 1)
        self._check(tokens, encoder_hidden_states, pooled_text_emb, micro_conds)

        def project(width: int, name: str) -> Linear:
            return Linear(width, use_bias=False, dtype=config.dtype, name=name)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(config.layer_norm_eps, config.dtype, name=name)

        context = norm("encoder_proj_layer_norm")(
            project(config.hidden_size, "encoder_proj")(encoder_hidden_states)
        )
        c = self._condition(pooled_text_emb, micro_conds)
        h = TokenEmbedding(config, name="embed")(tokens)
        h = UVitBlock(config, "downsample" if config.downsample else None, name="down_block")(h, c, context)
        rows = h.reshape(h.shape[0], -1, h.shape[-1])
        rows = project(config.hidden_size, "project_to_hidden")(norm("project_to_hidden_norm")(rows))
        layer = functools.partial(UVitLayer, config)
        options: dict[str, Any] = {"scan": config.scan, "remat": config.remat}
        rows = apply_blocks(
            layer, "transformer_layers", config.num_hidden_layers, rows, c, context, **options
        )
        rows = project(config.block_out_channels, "project_from_hidden")(
            norm("project_from_hidden_norm")(rows)
        )
        h = rows.reshape(h.shape)
        h = UVitBlock(config, "upsample" if config.upsample else None, name="up_block")(h, c, context)
        return TokenLogits(config, name="mlm_layer")(h).astype(jnp.float32)

    def _condition(
        self, pooled: Float[Array, "B P"], micro_conds: Float[Array, "B M"]
    ) -> Float[Array, "B D"]:
        """Podell et al. 2023, section 2.2: a sinusoid per number, after the pooled text."""
        config = self.config
        sinusoids = timestep_embedding(
            micro_conds.reshape(-1),
            config.micro_cond_encode_dim,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
        )
        joined = [pooled.astype(jnp.float32), sinusoids.reshape(len(micro_conds), -1)]
        embedding = TimestepEmbedding(config.hidden_size, config.dtype, use_bias=False, name="cond_embed")
        return embedding(jnp.concatenate(joined, axis=-1))

    def _check(self, tokens: Array, states: Array, pooled: Array, micro_conds: Array) -> None:
        config = self.config
        for name, width, wanted in (
            ("encoder_hidden_states are", states.shape[-1], config.encoder_hidden_size),
            ("pooled_text_emb is", pooled.shape[-1], config.cond_embed_dim),
            ("micro_conds are", micro_conds.shape[-1], config.num_micro_conds),
        ):
            if width != wanted:
                raise InvalidArgumentError(f"{name} {width} wide; this U-ViT takes {wanted}")
        height, width = tokens.shape[1:]
        if config.downsample and (height % 2 or width % 2):
            raise InvalidArgumentError(
                f"{height}x{width} tokens cannot be halved: this U-ViT needs even heights and widths"
            )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the inputs to trace the network with."""
        config = self.config
        shapes = (
            (1, 77, config.encoder_hidden_size),
            (1, config.cond_embed_dim),
            (1, config.num_micro_conds),
        )
        tokens = jax.ShapeDtypeStruct((1, *height_width(config.sample_size)), jnp.int32)
        return (tokens, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


_256 = UVit2DConfig(sample_size=16)

PRESETS = {
    # aMUSEd for images of 256x256 and 512x512 pixels: 603 M and 608 M parameters.
    "amused-256": _256,
    "amused-512": dataclasses.replace(_256, sample_size=32, downsample=True, upsample=True),
}
