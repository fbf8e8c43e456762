"""How a dynamic transformer is trained, as plain data: a part of the recipe of its stage."""

from __future__ import annotations

import dataclasses

from jaxldm.arguments import number
from jaxldm.entries import check_types
from jaxldm.functions import NamedFields
from jaxldm.training.stage_recipe import check_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRecipe(NamedFields):
    """A DiT with routers (`DyDiT` and others) that learns what to compute, from a trained DiT.

    Attributes:
        source: folder of the trained DiT that it begins as; None: from nothing.
        compute: the part of the blocks' multiply-accumulates that routers of the time are trained towards.
            None: of a network without such routers.
        weight: of the squared difference from that, 2 in the training of DyDiT's authors; of D2iT the weight
            of the grains' cross-entropy.
    """

    source: str | None = None
    compute: float | None = 0.5
    weight: float = 2.0

    def __post_init__(self):
        check_types(self)
        check_not_negative(self, "weight")
        if self.compute is not None:
            number(above=0, high=1)("compute", self.compute)
