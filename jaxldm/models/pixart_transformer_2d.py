"""The transformer of PixArt: `PixArtTransformer2DModel` of diffusers, for latents of any size."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.inputs import image_shape
from jaxldm.nn.activations import silu
from jaxldm.nn.adaptive_norm import gated
from jaxldm.nn.attention import CrossAttention
from jaxldm.nn.block_stack import Within, apply_blocks
from jaxldm.nn.embeddings import (
    PatchProjection,
    TextProjection,
    TimestepEmbedding,
    sincos_position_embedding_2d,
    timestep_embedding,
    unpatchify,
)
from jaxldm.nn.initialization import normal, parameter
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import layer_norm, modulate
from jaxldm.nn.transformer_2d import FeedForward

SINUSOIDS = 256  # width of the sinusoids of a time or a size
FINAL_EPS = 1e-6  # of the last layer norm, whatever `norm_eps` is


@dataclasses.dataclass(frozen=True)
class PixArtTransformer2DConfig(ModelConfig):
    """Config of `PixArtTransformer2DModel`. Names and defaults are those of diffusers.

    Attributes:
        sample_size: side of the latents for which the positions are made; other sizes are stretched to it.
        out_channels: None: in_channels. PixArt's 8 are the noise and a variance, which pipelines drop.
        interpolation_scale: divides the positions; None: sample_size // 64, at least 1.
        caption_channels: width of the text encoder's states; None: that of the tokens, without a projection.
        use_additional_conditions: PixArt-Alpha's sizes and aspect ratios; None: True if sample_size is 128.
        dtype: compute dtype.
        remat: recompute activations inside of blocks in the backward pass, to save memory.
        scan: all blocks are one `jax.lax.scan`, compiled once.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    cross_attention_dim: int = 1152
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None
    dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    published: ClassVar = True
    fixed: ClassVar = {
        "activation_fn": "gelu-approximate",
        "attention_type": "default",
        "double_self_attention": False,
        "dropout": 0.0,
        "norm_elementwise_affine": False,
        "norm_type": "ada_norm_single",
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    # The first two have no effect on this norm; logits and softmax are float32 in any case.
    ignored: ClassVar = frozenset({"norm_num_groups", "num_embeds_ada_norm", "upcast_attention"})

    def check_values(self) -> None:
        for name in ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size", "sample_size"):
            value = getattr(self, name)
            check(isinstance(value, int) and value > 0, f"{name} must be a whole number above 0, not {value}")
        check(
            self.sample_size % self.patch_size == 0,
            f"a side of {self.sample_size} cannot be cut into patches of {self.patch_size}",
        )
        width = self.hidden_size
        check(width % 4 == 0, f"the width {width} must be a multiple of 4 for sin-cos positions")
        check(
            self.caption_channels is None or self.cross_attention_dim == width,
            f"cross_attention_dim must be the width of the projected text, {width}, "
            f"got {self.cross_attention_dim}",
        )
        check(
            not self.has_additional_conditions or width % 3 == 0,
            f"the width {width} must be a multiple of 3 for use_additional_conditions",
        )
        compute_dtype(self.dtype)

    def table_size(self) -> int:
        return (self.sample_size // self.patch_size) ** 2 * self.hidden_size

    @property
    def hidden_size(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def has_additional_conditions(self) -> bool:
        """Whether the network takes `resolution` and `aspect_ratio`."""
        given = self.use_additional_conditions
        return self.sample_size == 128 if given is None else given

    @property
    def text_width(self) -> int:
        """Width of the text's states that the network takes."""
        return self.caption_channels or self.cross_attention_dim


class TimestepSizeEmbeddings(nn.Module):
    """t `[B]` -> `[B, C]`, plus thirds of C for height, width and aspect ratio, if the config has them."""

    config: PixArtTransformer2DConfig

    @nn.compact
    def __call__(
        self, t: Float[Array, " B"], resolution: Array | None, aspect_ratio: Array | None
    ) -> Float[Array, "B C"]:
        config = self.config

        def embed(numbers: Float[Array, " N"], features: int, name: str) -> Float[Array, "N features"]:
            sinusoids = timestep_embedding(numbers, SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
            return TimestepEmbedding(features, config.dtype, name=name)(sinusoids)

        embedding = embed(t, config.hidden_size, "timestep_embedder")
        if not config.has_additional_conditions:
            return embedding
        third = config.hidden_size // 3
        size = embed(cast(Array, resolution).reshape(-1), third, "resolution_embedder").reshape(
            t.shape[0], 2 * third
        )
        ratio = embed(cast(Array, aspect_ratio).reshape(-1), third, "aspect_ratio_embedder").reshape(
            t.shape[0], third
        )
        return embedding + jnp.concatenate([size, ratio], axis=-1)


class AdaLayerNormSingle(nn.Module):
    """One modulation for all blocks: (linear(silu(e)) `[B, 6, C]`, e `[B, C]`), e the embedded time.

    Chen et al. 2023 (PixArt-Alpha), section 2.3: adaLN-single; every block adds its own table.
    """

    config: PixArtTransformer2DConfig

    @nn.compact
    def __call__(
        self, t: Float[Array, " B"], resolution: Array | None, aspect_ratio: Array | None
    ) -> tuple[Float[Array, "B 6 C"], Float[Array, "B C"]]:
        config = self.config
        embedding = TimestepSizeEmbeddings(config, name="emb")(t, resolution, aspect_ratio)
        modulation = Linear(6 * config.hidden_size, dtype=config.dtype, name="linear")(silu(embedding))
        return modulation.reshape(t.shape[0], 6, config.hidden_size), embedding


def modulation_table(module: nn.Module, rows: int, embedding: Float[Array, "B _ C"]) -> list[Array]:
    """The `rows` vectors `[B, C]` of a block: its own `scale_shift_table` + embedding `[B, rows or 1, C]`.

    Call it inside the compact method of the module that has the table.
    """
    width = embedding.shape[-1]
    table = parameter(module, "scale_shift_table", normal(width**-0.5), (rows, width))
    both = table[None].astype(jnp.float32) + embedding.astype(jnp.float32)
    return [row.astype(embedding.dtype) for row in jnp.moveaxis(both, 1, 0)]


class PixArtTransformerBlock(nn.Module):
    """Gated self-attention, cross-attention, gated feed-forward. x `[B, N, C]` -> the same shape.

    Chen et al. 2023, section 2.3 and figure 4: shift, scale and gate as in DiT; the cross-attention has no
    norm and no gate. Shared by all blocks: modulation `[B, 6, C]`, text `[B, T, D]` and its mask `[B, T]`.
    """

    config: PixArtTransformer2DConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        modulation: Float[Array, "B 6 C"],
        text: Float[Array, "B T D"],
        mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B N C"]:
        config = self.config
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation_table(self, 6, modulation)

        def attention(name: str) -> CrossAttention:
            heads, bias = config.num_attention_heads, config.attention_bias
            return CrossAttention(heads, config.dtype, use_bias=bias, name=name)

        h = modulate(layer_norm(x, config.norm_eps), shift_msa, scale_msa)
        x = x + gated(attention("attn1")(h), gate_msa)
        x = x + attention("attn2")(x, text, mask)
        h = modulate(layer_norm(x, config.norm_eps), shift_mlp, scale_mlp)
        feed_forward = FeedForward(config.dtype, activation="gelu-approximate", name="ff")
        return x + gated(feed_forward(h), gate_mlp)


class PixArtTransformer2DModel(nn.Module):
    """Diffusion transformer with cross-attention to a text. Chen et al. 2023 (PixArt-Alpha), 2024 (-Sigma).

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> transformer = models.build("pixart-sigma")
    >>> x, t, text = jnp.zeros((2, 128, 96, 4)), jnp.zeros(2), jnp.zeros((2, 300, 4096))
    >>> jax.eval_shape(transformer.apply, {"params": models.shapes(transformer)}, x, t, text).shape
    (2, 128, 96, 8)
    """

    config: PixArtTransformer2DConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        encoder_attention_mask: Shaped[Array, "B T"] | None = None,
        resolution: Float[Array, "B 2"] | None = None,
        aspect_ratio: Float[Array, "B 1"] | None = None,
    ) -> Float[Array, "B H W out"]:
        """Predict the noise.

        Args:
            x: `[B, H, W, in_channels]` latents, H and W multiples of `patch_size`.
            t: `[B]` floating, the path's t; may be fractional.
            encoder_hidden_states: `[B, T, caption_channels]` of the text encoder.
            encoder_attention_mask: `[B, T]`, nonzero for the tokens to attend to; None means all.
            resolution, aspect_ratio: `[B, 2]`, height and width in pixels, and `[B, 1]`, height / width: only
                for PixArt-Alpha of 1024x1024 pixels (`use_additional_conditions`).

        Returns:
            `[B, H, W, out_channels]` in the dtype of x: the noise, then a variance.

        Raises:
            InvalidArgumentError: an input that is missing, that the network does not take, or of a size
                that this network does not take.
        """
        config = self.config
        chex.assert_rank([x, t, encoder_hidden_states], [4, 1, 3])
        chex.assert_equal_shape_prefix([x, t, encoder_hidden_states], 1)
        self._check(x, encoder_hidden_states, resolution, aspect_ratio)
        height, width = x.shape[1:3]
        h = PatchEmbed(config, name="pos_embed")(x)
        modulation, embedding = AdaLayerNormSingle(config, name="adaln_single")(t, resolution, aspect_ratio)
        text = encoder_hidden_states.astype(compute_dtype(config.dtype))
        if config.caption_channels is not None:
            text = TextProjection(config.hidden_size, dtype=config.dtype, name="caption_projection")(text)
        h = apply_blocks(
            functools.partial(PixArtTransformerBlock, config),
            "transformer_blocks",
            config.num_layers,
            h,
            modulation,
            text,
            encoder_attention_mask,
            scan=config.scan,
            remat=config.remat,
            within=Within(self),
        )
        shift, scale = modulation_table(self, 2, embedding[:, None])
        h = modulate(layer_norm(h, FINAL_EPS), shift, scale)
        features = config.patch_size**2 * (config.out_channels or config.in_channels)
        tokens = Linear(features, dtype=config.dtype, name="proj_out")(h)
        return unpatchify(tokens.astype(x.dtype), config.patch_size, height, width)

    def _check(self, x, encoder_hidden_states, resolution, aspect_ratio) -> None:
        config = self.config
        if x.shape[-1] != config.in_channels:
            raise InvalidArgumentError(
                f"x has {x.shape[-1]} channels; this transformer takes {config.in_channels}"
            )
        width = encoder_hidden_states.shape[-1]
        if width != config.text_width:
            raise InvalidArgumentError(
                f"encoder_hidden_states are {width} wide; this transformer takes {config.text_width}: they "
                "come from another text encoder"
            )
        for name, value, count in (("resolution", resolution, 2), ("aspect_ratio", aspect_ratio, 1)):
            if not config.has_additional_conditions:
                if value is not None:
                    raise InvalidArgumentError(
                        f"{name} given to a transformer without use_additional_conditions: leave it out"
                    )
            elif value is None or value.shape != (x.shape[0], count):
                given = "is missing" if value is None else f"is {value.shape}"
                raise InvalidArgumentError(
                    f"{name} {given}: this transformer (use_additional_conditions) takes {count} numbers for "
                    "each example"
                )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of the inputs to trace the network with; None for those that it does not take."""

        def shape(*sides: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sides, jnp.float32)

        needed = (shape(1, 2), shape(1, 1)) if self.config.has_additional_conditions else (None, None)
        return (*image_shape(self.config), shape(1), shape(1, 300, self.config.text_width), None, *needed)


class PatchEmbed(nn.Module):
    """Patches, their linear map `proj`, and their positions: `[B, H, W, C]` -> `[B, N, hidden_size]`."""

    config: PixArtTransformer2DConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B N width"]:
        config = self.config
        patch = config.patch_size
        tokens = PatchProjection(config.hidden_size, patch, config.dtype, name="proj")(x)
        scale = config.interpolation_scale
        table = sincos_position_embedding_2d(
            config.hidden_size,
            x.shape[1] // patch,
            x.shape[2] // patch,
            base_size=config.sample_size // patch,
            interpolation_scale=max(config.sample_size // 64, 1) if scale is None else scale,
        )
        return (tokens.astype(jnp.float32) + table[None]).astype(tokens.dtype)


_SIGMA = PixArtTransformer2DConfig(
    caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
)

# PixArt-Sigma, 610,856,096 parameters, for images of 1024, 256, 512 and 2048 pixels, which differ in the
# positions.
PRESETS = {
    "pixart-sigma": _SIGMA,
    "pixart-sigma-256": dataclasses.replace(_SIGMA, sample_size=32, interpolation_scale=0.5),
    "pixart-sigma-512": dataclasses.replace(_SIGMA, sample_size=64, interpolation_scale=1),
    "pixart-sigma-2k": dataclasses.replace(_SIGMA, sample_size=256, interpolation_scale=4),
}
