"""Attention on accelerators, never with all logits at once: cuDNN's flash kernel, or queries in chunks."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MOST_LOGITS = 2**24  # of one chunk: 64 MB in float32
FLASH_DTYPES, MAX_FLASH_HEAD_DIM = (jnp.bfloat16, jnp.float16), 128


def accelerator_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H D"],
    scale: float,
    bias: Float[Array, "#B #H #N M"] | None,
    mask: Bool[Array, "#B #H #N M"] | None,
) -> Float[Array, "B N H D"]:
    """softmax(Q K^T scale + bias) V, arguments as in `dot_product_attention`.

    cuDNN's flash kernel takes 16-bit inputs and head sizes up to 128 in steps of 8. It has no masks, but
    numbers of keys: a mask of keys alone (padding) becomes one, since the order of keys does not matter.
    Anything else is two matrix products, for so many queries at a time that the logits stay small.
    """
    if bias is None and has_flash_kernel(query):
        if mask is None:
            return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")
        if mask.shape[1] == mask.shape[2] == 1:
            query, key, value, lengths = _allowed_first(query, key, value, mask[:, 0, 0])
            return jax.nn.dot_product_attention(
                query, key, value, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
            )
    return chunked_attention(query, key, value, scale, bias, mask)


def has_flash_kernel(query: Float[Array, "B N H D"]) -> bool:
    """Whether cuDNN has a kernel for this dtype and head size, and this is a CUDA device."""
    head_dim = query.shape[-1]
    fits = query.dtype in FLASH_DTYPES and head_dim <= MAX_FLASH_HEAD_DIM and head_dim % 8 == 0
    return fits and on_cuda()


def on_cuda() -> bool:
    """Whether JAX's default device is NVIDIA's."""
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()


def _allowed_first(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H D"],
    mask: Bool[Array, "#B M"],
) -> tuple[Float[Array, "B N H D"], Float[Array, "B M H D"], Float[Array, "B M H D"], Int[Array, " B"]]:
    """(query, key, value, lengths): the keys to attend to in front, and how many they are.

    Where there is none the query becomes 0 and all keys count, so that it attends to all equally.
    """
    batch, keys = key.shape[:2]
    allowed = jnp.broadcast_to(mask, (batch, keys))
    order = jnp.argsort(~allowed, axis=-1, stable=True)
    rows = jnp.arange(batch)[:, None]
    # Unique: the gradient is then written, and not added up in some order.
    key, value = (x.at[rows, order].get(unique_indices=True, mode="promise_in_bounds") for x in (key, value))
    lengths = allowed.sum(-1, dtype=jnp.int32)
    query = jnp.where((lengths == 0)[:, None, None, None], jnp.zeros((), query.dtype), query)
    return query, key, value, jnp.where(lengths == 0, jnp.int32(keys), lengths)


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
