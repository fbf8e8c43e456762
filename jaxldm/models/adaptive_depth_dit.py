"""A DiT whose depth depends on the time: a router skips whole blocks.

The plainest dynamic transformer, of lecture 43.9, and not a published model. It is to DyDiT what stochastic
depth is to dropout: what a gate closes is a block, learned for each part of the time. See `DyDiT` for what
routers have in common.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
from jaxtyping import Array, Bool, Float

from jaxldm.models.config import check
from jaxldm.models.dit import DiTBlock
from jaxldm.models.time_routed_dit import TimeRoutedConfig, TimeRoutedDiT
from jaxldm.nn.routing import pass_through, straight_through


@dataclasses.dataclass(frozen=True)
class AdaptiveDepthDiTConfig(TimeRoutedConfig):
    """Config of `AdaptiveDepthDiT`: that of `DiT`, and one gate for each block."""

    @property
    def num_gates(self) -> int:
        """One for each block."""
        return self.depth

    def check_gates(self, gates: Bool[np.ndarray, " gates"]) -> None:
        check(bool(gates.any()), "plan skips all blocks: leave at least one open")


class AdaptiveDepthDiT(TimeRoutedDiT):
    """DiT with blocks that are skipped in parts of the time.

    Its parameters are those of `DiT` and of the router; with all gates open it computes what the DiT does.
    `training.DynamicRecipe` trains it, from a trained DiT; `models.fix_routers` then leaves out what is
    closed.

    >>> from jaxldm import models
    >>> module = models.build("tiny-adaptive-depth", time_groups=8)
    """

    config: AdaptiveDepthDiTConfig

    def block(self, **options: Any) -> DiTBlock:
        return DiTBlock(self.config, **options)

    def gates_of(self, logits: Float[Array, "G gates"]) -> Float[Array, "G gates"]:
        return straight_through(logits)

    def compute_share(self, gates: Float[Array, "G gates"]) -> Float[Array, " G"]:
        return gates.mean(axis=-1)

    def gated(self, call: Any, h: Any, c: Any, gates: Any, train: bool) -> Any:
        for number in range(self.config.depth):
            h = pass_through(call(number)(h, c, train), h, gates[:, number, None, None])
        return h

    def chosen(self, h: Any, c: Any, gates: Bool[np.ndarray, " gates"]) -> Any:
        for number in np.flatnonzero(gates):
            h = cast(Any, self.block(parent=None).apply({"params": self.own(int(number))}, h, c))
        return h


PRESETS = {
    # The small DiT for 28x28 digits (`tiny-dit`) with a router of its blocks.
    "tiny-adaptive-depth": AdaptiveDepthDiTConfig(
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
