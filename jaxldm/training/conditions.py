"""What a denoising network is conditioned on in training: classes, or what encoders make of captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIZES = "time_ids"  # SDXL's: the size of a picture as it was, where it was cut, and the size it has now
CONTROL_IMAGE = "control_image"  # of a ControlNet
OF_THE_PICTURE = (SIZES, CONTROL_IMAGE)  # what stays where the caption is dropped


class Condition(NamedTuple):
    """What the network is conditioned on.

    Attributes:
        null: in place of a condition that is dropped: of labels, or by the network's arguments, which are
            columns of a batch.
        column: of the labels; None where `null` has names.
    """

    null: Any
    column: str | None = None

    def of(self, batch: Mapping[str, Any]) -> Any:
        """The condition of a batch, as the network takes it."""
        return {name: batch[name] for name in self.null} if self.column is None else batch[self.column]

    def nulls(self, batch: Mapping[str, Any] | None = None) -> Any:
        """The null condition, as arrays.

        Args:
            batch: whose pictures keep what is `OF_THE_PICTURE` where their caption is dropped.
        """
        nulls = jax.tree.map(jnp.asarray, self.null)
        if batch is None or self.column is not None:
            return nulls
        return nulls | {name: batch[name] for name in OF_THE_PICTURE if name in nulls}


def label_condition(num_classes: int) -> Condition:
    """Class labels, and the null class."""
    return Condition(np.int32(num_classes), "label")
