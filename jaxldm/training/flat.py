"""All the parameters of a network as one vector, for everything in a train step that is not the network.

Adam, clipping and the moving average treat every number alike. On one vector they are a handful of
operations; on a tree of hundreds of arrays they are hundreds of small ones, and take most of the time to
compile (mini U-Net on a CPU: 8 of 21 seconds). Checkpoints become four arrays, and sharding the state is
cutting a vector.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxldm.training.state import Params


class FlatLayout:
    """Where each array of a tree lies in one vector: those of two or more dimensions first, then the rest.

    >>> import jax.numpy as jnp
    >>> params = {"bias": jnp.ones(2), "kernel": jnp.zeros((3, 2))}
    >>> layout = FlatLayout(params)
    >>> layout.flatten(params)
    Array([0., 0., 0., 0., 0., 0., 1., 1.], dtype=float32)
    >>> layout.unflatten(layout.flatten(params))["bias"].shape
    (2,)
    """

    def __init__(self, params: Params):
        leaves, self._tree = jax.tree.flatten(params)
        chex.assert_type(leaves, jnp.float32)
        self._order = sorted(range(len(leaves)), key=lambda k: leaves[k].ndim < 2)
        self._shapes = [leaves[k].shape for k in self._order]
        self._ends = list(itertools.accumulate(math.prod(shape) for shape in self._shapes))
        self.size = self._ends[-1]
        self.num_in_matrices = sum(leaf.size for leaf in leaves if leaf.ndim >= 2)

        # The gradient of a slice is a sum with zeros, once per array; that of all of them is one
        # concatenation.
        self._unflatten = jax.custom_vjp(self.split)
        self._unflatten.defvjp(
            lambda vector: (self.split(vector), None), lambda _, tree: (self.flatten(tree),)
        )

    def flatten(self, params: Params) -> Float[Array, " P"]:
        """The tree as a vector."""
        leaves = jax.tree.leaves(params)
        return jnp.concatenate([leaves[k].reshape(-1) for k in self._order])

    def unflatten(self, vector: Float[Array, " P"]) -> Params:
        """The vector as a tree; inside a loss this is where the gradient becomes one vector."""
        chex.assert_shape(vector, (self.size,))
        return self._unflatten(vector)

    def split(self, vector: Float[np.ndarray, " P"]) -> Params:
        """The same without a rule for gradients; a numpy vector gives numpy arrays and compiles nothing."""
        starts = [0, *self._ends]
        leaves: list[Any] = [None] * len(self._order)
        for k, start, end, shape in zip(self._order, starts, self._ends, self._shapes, strict=False):
            leaves[k] = vector[start:end].reshape(shape)
        return jax.tree.unflatten(self._tree, leaves)

    def decays(self, vector: Float[Array, " P"]) -> Bool[Array, " P"]:
        """Which numbers weight decay acts on: those of matrices and kernels."""
        return jnp.arange(vector.shape[0]) < self.num_in_matrices
