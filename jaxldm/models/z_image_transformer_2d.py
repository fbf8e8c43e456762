"""Z-Image's single-stream diffusion transformer: image and text as one sequence of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxldm.errors import InvalidArgumentError
from jaxldm.models.config import ModelConfig, check
from jaxldm.models.denoising_network import FROM_NOISE_TO_DATA, Convention
from jaxldm.nn.activations import silu
from jaxldm.nn.adaptive_norm import gated
from jaxldm.nn.block_stack import Within, apply_blocks
from jaxldm.nn.embeddings import TimestepEmbedding, patchify, timestep_embedding, unpatchify
from jaxldm.nn.initialization import parameter, zeros
from jaxldm.nn.joint_attention import JointAttention
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.normalization import RMSNorm, layer_norm
from jaxldm.nn.rotary import rotary_embedding, rotary_embedding_of_axes
from jaxldm.nn.transformer_encoder import SwiGLU

TOKENS_AT_ONCE = 32  # text and image are padded to a multiple of it, with learned tokens
TIME_WIDTH = 256  # of the embedding of t, and of its sinusoids

Rotary = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class ZImageTransformer2DConfig(ModelConfig):
    """Config of `ZImageTransformer2DModel`; names and defaults are those of diffusers.

    Attributes:
        all_patch_size, all_f_patch_size: one patch size, and 1 image at a time.
        n_refiner_layers: blocks of the image alone, and as many of the text alone, before the `n_layers` of
            both.
        cap_feat_dim: width of the text's states.
        axes_dims: channels of a head that rotate with a token's position in the sequence, its row and its
            column; together a head's width.
        axes_lens: number of positions, rows and columns.
        t_scale: factor of t before its embedding.
        scan: compile one block for all of a kind.
        remat: recompute activations inside of blocks in the backward pass, to save memory.
    """

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)
    dtype: str = "float32"
    scan: bool = True
    remat: bool = False

    published: ClassVar[bool] = True
    fixed: ClassVar = {"siglip_feat_dim": None}

    def check_values(self) -> None:
        check(
            len(self.all_patch_size) == 1 and tuple(self.all_f_patch_size) == (1,),
            f"all_patch_size {self.all_patch_size} and all_f_patch_size {self.all_f_patch_size}: one patch "
            "size is supported, with 1 image at a time, as in (2,) and (1,)",
        )
        check(self.dim % self.n_heads == 0, f"dim {self.dim} cannot be split into {self.n_heads} heads")
        check(self.n_kv_heads == self.n_heads, "n_kv_heads must be n_heads: keys are not shared by heads")
        check(
            len(self.axes_dims) == len(self.axes_lens) == 3,
            f"axes_dims {self.axes_dims} and axes_lens {self.axes_lens} must have three numbers each",
        )
        check(
            sum(self.axes_dims) == self.dim // self.n_heads and all(dim % 2 == 0 for dim in self.axes_dims),
            f"axes_dims {self.axes_dims} must be even and add up to a head's width, "
            f"{self.dim // self.n_heads}",
        )
        compute_dtype(self.dtype)

    def table_size(self) -> int:
        return 4096 * sum(self.axes_dims)

    @property
    def patch_size(self) -> int:
        """Side of the square of latents that is one token."""
        return self.all_patch_size[0]

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that leaves a position for the image after it."""
        return (self.axes_lens[0] - 2) // TOKENS_AT_ONCE * TOKENS_AT_ONCE


class ZImageTransformerBlock(nn.Module):
    """x + gate norm(attention(norm(x) scale)), then the same with the feed-forward. x `[B, N, C]`.

    An RMS norm before and after each branch. The scales, 1 + s, and gates, tanh(g), of both branches are
    linear in the embedded time c `[B, 256]`; without `modulation` they are 1, and c is ignored. `rotary` is
    (cos, sin) of the tokens' positions; the first `lengths` `[B]` tokens are attended to, or all.
    """

    config: ZImageTransformer2DConfig
    modulation: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        rotary: Rotary,
        lengths: Int[Array, " B"] | None,
        c: Float[Array, "B D"] | None,
    ) -> Float[Array, "B N C"]:
        config = self.config

        def norm(name: str, x: Any) -> Array:
            return RMSNorm(config.norm_eps, config.dtype, name=name)(x)

        attention = JointAttention(
            config.n_heads, config.qk_norm, use_bias=False, eps=1e-5, dtype=config.dtype, name="attention"
        )
        inner = int(config.dim / 3 * 8)
        feed_forward = SwiGLU(inner, ("w1", "w3", "w2"), config.dtype, name="feed_forward")
        if not self.modulation:
            h = attention(norm("attention_norm1", x), rotary=rotary, lengths=lengths)
            x = x + norm("attention_norm2", h)
            return x + norm("ffn_norm2", feed_forward(norm("ffn_norm1", x)))
        modulation = Linear(4 * config.dim, dtype=config.dtype, name="adaLN_modulation_0")(cast(Array, c))
        scale_msa, gate_msa, scale_mlp, gate_mlp = jnp.split(modulation, 4, axis=-1)
        h = attention(gated(norm("attention_norm1", x), 1 + scale_msa), rotary=rotary, lengths=lengths)
        x = x + gated(norm("attention_norm2", h), jnp.tanh(gate_msa))
        h = feed_forward(gated(norm("ffn_norm1", x), 1 + scale_mlp))
        return x + gated(norm("ffn_norm2", h), jnp.tanh(gate_mlp))


class FinalLayer(nn.Module):
    """layer_norm(x) (1 + scale), scale linear in silu(c), and a linear map: `[B, N, C]` -> `[B, N, out]`."""

    config: ZImageTransformer2DConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], c: Float[Array, "B D"]) -> Float[Array, "B N out"]:
        config = self.config
        scale = Linear(config.dim, dtype=config.dtype, name="adaLN_modulation_1")(silu(c))
        out = config.patch_size**2 * config.in_channels
        return Linear(out, dtype=config.dtype, name="linear")(gated(layer_norm(x, 1e-6), 1 + scale))


class OfPatchSize(nn.Module):
    """A layer that the checkpoint has under its patch size, as in `all_x_embedder.2-1`."""

    make_layer: Callable[..., nn.Module]
    patch_size: int

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        return self.make_layer(name=f"{self.patch_size}-1")(*inputs)


class ZImageTransformer2DModel(nn.Module):
    """Z-Image. Z-Image Team 2025, arXiv:2511.22699, section 4 (scalable single-stream DiT).

    The positions of the text start at 1, and the whole image has the position after the text, so that its
    rotary angles depend on the text's length.

    >>> import jax
    >>> from jaxldm import models
    >>> module = models.build("z-image", dim=24, n_heads=2, n_kv_heads=2, n_layers=2, axes_dims=(4, 4, 4),
    ...                       cap_feat_dim=8)
    >>> params = models.init(module, jax.random.key(0))
    >>> x, text = jax.numpy.zeros((1, 8, 6, 16)), jax.numpy.ones((1, 5, 8))
    >>> module.apply({"params": params}, x, jax.numpy.array([0.5]), text).shape
    (1, 8, 6, 16)
    """

    config: ZImageTransformer2DConfig

    convention: ClassVar[Convention] = FROM_NOISE_TO_DATA

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        encoder_hidden_states: Float[Array, "B T D"],
        encoder_attention_mask: Shaped[Array, "B T"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Predict the velocity.

        Args:
            x: `[B, H, W, in_channels]`, H and W multiples of the patch size.
            t: `[B]` in [0, 1]: 0 is noise and 1 is data, unlike on a path; see `models.network`.
            encoder_hidden_states: `[B, T, cap_feat_dim]`, the states of a text, from the penultimate layer
                of Qwen3.
            encoder_attention_mask: `[B, T]`, nonzero for the first n tokens of each text, which are not
                padding; None: all T. Texts are padded to a multiple of 32 with a learned token, which is
                attended to like the others, so that a text of 40 tokens gives the same result in rows of 64
                and of 512.

        Returns:
            `[B, H, W, in_channels]` in the dtype of x: the velocity from noise to data, x_0 - noise.

        Raises:
            InvalidArgumentError: sizes that cannot be cut into patches, or beyond `axes_lens`.
        """
        config, size = self.config, cast(tuple[int, int], x.shape[1:3])
        self._check(x, encoder_hidden_states)
        c = self._time(t)
        image = self._image_tokens(x)
        text, lengths = self._text_tokens(encoder_hidden_states, encoder_attention_mask)
        padded = encoder_attention_mask is not None
        of_image, of_text = self._rotary(size, text.shape[1], lengths)

        def blocks(name: str, count: int, x: Array, *shared: object, modulation: bool = True) -> Array:
            block = partial(ZImageTransformerBlock, config, modulation)
            within = Within(self) if name == "layers" else None  # the refiners always run
            options: dict[str, Any] = {"scan": config.scan, "remat": config.remat, "within": within}
            return apply_blocks(block, name, count, x, *shared, **options)

        refiners = config.n_refiner_layers
        image = blocks("noise_refiner", refiners, image, of_image, None, c)
        text = blocks(
            "context_refiner", refiners, text, of_text, lengths if padded else None, None, modulation=False
        )
        rotary = jax.tree.map(_append, of_image, of_text)
        attended = image.shape[1] + lengths if padded else None  # the image comes first
        h = blocks("layers", config.n_layers, _append(image, text), rotary, attended, c)

        rows, columns = (side // config.patch_size for side in size)
        final = OfPatchSize(partial(FinalLayer, config), config.patch_size, name="all_final_layer")
        return unpatchify(final(h[:, : rows * columns], c).astype(x.dtype), config.patch_size, *size)

    def _time(self, t: Float[Array, " B"]) -> Float[Array, "B D"]:
        config = self.config
        wave = timestep_embedding(
            t.astype(jnp.float32) * config.t_scale, TIME_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        width = min(config.dim, TIME_WIDTH)
        embed = TimestepEmbedding(
            width, config.dtype, hidden_dim=1024, names=("mlp_0", "mlp_2"), name="t_embedder"
        )
        return embed(wave)

    def _image_tokens(self, x: Float[Array, "B H W C"]) -> Float[Array, "B N width"]:
        """Patches, padded to a multiple of 32 with a learned token."""
        config = self.config
        embed = OfPatchSize(
            partial(Linear, config.dim, dtype=config.dtype), config.patch_size, name="all_x_embedder"
        )
        tokens = embed(patchify(x, config.patch_size))
        padding = parameter(self, "x_pad_token", zeros, (1, config.dim)).astype(tokens.dtype)
        missing = _rounded_up(tokens.shape[1]) - tokens.shape[1]
        return _append(tokens, jnp.broadcast_to(padding[None], (len(x), missing, config.dim)))

    def _text_tokens(
        self, states: Float[Array, "B T D"], given: Array | None
    ) -> tuple[Float[Array, "B padded C"], Int[Array, " b"]]:
        """The padded text, and its length after padding: `[B]`, or `[1]` for all where no mask is given."""
        config = self.config
        h = RMSNorm(config.norm_eps, config.dtype, name="cap_embedder_0")(states)
        h = Linear(config.dim, dtype=config.dtype, name="cap_embedder_1")(h)
        padding = parameter(self, "cap_pad_token", zeros, (1, config.dim)).astype(h.dtype)
        length, padded = h.shape[1], _rounded_up(h.shape[1])
        h = jnp.pad(h, ((0, 0), (0, padded - length), (0, 0)))
        positions = jnp.arange(padded)[None]
        if given is None:
            return jnp.where((positions < length)[..., None], h, padding[None]), jnp.array([padded])
        lengths = (given != 0).sum(axis=1, dtype=jnp.int32)
        h = jnp.where((positions < lengths[:, None])[..., None], h, padding[None])
        return h, _rounded_up(lengths)

    def _rotary(
        self, size: tuple[int, int], text_length: int, lengths: Int[Array, " b"]
    ) -> tuple[Rotary, Rotary]:
        """(cos, sin), float32 `[b, N, d/2]`, of image and text; the padding of the image is not rotated."""
        config = self.config
        (along, *across), theta = config.axes_dims, config.rope_theta
        positions = np.zeros((text_length, 3), int)
        positions[:, 0] = 1 + np.arange(text_length)
        of_text = rotary_embedding_of_axes(positions, config.axes_dims, theta)

        rows, columns = (side // config.patch_size for side in size)
        count, padded = rows * columns, _rounded_up(rows * columns)
        within = np.zeros((padded, 2), int)
        within[:count] = np.stack(list(np.indices((rows, columns)).reshape(2, -1)), axis=1)
        fixed = rotary_embedding_of_axes(within, across, theta)
        after_text = rotary_embedding(np.arange(text_length + 2), along, theta)
        is_image = np.arange(padded)[None, :, None] < count

        def of_image(moving: Any, fixed: Any, at_zero: float) -> Array:
            """The angles of the position after the text, before those of row and column."""
            moving = jnp.take(jnp.asarray(moving), lengths + 1, axis=0)[:, None]
            moving = jnp.where(is_image, moving, jnp.float32(at_zero))
            fixed = jnp.broadcast_to(jnp.asarray(fixed)[None], (len(moving), *fixed.shape))
            return jnp.concatenate([moving, fixed], axis=-1)

        image = cast(Rotary, tuple(map(of_image, after_text, fixed, (1.0, 0.0))))
        text = tuple(
            jnp.broadcast_to(jnp.asarray(table)[None], (len(lengths), *table.shape)) for table in of_text
        )
        return image, cast(Rotary, text)

    def _check(self, x: Float[Array, "B H W C"], states: Float[Array, "B T D"]) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[-1] != config.in_channels:
            raise InvalidArgumentError(f"x must be [B, H, W, {config.in_channels}], not {x.shape}")
        if states.ndim != 3 or states.shape[-1] != config.cap_feat_dim or states.shape[1] == 0:
            raise InvalidArgumentError(
                f"encoder_hidden_states must be [B, T, {config.cap_feat_dim}], not {states.shape}"
            )
        _, rows, columns = config.axes_lens
        most = (rows * config.patch_size, columns * config.patch_size)
        if x.shape[1] > most[0] or x.shape[2] > most[1]:
            raise InvalidArgumentError(
                f"latents of {x.shape[1]}x{x.shape[2]}, but axes_lens reach to {most[0]}x{most[1]}"
            )
        if states.shape[1] > config.longest_text:
            raise InvalidArgumentError(
                f"a text of {states.shape[1]} tokens, but axes_lens reach to {config.longest_text}"
            )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (x, t, encoder_hidden_states) for 1024x1024 pixels and 128 tokens."""
        config = self.config
        side = config.patch_size * min(64, *config.axes_lens[1:])
        tokens = min(4 * TOKENS_AT_ONCE, config.longest_text)
        shapes = ((1, side, side, config.in_channels), (1,), (1, tokens, config.cap_feat_dim))
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def _rounded_up(count: Any) -> Any:
    """Rounded up to a multiple of 32."""
    return -(-count // TOKENS_AT_ONCE) * TOKENS_AT_ONCE


def _append(first: Array, second: Array) -> Array:
    return jnp.concatenate([first, second], axis=1)


PRESETS = {
    # 6,154,908,736 parameters: Z-Image and Z-Image-Turbo.
    "z-image": ZImageTransformer2DConfig(axes_lens=(1536, 512, 512)),
}
