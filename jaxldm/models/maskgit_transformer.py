"""MaskGIT (Chang et al. 2022): a bidirectional transformer that predicts the masked tokens of an image.

The class modulates the blocks (adaLN-Zero, the blocks of DiT), as in Halton-MaskGIT (Besnier et al. 2025). Of
tokens as small as pixels there are many, and neighbours say most about one another, so convolutions halve the
image before the transformer and double it again behind it, as in aMUSEd's U-ViT.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.models.config import ModelConfig, check, height_width
from jaxldm.models.dit import DiTBlock, DiTConfig, LabelEmbedder
from jaxldm.models.inputs import labels_or_null
from jaxldm.nn.activations import silu
from jaxldm.nn.block_stack import apply_blocks
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.embeddings import sincos_position_embedding_2d
from jaxldm.nn.initialization import normal
from jaxldm.nn.linear import Embedding, Linear, compute_dtype
from jaxldm.nn.normalization import GroupNorm, layer_norm
from jaxldm.nn.resnet import Downsample2D, ResnetBlock2D


@dataclasses.dataclass(frozen=True)
class MaskGITTransformerConfig(ModelConfig):
    """Config of `MaskGITTransformer`; defaults are for digits of 28x28 pixels in 16 grey levels.

    Attributes:
        sample_size: tokens per column and row.
        codebook_size: number of tokens V. The id V is the mask token.
        block_out_channels: channels of the convolutional levels around the transformer, each of which halves
            the image; empty as published, where the transformer sees single tokens.
        norm_num_groups: of their group norms.
        num_classes: number of real classes; the label `num_classes` is the null class. None: not
            class-conditional.
        scan: compile one block for all, see `jaxldm.nn.block_stack`.
        remat: recompute activations inside of blocks in the backward pass, to save memory.
    """

    sample_size: int | tuple[int, int] = 28
    codebook_size: int = 16
    block_out_channels: tuple[int, ...] = (24, 48)
    norm_num_groups: int = 8
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    num_classes: int | None = 10
    dropout: float = 0.0
    dtype: str = "float32"
    scan: bool = False
    remat: bool = False

    def check_values(self) -> None:
        check(self.codebook_size > 1, "codebook_size must be 2 or more")
        self.blocks()  # refuses what a DiT of these sizes refuses

    def table_size(self) -> int:
        return math.prod(self.blocks().grid_size) * self.hidden_size

    @property
    def mask_token(self) -> int:
        """The id that stands for "unknown": V."""
        return self.codebook_size

    @property
    def vocab_size(self) -> int:
        """Number of ids that the network takes: V, and the mask token."""
        return self.codebook_size + 1

    def blocks(self) -> DiTConfig:
        """The config of DiT's blocks, on the tokens or what the convolutions made of them."""
        same = ("sample_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes", "dropout")
        fields = {name: getattr(self, name) for name in (*same, "dtype")}
        factor = 2 ** len(self.block_out_channels)
        return DiTConfig(patch_size=factor, in_channels=1, learn_sigma=False, **fields)


class MaskGITTransformer(nn.Module):
    """Logits of every token of an image, given those that are not masked. Chang et al. 2022.

    Unlike a diffusion transformer it takes no time: how much is masked can be seen.

    The loss drops labels for classifier-free guidance (`condition_dropout`), not the network.
    """

    config: MaskGITTransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B h w"],
        labels: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B h w V"]:
        """Predict the tokens under the mask.

        Args:
            tokens: ids `[B, h, w]` in [0, codebook_size], codebook_size being the mask token.
            labels: int `[B]` in [0, num_classes], num_classes being the null class; None means the null class
                for all.
            train: draw dropout from the rng stream "dropout".

        Returns:
            `[B, h, w, codebook_size]`, float32.

        Raises:
            InvalidArgumentError: labels given to a model without classes.
        """
        config = self.config
        height, width = height_width(config.sample_size)
        chex.assert_shape(tokens, (None, height, width))
        labels = labels_or_null(labels, jnp.zeros(len(tokens)), config.num_classes)
        blocks, dtype = config.blocks(), config.dtype
        c = jnp.zeros((len(tokens), config.hidden_size), compute_dtype(dtype))
        if labels is not None:
            c = LabelEmbedder(blocks, name="cls_emb")(labels)
        rows, first = config.codebook_size + 1, (*config.block_out_channels, config.hidden_size)[0]
        h = Conv2d(first, dtype=dtype, name="conv_in")(
            Embedding(rows, first, dtype, normal(1.0), name="tok_emb")(tokens)
        )
        skips = []
        for level, channels in enumerate(config.block_out_channels):
            h = self._resnet(channels, f"down_{level}")(h, c, train)
            skips.append(h)
            h = Downsample2D(dtype=dtype, name=f"downsample_{level}")(h)
        _, below, right, channels = h.shape
        h = Linear(config.hidden_size, dtype=dtype, name="in_proj")(
            h.reshape(len(h), below * right, channels)
        )
        h = h + jnp.asarray(self.constant_tensors()["pos_emb"], h.dtype)
        block = functools.partial(DiTBlock, blocks)
        options: dict[str, Any] = {"scan": config.scan, "remat": config.remat}
        h = apply_blocks(block, "blocks", config.depth, h, c, train, **options)
        h = layer_norm(h).reshape(len(h), below, right, config.hidden_size)
        for level, channels in reversed(list(enumerate(config.block_out_channels))):
            h = Conv2d(channels, dtype=dtype, doubled=True, name=f"upsample_{level}")(h)
            h = self._resnet(channels, f"up_{level}")(jnp.concatenate([h, skips[level]], -1), c, train)
        h = silu(GroupNorm(config.norm_num_groups, dtype=dtype, name="norm_out")(h))
        return Conv2d(config.codebook_size, dtype=dtype, name="conv_out")(h).astype(jnp.float32)

    def _resnet(self, channels: int, name: str) -> ResnetBlock2D:
        config = self.config
        return ResnetBlock2D(
            channels, config.norm_num_groups, dropout=config.dropout, dtype=config.dtype, name=name
        )

    def constant_tensors(self) -> Mapping[str, Float[np.ndarray, " ..."]]:
        """The sin-cos table of the positions `[1, N, C]`."""
        table = sincos_position_embedding_2d(self.config.hidden_size, *self.config.blocks().grid_size)
        return {"pos_emb": table[None]}

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (tokens, labels) that `init` traces the model with."""
        tokens = jax.ShapeDtypeStruct((1, *height_width(self.config.sample_size)), jnp.int32)
        labels = jax.ShapeDtypeStruct((1,), jnp.int32)
        return (tokens,) if self.config.num_classes is None else (tokens, labels)


# Exercise 43.E5: 784 pixels in 16 grey levels, 49 positions of width 128, as Tiny DiT's.
PRESETS = {"tiny-maskgit": MaskGITTransformerConfig()}
