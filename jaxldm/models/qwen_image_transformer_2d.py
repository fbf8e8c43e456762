"""The transformer of Qwen-Image: an MM-DiT whose blocks all have two streams, of text and of image.

Wu et al. 2025, "Qwen-Image Technical Report", arXiv:2508.02324, section 2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.denoising_network import UNIT_TIME, Convention
from jaxldm.models.flux_transformer_2d import PATCH, THETA, clip_to_float16, pack, unpack
from jaxldm.nn.activations import silu
from jaxldm.nn.adaptive_norm import ZERO, AdaLayerNormContinuous, gated
from jaxldm.nn.block_stack import Within, apply_blocks
from jaxldm.nn.embeddings import TimestepEmbedding, timestep_embedding
from jaxldm.nn.joint_attention import JointAttention
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import RMSNorm, layer_norm, modulate
from jaxldm.nn.rotary import rotary_embedding_of_axes
from jaxldm.nn.transformer_2d import FeedForward


@dataclasses.dataclass(frozen=True)
class QwenImageTransformer2DConfig(ModelConfig):
    """Config of `QwenImageTransformer2DModel`; names and defaults are those of diffusers.

    Attributes:
        in_channels: channels of a token of 2x2 latents, four times `latent_channels`.
        out_channels: of the output, not of its tokens; None: as in_channels.
        joint_attention_dim: width of the text's states.
        axes_dims_rope: channels of a head that rotate with each coordinate of a token: one that is 0 in the
            image, its row, its column.
        remat: keep no activations inside the blocks for the backward pass.
        scan: the blocks are one `nn.scan`: see `jaxldm.nn.block_stack`.
    """

    in_channels: int = 64
    out_channels: int | None = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    published: ClassVar[bool] = True
    # The variants that edit pictures and draw layers have the last three.
    fixed: ClassVar = {
        "patch_size": PATCH,
        "guidance_embeds": False,
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    }
    ignored: ClassVar = frozenset({"pooled_projection_dim"})  # in early folders; no layer has it

    def check_values(self) -> None:
        check(
            self.in_channels % PATCH**2 == 0,
            f"a token of {self.in_channels} channels is not one of 2x2 latents",
        )
        check(
            len(self.axes_dims_rope) == 3 and sum(self.axes_dims_rope) == self.attention_head_dim,
            f"axes_dims_rope {self.axes_dims_rope} must be three numbers that add up to the "
            f"{self.attention_head_dim} of attention_head_dim",
        )
        check(all(dim % 2 == 0 for dim in self.axes_dims_rope), "axes_dims_rope must be even numbers")
        check(all(dim > 0 for dim in self.axes_dims_rope), "axes_dims_rope must be numbers above 0")
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


def positions(rows: int, columns: int, num_text: int) -> Int[np.ndarray, "N 3"]:
    """Coordinates of tokens [rows x columns + T, 3], first the image: (0, row, column) around its middle.

    Rows count from -ceil(rows / 2), so that one of any size has its middle at 0. All three coordinates of the
    text's tokens are alike and go on behind the larger half of the image. Wu et al. 2025, section 2.
    """
    row, column = np.indices((rows, columns)).reshape(2, -1)
    image = np.stack([np.zeros_like(row), row - (rows - rows // 2), column - (columns - columns // 2)], 1)
    text = max(rows // 2, columns // 2) + np.arange(num_text)
    return np.concatenate([image, np.stack([text] * 3, axis=1)])


class TimeEmbedding(nn.Module):
    """1000 t as sinusoids, then Linear, SiLU, Linear: `[B]` -> `[B, dim]`."""

    dim: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B dim"]:
        wave = timestep_embedding(1000.0 * t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        return TimestepEmbedding(self.dim, self.dtype, name="timestep_embedder")(wave)


class QwenImageTransformerBlock(nn.Module):
    """Joint attention of image and text, then a feed-forward of each; each stream has its own weights.

    (image `[B, N, C]`, text `[B, T, C]`), c `[B, C]`, cos and sin `[N + T, D/2]`, `lengths` `[B]` or None,
    how many tokens count, from the first of the image on -> (image, text).
    """

    config: QwenImageTransformer2DConfig

    @nn.compact
    def __call__(
        self,
        streams: tuple[Array, Array],
        c: Float[Array, "B C"],
        cos: Array,
        sin: Array,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Array, Array]:
        config = self.config
        image, text = streams
        shift, scale, gate, *of_image = self._modulation(c, "img_mod_1")
        text_shift, text_scale, text_gate, *of_text = self._modulation(c, "txt_mod_1")
        attention = JointAttention(
            config.num_attention_heads, qk_norm=True, dtype=config.dtype, image_first=True, name="attn"
        )
        image_out, text_out = attention(
            modulate(layer_norm(image), shift, scale),
            modulate(layer_norm(text), text_shift, text_scale),
            rotary=(cos, sin),
            lengths=lengths,
        )
        image = self._feed_forward(image + gated(image_out, gate), of_image, "img_mlp")
        text = self._feed_forward(text + gated(text_out, text_gate), of_text, "txt_mlp")
        return clip_to_float16(image), clip_to_float16(text)

    def _modulation(self, c: Float[Array, "B C"], name: str) -> list[Array]:
        """Shift, scale and gate of the attention, then of the feed-forward, as `Modulation` has them."""
        vectors = Linear(6 * c.shape[-1], dtype=self.config.dtype, **ZERO, name=name)(silu(c))
        return jnp.split(vectors, 6, axis=-1)

    def _feed_forward(self, x: Float[Array, "B N C"], modulation: list[Array], name: str) -> Array:
        shift, scale, gate = modulation
        forward = FeedForward(self.config.dtype, activation="gelu-approximate", name=name)
        return x + gated(forward(modulate(layer_norm(x), shift, scale)), gate)


class QwenImageTransformer2DModel(nn.Module):
    """The transformer of Qwen-Image.

    >>> from jaxldm import models
    >>> small = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    >>> module = models.build("qwen-image", num_layers=1, **small)
    >>> module.config.inner_dim, module.config.latent_channels
    (16, 16)
    """

    config: QwenImageTransformer2DConfig

    convention: ClassVar[Convention] = UNIT_TIME

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        encoder_attention_mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B H W out"]:
        """Predict the velocity.

        Args:
            x: `[B, H, W, latent_channels]`, noisy latents; H and W even.
            t: `[B]`, the t of rectified flow: 1 is noise, 0 is data. Multiplied by 1000 inside.
            encoder_hidden_states: `[B, T, joint_attention_dim]`, the states of a text, from the last layer of
                Qwen2.5-VL.
            encoder_attention_mask: `[B, T]`, nonzero for the first n tokens of each text, which are not
                padding; None: all T. Padding has no effect.

        Returns:
            `[B, H, W, out_channels]` in the dtype of x: the velocity, noise - data.

        Raises:
            InvalidArgumentError: odd sides, another number of channels, states of another text encoder, a
                mask of another shape than the states.
        """
        config = self.config
        self._check(x, t, encoder_hidden_states, encoder_attention_mask)
        height, width = x.shape[1:3]
        tokens = pack(x)
        image = Linear(config.inner_dim, dtype=config.dtype, name="img_in")(tokens)
        text = RMSNorm(1e-6, config.dtype, name="txt_norm")(encoder_hidden_states)
        text = Linear(config.inner_dim, dtype=config.dtype, name="txt_in")(text)
        c = TimeEmbedding(config.inner_dim, config.dtype, name="time_text_embed")(t)
        coordinates = positions(height // PATCH, width // PATCH, text.shape[1])
        tables = map(jnp.asarray, rotary_embedding_of_axes(coordinates, config.axes_dims_rope, THETA))
        lengths = None
        if encoder_attention_mask is not None:
            of_text = encoder_attention_mask.astype(bool).sum(axis=1, dtype=jnp.int32)
            lengths = image.shape[1] + of_text
        block = functools.partial(QwenImageTransformerBlock, config)
        options: dict[str, Any] = {"scan": config.scan, "remat": config.remat, "within": Within(self)}
        shared = (c, *tables, lengths)
        name, count = "transformer_blocks", config.num_layers
        h, _ = apply_blocks(block, name, count, (image, text), *shared, **options)
        h = AdaLayerNormContinuous(dtype=config.dtype, name="norm_out")(h, c)
        features = PATCH**2 * (config.out_channels or config.in_channels)
        tokens = Linear(features, dtype=config.dtype, name="proj_out")(h)
        return unpack(tokens.astype(x.dtype), height, width)

    def _check(self, x: Any, t: Any, states: Any, mask: Any) -> None:
        config = self.config
        chex.assert_rank([x, states], [4, 3])
        chex.assert_shape(t, (x.shape[0],))
        if x.shape[-1] != config.latent_channels:
            raise InvalidArgumentError(
                f"x has {x.shape[-1]} channels; this transformer takes {config.latent_channels}"
            )
        if states.shape[-1] != config.joint_attention_dim:
            raise InvalidArgumentError(
                f"encoder_hidden_states are {states.shape[-1]} wide; this transformer takes "
                f"{config.joint_attention_dim} (joint_attention_dim of its config): they come from another "
                "text encoder"
            )
        if mask is not None and mask.shape != states.shape[:2]:
            raise InvalidArgumentError(
                f"encoder_attention_mask must be {list(states.shape[:2])}, as the states are, got "
                f"{list(mask.shape)}"
            )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of an image of 1024x1024 pixels and a text of 512 tokens, to trace the network with."""
        config = self.config
        shapes = [(1, 128, 128, config.latent_channels), (1,), (1, 512, config.joint_attention_dim)]
        return tuple(jax.ShapeDtypeStruct(cast(Any, shape), jnp.float32) for shape in shapes)


PRESETS = {
    # 20,430,401,088 parameters.
    "qwen-image": QwenImageTransformer2DConfig(),
}
