"""D2iT in miniature (Jia et al. 2025, arXiv:2504.09454): coarse tokens where it is smooth, else fine ones.

As published, an autoencoder codes smooth regions by few latents and detailed ones by many, one transformer
draws which regions are which, the map of grains, and another one the content of both grains. Here there are
two grains in one network, on pixels or the latents of any autoencoder: one block and a linear map predict the
grains from the noisy image in every step, and the k regions with the most detail, always as many, become four
tokens each. Grains are learned from how much the pixels of a region of the clean image differ.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxldm.models.config import check
from jaxldm.models.dit import NORMAL, DiT, DiTBlock, DiTConfig, FinalLayer, PatchEmbed
from jaxldm.nn.embeddings import PatchProjection, patchify, sincos_position_embedding_2d, unpatchify
from jaxldm.nn.initialization import normal, parameter
from jaxldm.nn.linear import Linear, compute_dtype
from jaxldm.nn.routing import ROUTING, put_tokens, take_tokens, top_tokens


@dataclasses.dataclass(frozen=True)
class D2iTConfig(DiTConfig):
    """Config of `D2iT`: that of `DiT`, whose patches are the coarse ones.

    Attributes:
        fine_share: the part of the regions that are four fine tokens each; with 0 it is the DiT.
    """

    fine_share: float = 0.25

    def check_values(self) -> None:
        super().check_values()
        for name in ("scan", "remat", "route", "tap"):
            check(not getattr(self, name), f"a DiT with two grains has no {name}: leave it out")
        check(0 <= self.fine_share < 1, f"fine_share must be in [0, 1), got {self.fine_share}")
        check(self.patch_size % 2 == 0, f"coarse patches of {self.patch_size} cannot be halved")
        check(
            self.position_embedding == "sincos", "a DiT with two grains has position_embedding 'sincos' alone"
        )

    def num_fine(self, regions: int) -> int:
        """How many of so many regions are fine."""
        return math.floor(self.fine_share * regions)


class D2iT(DiT):
    """DiT of two grains, predicted from the noisy image.

    Its parameters are those of `DiT` and of the fine grain; `training.DynamicRecipe` trains it.

    >>> from jaxldm import models
    >>> d2it = models.build("tiny-d2it", fine_share=0.5)
    """

    config: D2iTConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        labels: Int[Array, " B"] | None = None,
        guidance_scale: Num[Array, " B"] | None = None,
        step_size: Num[Array, " B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B H W out"]:
        config = self.config
        height, width = self._size_of(x)
        chex.assert_shape(x, (None, height, width, config.in_channels))
        chex.assert_shape(t, (x.shape[0],))
        coarse = PatchEmbed(config, name="x_embedder")(x) + self._position(height, width)
        c = self._condition(t, labels, guidance_scale, step_size)
        regions = coarse.shape[1]
        fine = config.num_fine(regions)
        if fine == 0:
            h = self._blocks(coarse, c, t, train, None)
            return self._picture(FinalLayer(config, name="final_layer")(h, c), x)
        which = top_tokens(self._grains(coarse, c, train), fine)
        mask = jnp.ones((len(x), regions)).at[jnp.arange(len(x))[:, None], which].set(0)
        others = top_tokens(mask, regions - fine)
        parts = take_tokens(self._fine_tokens(x).reshape(len(x), regions, -1), which)
        h = jnp.concatenate(
            [take_tokens(coarse, others), parts.reshape(len(x), 4 * fine, config.hidden_size)], axis=1
        )
        h = self._blocks(h, c, t, train, None)
        rough = FinalLayer(config, name="final_layer")(h[:, : regions - fine], c)
        half = dataclasses.replace(config, patch_size=config.patch_size // 2)
        exact = FinalLayer(half, name="fine_final_layer")(h[:, regions - fine :], c)
        found = put_tokens(jnp.zeros((len(x), regions, rough.shape[-1]), rough.dtype), others, rough)
        return self._picture(put_tokens(found, which, self._joined(exact, fine)), x)

    def _blocks(
        self,
        h: Float[Array, "B N C"],
        c: Float[Array, "B C"],
        t: Num[Array, " B"],
        train: bool,
        kept: Int[Array, "B k"] | None,
    ) -> Float[Array, "B N C"]:
        """Not as a stack that caches may reuse: the tokens are others in every step."""
        for number in range(self.config.depth):
            h = DiTBlock(self.config, name=f"blocks_{number}")(h, c, train)
        return h

    def _picture(
        self, tokens: Float[Array, "B N D"], x: Float[Array, "B H W C"]
    ) -> Float[Array, "B H W out"]:
        return unpatchify(tokens.astype(x.dtype), self.config.patch_size, *x.shape[1:3])

    def _grains(
        self, coarse: Float[Array, "B N C"], c: Float[Array, "B C"], train: bool
    ) -> Float[Array, "B N"]:
        """How much detail each region is expected to have, as a logit."""
        h = DiTBlock(self.config, name="grain_block")(coarse, c, train)
        logits = Linear(1, name="grain_head", **NORMAL)(h.astype(jnp.float32))[..., 0]
        self.sow(ROUTING, "grains", logits)
        return logits

    def _fine_tokens(self, x: Float[Array, "B H W C"]) -> Float[Array, "B N four width"]:
        """The four fine tokens of each region, with their positions on the grid of the coarse ones."""
        config, size = self.config, self.config.patch_size // 2
        tokens = PatchProjection(config.hidden_size, size, config.dtype, name="fine_embedder")(x)
        rows, columns = x.shape[1] // size, x.shape[2] // size
        table = sincos_position_embedding_2d(config.hidden_size, rows, columns, interpolation_scale=2.0)
        kind = parameter(self, "grain_embedding", normal(0.02), (1, 1, config.hidden_size))
        place = jnp.asarray(table)[None] + kind.astype(jnp.float32)
        tokens = tokens + place.astype(compute_dtype(config.dtype))
        grid = tokens.reshape(len(x), rows // 2, 2, columns // 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(len(x), rows * columns // 4, 4, -1)

    def _joined(self, exact: Float[Array, "B n D"], fine: int) -> Float[Array, "B k E"]:
        """Four fine patches as one of the coarse grain."""
        size = self.config.patch_size // 2
        parts = exact.reshape(len(exact), fine, 2, 2, size, size, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        return parts.reshape(len(exact), fine, -1)


def detailed_regions(images: Float[Array, "B H W C"], patch_size: int, number: int) -> Bool[Array, "B N"]:
    """The regions of clean images whose pixels differ most: those that are to be fine."""
    patches = patchify(images, patch_size)
    spread = jnp.var(patches.reshape(*patches.shape[:2], -1, images.shape[-1]), axis=2).sum(axis=-1)
    chosen = top_tokens(spread, number)
    return jnp.zeros(spread.shape, bool).at[jnp.arange(len(spread))[:, None], chosen].set(True)


def grain_loss(
    logits: Float[Array, "B N"], images: Float[Array, "B H W C"], patch_size: int, number: int
) -> Float[Array, ""]:
    """The cross-entropy of the grains that a network predicts, with those of the clean images."""
    wanted = detailed_regions(images, patch_size, number)
    return jnp.mean(jax.nn.softplus(jnp.where(wanted, -logits, logits)))


def with_fine_grain(params: Any, config: D2iTConfig) -> Any:
    """Parameters whose fine grain begins as the coarse one, which sees a fine patch enlarged to its own size.

    As in FlexiViT (Beyer et al. 2023), but by the nearest pixel.
    """
    size = config.patch_size // 2
    kernel = params["x_embedder"]["proj"]["kernel"]  # [p, p, C, features]
    summed = kernel.reshape(size, 2, size, 2, *kernel.shape[2:]).sum(axis=(1, 3))
    embedder = {**params["x_embedder"]["proj"], "kernel": summed}
    last = params["final_layer"]

    def mean(x: Any) -> Any:
        parts = x.reshape(*x.shape[:-1], size, 2, size, 2, -1)
        return parts.mean(axis=(-4, -2)).reshape(*x.shape[:-1], -1)

    linear = {name: mean(value) for name, value in last["linear"].items()}
    return {**params, "fine_embedder": embedder, "fine_final_layer": {**last, "linear": linear}}


PRESETS = {
    # The small DiT for 28x28 digits (`tiny-dit`): 49 regions of 4x4 pixels, 12 of which are four tokens.
    "tiny-d2it": D2iTConfig(
        sample_size=28,
        patch_size=4,
        in_channels=1,
        hidden_size=128,
        depth=4,
        num_heads=4,
        num_classes=10,
        learn_sigma=False,
    ),
}
