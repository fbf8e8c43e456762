"""What a parameter is, from its path and shape: which decay, and which are matrices to Muon."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxldm.models.sharding import STACK

# A part of a path: one of many blocks or of the levels of a U-Net, a scan, or a block that there is once.
BLOCKS = re.compile(r"(.*_)?(blocks|layers|refiner)_\w+|(mid|grain)_block|(down|up|downsample|upsample)_\d+")


def names_of(path: Sequence[Any]) -> tuple[str, ...]:
    """The path of a leaf of a pytree as names."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def map_with_names(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` of a function (names, leaf, ...)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(names_of(path), *leaves), tree, *others
    )


def own_ndim(names: Sequence[str], leaf: Any) -> int:
    """The axes of a parameter without the one that counts the blocks of a scan."""
    return leaf.ndim - any(map(STACK.fullmatch, names))


def decays(names: Sequence[str], leaf: Any) -> bool:
    """Whether weight decay acts on a parameter: two or more axes, so not biases nor scales of norms."""
    return own_ndim(names, leaf) >= 2


def decay_mask(params: Any) -> Any:
    """`decays` of each parameter, as optax takes it."""
    return map_with_names(decays, params)


def three_apart(names: Sequence[str], leaf: Any) -> Any:
    """The kernel of queries, keys and values in one, [.., in, 3 out], as three: [.., in, 3, out]."""
    if names[-2:] != ("qkv", "kernel"):
        return leaf
    return leaf.reshape(*leaf.shape[:-1], 3, leaf.shape[-1] // 3)


def muon_axes(params: Any) -> Any:
    """How Muon sees each parameter (after `three_apart`); None: it does not, and AdamW moves it.

    A matrix is a kernel inside a block: of a dense layer [in, out], of a convolution [h, w, in, out] with
    h w in as its inputs, of a transposed one [in, out, h, w], whose name is weight. Each block of a scan, and
    each of queries, keys and values, is a matrix of its own. Embeddings, the first and last layers, biases
    and norms are AdamW's. Of a network without blocks all kernels are matrices.
    """
    paths = [names_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    has_blocks = any(map(_in_block, paths))

    def axes(names: Sequence[str], leaf: Any) -> Any:
        own = own_ndim(names, leaf)
        first, transposed = leaf.ndim - own, names[-1] == "weight" and own == 4
        if not (names[-1] == "kernel" or transposed) or own < 2 or (has_blocks and not _in_block(names)):
            return None
        if transposed:
            return optax.contrib.MuonDimensionNumbers((first, first + 2, first + 3), (first + 1,))
        if names[-2:] == ("qkv", "kernel"):
            return optax.contrib.MuonDimensionNumbers((first,), (first + 2,))
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), (leaf.ndim - 1,))

    return map_with_names(axes, params)


def _in_block(names: Sequence[str]) -> bool:
    return any(map(BLOCKS.fullmatch, names))
