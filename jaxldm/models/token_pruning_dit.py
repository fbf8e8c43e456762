"""A DiT whose middle blocks are given the most important tokens of an image alone.

Token pruning by importance, of lecture 43.9: a router scores the tokens before the first of these blocks, the
k of the highest scores go through them, and the others come back behind the last. As in mixture-of-depths
(Raposo et al. 2024, arXiv:2404.02258) k is fixed, where the lecture has a threshold: so shapes are static.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxldm.models.config import check
from jaxldm.models.dit import DiT, DiTBlock, DiTConfig
from jaxldm.nn.routing import (
    TokenRouter,
    pass_through,
    put_tokens,
    straight_through,
    take_tokens,
    top_tokens,
)


@dataclasses.dataclass(frozen=True)
class TokenPruningDiTConfig(DiTConfig):
    """Config of `TokenPruningDiT`: that of `DiT`, and what is pruned.

    Attributes:
        pruned_blocks: (first, last): from block `first` up to, not including, block `last`.
        token_capacity: the part of the tokens that goes through them; with 1 there is no router.
    """

    pruned_blocks: tuple[int, int] = (1, 3)
    token_capacity: float = 0.5

    def check_values(self) -> None:
        super().check_values()
        for name in ("scan", "remat", "route", "tap"):
            check(not getattr(self, name), f"a DiT with routers has no {name}: leave it out")
        first, last = self.pruned_blocks
        check(
            0 <= first < last <= self.depth,
            f"pruned_blocks must be (first, last) of the {self.depth} blocks, got {self.pruned_blocks}",
        )
        check(
            0 < self.token_capacity <= 1,
            f"token_capacity must be above 0 and at most 1, got {self.token_capacity}",
        )


class TokenPruningDiT(DiT):
    """DiT with blocks for the most important tokens alone.

    Its parameters are those of `DiT` and of the router; with `token_capacity` 1 it is the DiT.

    >>> from jaxldm import models
    >>> module = models.build("tiny-token-pruning", token_capacity=0.25)
    """

    config: TokenPruningDiTConfig

    def _blocks(
        self,
        h: Float[Array, "B N C"],
        c: Float[Array, "B C"],
        t: Num[Array, " B"],
        train: bool,
        kept: Int[Array, "B k"] | None,
    ) -> Float[Array, "B N C"]:
        config = self.config
        first, last = config.pruned_blocks if config.token_capacity < 1 else (-1, -1)
        all_tokens, entered, which, gate = h, h, None, None
        for number in range(config.depth):
            if number == first:
                logits = TokenRouter(name="token_router")(h)
                which = top_tokens(logits, math.ceil(config.token_capacity * h.shape[1]))
                scores = jnp.take_along_axis(logits, which, axis=1)
                gate = straight_through(scores, jnp.ones(scores.shape, bool))[..., None]
                all_tokens, h = h, take_tokens(h, which)
                entered = h
            h = DiTBlock(config, name=f"blocks_{number}")(h, c, train)
            if number == last - 1 and which is not None and gate is not None:
                h = put_tokens(all_tokens, which, pass_through(h, entered, gate))
        return h


PRESETS = {
    # The small DiT for 28x28 digits (`tiny-dit`), the middle two of its blocks for half of the tokens.
    "tiny-token-pruning": TokenPruningDiTConfig(
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
