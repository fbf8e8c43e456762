"""A small random network of the comparison in 16 bits, and how both sides are called.

Times and scales are numbers that bfloat16 has, so that what is measured is how a network computes, and not
how its caller rounds t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

Inputs = Mapping[str, Any]


class Case(NamedTuple):
    """A network and what it is called with.

    Attributes:
        make: () -> the reference's model.
        inputs: (random numbers) -> arrays by the names of our arguments, images channels last.
        theirs: (model, inputs as tensors, images channels first) -> its output.
        ours: (output of our module) -> the array to compare.
        method: of our module.
        exact: inputs that its published pipeline gives it in float32.
    """

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[np.random.Generator], dict[str, np.ndarray]]
    theirs: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]
    ours: Callable[[Any], Any] = lambda output: output
    method: str = "__call__"
    exact: tuple[str, ...] = ("t", "guidance", "time_ids", "micro_conds", "resolution", "aspect_ratio")


def normal(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Normal numbers of a shape."""
    return lambda rng: rng.standard_normal(shape).astype(np.float32)


def constant(values: Any, dtype: Any = np.float32) -> Callable[[np.random.Generator], np.ndarray]:
    """The same for every seed."""
    return lambda rng: np.asarray(values, dtype)


def tokens(*shape: int, below: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Whole numbers, the last of each row the largest: the end of the text."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        numbers = rng.integers(3, below - 1, shape, dtype=np.int32)
        numbers[:, -1] = below - 1
        return numbers

    return draw


def each(**draw: Callable[[np.random.Generator], np.ndarray]) -> Callable[..., dict[str, np.ndarray]]:
    """Inputs by name."""
    return lambda rng: {name: one(rng) for name, one in draw.items()}


T = constant([20.0, 484.0])  # of 1000; bfloat16 has them
UNIT_T = constant([0.125, 0.5])
X, TEXT = normal(2, 8, 8, 4), normal(2, 7, 24)
