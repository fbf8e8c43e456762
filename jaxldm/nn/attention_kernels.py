"""Attention as matrix products: with all logits at once, or queries in chunks."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MOST_LOGITS = 2**24  # of one chunk: 64 MB in float32


def merged_mask(
    mask: Bool[Array, "#B #H #N M"] | None,
    causal: bool,
    key_lengths: Int[Array, " B"] | None,
    queries: int,
    keys: int,
) -> Bool[Array, "#B #H #N #M"] | None:
    """One mask of keys masked, later ones and those after the first `key_lengths`; None if there is none."""
    if causal:
        earlier = jnp.tril(jnp.ones((queries, keys), bool))[None, None]
        mask = earlier if mask is None else mask & earlier
    if key_lengths is not None:
        first = (jnp.arange(keys)[None] < key_lengths[:, None])[:, None, None]
        mask = first if mask is None else mask & first
    return mask


def chunked_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H D"],
    scale: float,
    bias: Float[Array, "#B #H #N M"] | None = None,
    mask: Bool[Array, "#B #H #N M"] | None = None,
) -> Float[Array, "B N H D"]:
    """The same in chunks of queries, with at most `MOST_LOGITS` logits at a time (and one query at least).

    Each query has its own softmax, so this is exact (Rabe and Staats 2021, arXiv:2112.05682, section 2,
    without the chunks of keys). In the backward pass the logits of a chunk are computed again.
    """
    batch, length, heads, _ = query.shape
    rows = max(1, MOST_LOGITS // (batch * heads * key.shape[1]))
    if rows >= length:
        return explicit_attention(query, key, value, scale, bias, mask)[0]
    chunks = -(-length // rows)
    rows = -(-length // chunks)

    def split(x: Array, axis: int) -> Array:
        """The axis of queries, filled up and cut into chunks, which come first."""
        padding = [(0, chunks * rows - length if index == axis else 0) for index in range(x.ndim)]
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, rows, *x.shape[axis + 1 :]), axis, 0)

    by_query = {"bias": bias, "mask": mask}
    by_query = {name: x for name, x in by_query.items() if x is not None and x.shape[2] > 1}
    parts = {"query": split(query, 1)} | {name: split(x, 2) for name, x in by_query.items()}

    @jax.checkpoint
    def attend_chunk(part: dict[str, Array]) -> Array:
        own_bias, own_mask = part.get("bias", bias), part.get("mask", mask)
        return explicit_attention(part["query"], key, value, scale, own_bias, own_mask)[0]

    out = cast(Array, jax.lax.map(attend_chunk, parts))
    return jnp.moveaxis(out, 0, 1).reshape(batch, chunks * rows, heads, -1)[:, :length]


def explicit_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H D"],
    scale: float,
    bias: Float[Array, "#B #H #N M"] | None = None,
    mask: Bool[Array, "#B #H #N M"] | None = None,
) -> tuple[Float[Array, "B N H D"], Float[Array, "B H N M"]]:
    """(softmax(Q K^T scale + bias) V, the softmax in float32), with all logits at once.

    The heads are folded into the batch, so that both products are plain batched matrix products.
    """
    batch, length, heads, dim = query.shape

    def fold(x):
        return x.transpose(0, 2, 1, 3).reshape(batch * heads, x.shape[1], dim)

    wide = query.dtype == jnp.float32
    scaled = query * scale if wide else query  # in 16 bits that would round the query a second time
    logits = jnp.einsum("bnd,bmd->bnm", fold(scaled), fold(key), preferred_element_type=jnp.float32)
    logits = logits if wide else logits * scale
    if bias is not None or mask is not None:
        by_head = logits.reshape(batch, heads, length, key.shape[1])
        if bias is not None:
            by_head = by_head + bias.astype(jnp.float32)
        if mask is not None:
            by_head = jnp.where(mask, by_head, jnp.finfo(jnp.float32).min)
        logits = by_head.reshape(logits.shape)
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bnm,bmd->bnd", weights.astype(value.dtype), fold(value))
    out = out.reshape(batch, heads, length, dim).transpose(0, 2, 1, 3)
    return out, weights.reshape(batch, heads, length, key.shape[1])
