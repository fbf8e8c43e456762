"""DiT (Peebles & Xie 2023): the diffusion transformer with adaLN-Zero, named as in its checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jaxldm.errors import InvalidArgumentError, one_of
from jaxldm.models.config import ModelConfig, check, height_width
from jaxldm.models.inputs import check_scalar_inputs, denoiser_shapes, labels_or_null, scalars_given
from jaxldm.nn.activations import gelu_tanh, silu
from jaxldm.nn.attention import SelfAttention
from jaxldm.nn.block_stack import Within, apply_blocks
from jaxldm.nn.embeddings import (
    PatchProjection,
    sincos_position_embedding_2d,
    timestep_embedding,
    unpatchify,
)
from jaxldm.nn.initialization import normal, parameter, xavier_uniform, zeros
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import layer_norm, modulate
from jaxldm.nn.token_merging import TokenMerging, around

XAVIER: dict[str, Any] = {"kernel_init": xavier_uniform, "bias_init": zeros}
NORMAL: dict[str, Any] = {"kernel_init": normal(0.02), "bias_init": zeros}
ZERO: dict[str, Any] = {"kernel_init": zeros, "bias_init": zeros}


@dataclasses.dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """Config of `DiT`; defaults are DiT-XL/2 for 256x256 images in the latents of Stable Diffusion.

    Attributes:
        num_classes: number of real classes; the label `num_classes` is the null class. None: not
            class-conditional.
        learn_sigma: 2 x in_channels outputs: the prediction, then the interpolation weight of the variance
            (Nichol & Dhariwal 2021, eq. 15).
        position_embedding: "sincos" (fixed) or "learned" (from N(0, 0.02^2), as in ViT).
        freq_shift: 0 as published; the port in diffusers has 1 (`downscale_freq_shift`): set 1 to agree with
            it.
        norm_eps: 1e-6 as published.
        scalar_inputs: of "guidance_scale" and "step_size", those that the network takes as further inputs,
            for students that draw in few steps. See `models.init_from`.
        scan: compile one block for all, see `jaxldm.nn.block_stack`.
        remat: recompute activations inside of blocks in the backward pass, to save memory.
        route: (first, last): from block `first` up to, not including, block `last` the network can go on with
            a part of the tokens, see `kept` in its call. For training (Krause et al. 2025, TREAD).
        head_dim: channels of each head; None: hidden_size / num_heads. For networks without some of their
            heads, see `models.pruning`.
        tap: the tokens behind so many blocks are sown as the intermediate "tapped". For training.
    """

    sample_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int | None = 1000
    learn_sigma: bool = True
    position_embedding: str = "sincos"
    frequency_embedding_size: int = 256
    freq_shift: int = 0
    norm_eps: float = 1e-6
    dropout: float = 0.0
    scalar_inputs: tuple[str, ...] = ()
    dtype: str = "float32"
    scan: bool = False
    remat: bool = False
    route: tuple[int, int] | None = None
    tap: int | None = None
    head_dim: int | None = None

    def check_values(self) -> None:
        if self.route is not None:
            check(
                len(self.route) == 2 and 0 <= self.route[0] < self.route[1] <= self.depth,
                f"route must be (first, last) of the {self.depth} blocks, got {self.route}",
            )
        check(
            self.tap is None or self.tap <= self.depth,
            f"tap must be at most the {self.depth} blocks, got {self.tap}",
        )
        for side in height_width(self.sample_size):
            check(
                side % self.patch_size == 0,
                f"a side of {side} cannot be cut into patches of {self.patch_size}",
            )
        check(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            f"a width of {self.hidden_size} cannot be split into {self.num_heads} heads",
        )
        check(self.hidden_size % 4 == 0, "hidden_size must be a multiple of 4 for the position embedding")
        one_of("position_embedding", self.position_embedding, ("sincos", "learned"))
        check_scalar_inputs(self.scalar_inputs)
        compute_dtype(self.dtype)

    def table_size(self) -> int:
        return math.prod(self.grid_size) * self.hidden_size

    @property
    def head_channels(self) -> int:
        """Channels of the last layer: in_channels, or twice as many with `learn_sigma`."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output, those of the last layer."""
        return self.head_channels

    @property
    def segments(self) -> list[tuple[int, int]]:
        """The blocks in runs (first, last) that are cut where tokens leave, come back or are sown."""
        cuts = sorted({0, self.depth, *(self.route or ()), *(() if self.tap is None else (self.tap,))})
        return list(itertools.pairwise(cuts))

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per column and per row."""
        height, width = height_width(self.sample_size)
        return height // self.patch_size, width // self.patch_size


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding, cosines first, then Linear, SiLU, Linear: t `[B]` -> `[B, hidden_size]`.

    Attributes:
        begins_at_zero: the last layer starts at zero: for a scalar input next to t.
    """

    config: DiTConfig
    begins_at_zero: bool = False

    @nn.compact
    def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B C"]:
        config = self.config
        size, shift = config.frequency_embedding_size, config.freq_shift
        x = timestep_embedding(t, size, flip_sin_to_cos=True, downscale_freq_shift=shift)
        x = Linear(config.hidden_size, dtype=config.dtype, name="mlp_0", **NORMAL)(x)
        start = ZERO if self.begins_at_zero else NORMAL
        return Linear(config.hidden_size, dtype=config.dtype, name="mlp_2", **start)(silu(x))


class LabelEmbedder(nn.Module):
    """Class labels `[B]` -> `[B, hidden_size]`; the last row of the table is the null class."""

    config: Any  # with num_classes, hidden_size and dtype: also that of diffusers' DiT

    @nn.compact
    def __call__(self, labels: Int[Array, " B"]) -> Float[Array, "B C"]:
        config = self.config
        rows = cast(int, config.num_classes) + 1
        return Embedding(rows, config.hidden_size, config.dtype, normal(0.02), name="embedding_table")(labels)


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, Linear: `[B, N, C]` -> the same shape."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], train: bool = False) -> Float[Array, "B N C"]:
        config = self.config
        hidden = int(config.hidden_size * config.mlp_ratio)
        x = Linear(hidden, dtype=config.dtype, name="fc1", **XAVIER)(x)
        x = gelu_tanh(x)
        if config.dropout > 0.0:
            x = nn.Dropout(config.dropout, deterministic=not train)(x)
        return Linear(config.hidden_size, dtype=config.dtype, name="fc2", **XAVIER)(x)


class DiTBlock(nn.Module):
    """x + gate attention(modulate(norm(x))), then the same with the MLP. x `[B, N, C]`, c `[B, C]`.

    Peebles & Xie 2023, section 3.2 and figure 3: shift, scale and gate of both branches are one linear map
    of silu(c) that starts at zero: every block starts as the identity.

    Attributes:
        merging: tokens that are alike are one within attention, and size: their (rows, columns).
    """

    config: DiTConfig
    merging: TokenMerging | None = None
    size: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], c: Float[Array, "B C"], train: bool = False
    ) -> Float[Array, "B N C"]:
        config = self.config
        modulation = Linear(6 * config.hidden_size, dtype=config.dtype, name="adaLN_modulation_1", **ZERO)(
            silu(c)
        )
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(modulation, 6, axis=-1)
        merged = around(self.merging, x, self.size)
        attention = SelfAttention(
            config.num_heads, config.dtype, **XAVIER, head_dim=config.head_dim, name="attn"
        )
        x = x + gate_msa[:, None, :] * merged(
            attention, modulate(layer_norm(x, config.norm_eps), shift_msa, scale_msa)
        )
        if not (self.merging and self.merging.mlp):
            merged = around(None, x, self.size)
        return x + gate_mlp[:, None, :] * merged(
            Mlp(config, name="mlp"), modulate(layer_norm(x, config.norm_eps), shift_mlp, scale_mlp), train
        )


class FinalLayer(nn.Module):
    """Adaptive layer norm and a linear map that starts at zero: `[B, N, C]` -> `[B, N, p p out_channels]`."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], c: Float[Array, "B C"]) -> Float[Array, "B N out"]:
        config = self.config
        modulation = Linear(2 * config.hidden_size, dtype=config.dtype, name="adaLN_modulation_1", **ZERO)(
            silu(c)
        )
        shift, scale = jnp.split(modulation, 2, axis=-1)
        features = config.patch_size**2 * config.head_channels
        return Linear(features, dtype=config.dtype, name="linear", **ZERO)(
            modulate(layer_norm(x), shift, scale)
        )


class DiT(nn.Module):
    """Diffusion transformer. Peebles & Xie 2023.

    Example, on 7x7x4 latents instead of 28x28 images:
    `models.build("tiny-dit", sample_size=7, in_channels=4, patch_size=1)`.

    The loss drops labels for classifier-free guidance (`condition_dropout`), not the network.

    Attributes:
        config: what the network is; the other is how it is called, with the same parameters.
        token_merging: tokens that are alike are one within the attention of each block.
    """

    config: DiTConfig
    token_merging: TokenMerging | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        labels: Int[Array, " B"] | None = None,
        guidance_scale: Num[Array, " B"] | None = None,
        step_size: Num[Array, " B"] | None = None,
        train: bool = False,
        kept: Int[Array, "B k"] | None = None,
    ) -> Float[Array, "B H W out"]:
        """Predict from noisy images or latents, the time and the class.

        Args:
            x: `[B, H, W, in_channels]` of the config's `sample_size`; with sin-cos positions also of
                other sides that make as many tokens, down to half as many.
            t: `[B]` floating, the path's t; may be fractional.
            labels: int `[B]` in [0, num_classes], num_classes being the null class; None means the null class
                for all.
            guidance_scale: `[B]`, 1 for none, and step_size: `[B]` in units of t; None unless they are among
                the config's `scalar_inputs`.
            train: draw dropout from the rng stream "dropout".
            kept: int `[B, k]`, tokens that go through the blocks of the config's `route`, different ones; the
                others skip these blocks. None: all go through.

        Returns:
            `[B, H, W, out_channels]` in the dtype of x: zero everywhere at the start of training. With
            `learn_sigma` the second half of the channels is for the variance.

        Raises:
            InvalidArgumentError: labels given to a model without classes, `kept` to one without a route; a
                scalar input that is missing, or that the network does not take.
        """
        config = self.config
        if kept is not None and config.route is None:
            raise InvalidArgumentError(
                "kept is for a network with a route: give its config route=(first, last)"
            )
        if kept is not None and self.token_merging is not None:
            raise InvalidArgumentError("tokens are merged on a whole grid: leave kept or token_merging out")
        height, width = self._size_of(x)
        chex.assert_shape(x, (None, height, width, config.in_channels))
        chex.assert_shape(t, (x.shape[0],))
        h = PatchEmbed(config, name="x_embedder")(x) + self._position(height, width)
        c = self._condition(t, labels, guidance_scale, step_size)
        size = (height // config.patch_size, width // config.patch_size)
        h = self._blocks(h, c, t, train, kept, **({} if self.token_merging is None else {"size": size}))
        tokens = FinalLayer(config, name="final_layer")(h, c)
        return unpatchify(tokens.astype(x.dtype), config.patch_size, height, width)

    def _condition(
        self,
        t: Float[Array, " B"],
        labels: Int[Array, " B"] | None,
        guidance_scale: Num[Array, " B"] | None,
        step_size: Num[Array, " B"] | None,
    ) -> Float[Array, "B C"]:
        """The sum of the embeddings of the time, of further numbers, and of the class."""
        config = self.config
        c = TimestepEmbedder(config, name="t_embedder")(t)
        scalars = scalars_given(config.scalar_inputs, t, guidance_scale=guidance_scale, step_size=step_size)
        for name, value in scalars.items():
            c = c + TimestepEmbedder(config, begins_at_zero=True, name=f"{name}_embedder")(value)
        labels = labels_or_null(labels, t, config.num_classes)
        if labels is not None:
            c = c + LabelEmbedder(config, name="y_embedder")(labels)
        return c

    def _blocks(
        self,
        h: Float[Array, "B N C"],
        c: Float[Array, "B C"],
        t: Num[Array, " B"],
        train: bool,
        kept: Int[Array, "B k"] | None,
        size: tuple[int, int] = (0, 0),
    ) -> Float[Array, "B N C"]:
        """All blocks; those of the route on the kept tokens alone."""
        config, full = self.config, h
        block = functools.partial(DiTBlock, config, self.token_merging, size)
        options: dict[str, Any] = {"scan": config.scan, "remat": config.remat}
        enters, leaves = config.route if kept is not None and config.route else (-1, -1)
        for first, last in config.segments:
            if first == enters:
                full, h = h, jnp.take_along_axis(h, cast(Array, kept)[..., None], axis=1)
            within = Within(self, first, config.depth - last)
            h = apply_blocks(
                block, "blocks", last - first, h, c, train, first=first, within=within, **options
            )
            if last == leaves:
                rows = jnp.arange(h.shape[0])[:, None]
                h = full.at[rows, cast(Array, kept)].set(h)
            if last == config.tap:
                self.sow("intermediates", "tapped", h)
        return h

    def _size_of(self, x: Float[Array, "B H W C"]) -> tuple[int, int]:
        """(height, width) that x may have: with sin-cos positions its own, of about as many tokens."""
        config, (height, width) = self.config, x.shape[1:3]
        tokens = (height // config.patch_size) * (width // config.patch_size)
        most = int(np.prod(config.grid_size))
        if config.position_embedding == "learned" or not most / 2 <= tokens <= most:
            return height_width(config.sample_size)
        return height, width

    def _position(self, height: int, width: int) -> Float[Array, "1 N C"]:
        config = self.config
        size = config.patch_size
        if config.position_embedding == "learned":
            rows, columns = config.grid_size
            table = parameter(self, "pos_embed", normal(0.02), (1, rows * columns, config.hidden_size))
        elif height % size or width % size:
            raise InvalidArgumentError(f"{height}x{width} cannot be cut into patches of {size}")
        else:
            table = sincos_position_embedding_2d(config.hidden_size, height // size, width // size)[None]
        return jnp.asarray(table, compute_dtype(config.dtype))

    def constant_tensors(self) -> Mapping[str, Float[np.ndarray, " ..."]]:
        """Constant tensors of the published checkpoint: the sin-cos table `[1, N, C]`."""
        if self.config.position_embedding == "learned":
            return {}
        return {
            "pos_embed": sincos_position_embedding_2d(self.config.hidden_size, *self.config.grid_size)[None]
        }

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes of (x, t, labels, guidance_scale, step_size) that `init` traces the model with."""
        return denoiser_shapes(self.config)


class PatchEmbed(nn.Module):
    """Patches and their linear map `proj`: `[B, H, W, C]` -> `[B, N, hidden_size]`."""

    config: Any  # with hidden_size, patch_size and dtype: also that of diffusers' DiT

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B N width"]:
        return PatchProjection(
            self.config.hidden_size, self.config.patch_size, self.config.dtype, name="proj"
        )(x)


# Peebles & Xie 2023, table 1.
SIZES: dict[str, dict[str, Any]] = {
    "s": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "b": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "l": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "xl": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
PATCH_SIZES = (2, 4, 8)

PRESETS = {
    # Lecture 43's small DiT for 28x28 digits: 49 tokens of width 128.
    "tiny-dit": DiTConfig(
        sample_size=28,
        patch_size=4,
        in_channels=1,
        hidden_size=128,
        depth=4,
        num_heads=4,
        num_classes=10,
        learn_sigma=False,
    ),
    # For 32x32x4 latents: images of 256x256 in Stable Diffusion's autoencoder.
    **{
        f"dit-{size}-{patch}": DiTConfig(patch_size=patch, scan=True, **widths)
        for size, widths in SIZES.items()
        for patch in PATCH_SIZES
    },
}
