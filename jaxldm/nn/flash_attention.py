"""Attention that never holds all logits at once: a flash kernel on NVIDIA, or queries in chunks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxldm.nn.attention_kernels import chunked_attention, explicit_attention, merged_mask

FLASH_DTYPES, MAX_FLASH_HEAD_DIM = ("bfloat16", "float16"), 128
MOST_BIASES = 2**25  # that are written out: 64 MB in 16 bits
MASKED = {"bfloat16": -(2.0**41), "float16": -(2.0**15)}  # the lowest whose differences cuDNN gets right
TRIAL_ERROR = 0.05  # relative: 16 bits alone have about 0.01


def memory_efficient_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H D"],
    scale: float,
    bias: Float[Array, "#B #H #N M"] | None = None,
    mask: Bool[Array, "#B #H #N M"] | None = None,
    causal: bool = False,
    key_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B N H D"]:
    """softmax(Q K^T scale + bias) V, arguments as in `dot_product_attention`.

    Flash kernels (`KERNELS`) take 16-bit inputs and head sizes up to 128 in steps of 8. What they have
    instead of masks:

    - causal: a mask of their own.
    - numbers of keys. A mask of keys alone (padding) becomes one: their order does not matter without a bias
      and later tokens.
    - a bias, which is one array of 16 bits for all layers: T5's; there, and in causal attention, masks of
      keys become part of it, as does any other mask.

    Anything else (float32, larger heads, one head of all channels in autoencoders) is two matrix products,
    for so many queries at a time that the logits stay small.
    """
    if has_flash_kernel(query):
        out = _by_flash_kernel(query, key, value, scale, bias, mask, causal, key_lengths)
        if out is not None:
            return out
    mask = merged_mask(mask, causal, key_lengths, query.shape[1], key.shape[1])
    return chunked_attention(query, key, value, scale, bias, mask)


def has_flash_kernel(query: Float[Array, "B N H D"]) -> bool:
    """Whether flash kernels take this dtype and head size, and this is a CUDA device."""
    head_dim = query.shape[-1]
    fits = query.dtype.name in FLASH_DTYPES and head_dim <= MAX_FLASH_HEAD_DIM and head_dim % 8 == 0
    return fits and on_cuda()


def on_cuda() -> bool:
    """Whether JAX's default device is NVIDIA's."""
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()


def on_hopper() -> bool:
    """Whether the device is NVIDIA's Hopper or a later one."""
    return on_cuda() and float(jax.local_devices()[0].compute_capability) >= 9


class Form(NamedTuple):
    """What a flash kernel is asked for, besides dtype and head size."""

    causal: bool = False
    lengths: bool = False
    bias: bool = False


def _by_flash_kernel(query, key, value, scale, bias, mask, causal, key_lengths) -> Array | None:
    """The result of a flash kernel; None if there is none for it."""
    if (
        bias is None
        and mask is not None
        and mask.shape[1] == mask.shape[2] == 1  # of keys alone
        and not causal
        and key_lengths is None
    ):
        query, key, value, key_lengths = _allowed_first(query, key, value, mask[:, 0, 0])
        mask = None
    if bias is None and mask is None:
        return _first_kernel(query, key, value, scale, None, causal, key_lengths)
    mask = merged_mask(mask, causal, key_lengths, query.shape[1], key.shape[1])
    query, bias = _masks_in_bias(query, bias, mask, key.shape[1])
    if bias.size > MOST_BIASES:
        return None
    return _first_kernel(query, key, value, scale, bias, False, None)


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


def _masks_in_bias(
    query: Float[Array, "B N H D"],
    bias: Float[Array, "#B #H #N M"] | None,
    mask: Bool[Array, "#B #H #N #M"] | None,
    keys: int,
) -> tuple[Float[Array, "B N H D"], Float[Array, "#B #H N M"]]:
    """(query, bias in its dtype) in which the masked keys count nothing.

    Where all are masked the query becomes 0, so that it attends to all equally.
    """
    bias = jnp.zeros((1, 1, 1, 1), query.dtype) if bias is None else bias.astype(query.dtype)
    if mask is not None:
        bias = jnp.where(mask, bias, jnp.asarray(MASKED[query.dtype.name], query.dtype))
        some = mask.any(-1).transpose(0, 2, 1)[..., None]  # [B, N, H, 1]
        query = jnp.where(some, query, jnp.zeros((), query.dtype))
    return query, jnp.broadcast_to(bias, (*bias.shape[:2], query.shape[1], keys))


# ---------------------------------------------------------------- kernels


def cudnn_attention(query, key, value, scale, bias, causal, lengths) -> Float[Array, "B N H D"]:
    """cuDNN's, through JAX. With a bias, the gradient is that of products in chunks: exact for any shape."""

    def kernel(query, key, value, bias):
        masks = {} if bias is None else {"bias": bias}
        masks |= {"is_causal": True} if causal else {}
        masks |= {} if lengths is None else {"key_value_seq_lengths": lengths}
        return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn", **masks)

    if bias is None:
        return kernel(query, key, value, None)
    biased = jax.custom_vjp(kernel)

    def backward(inputs, gradient):
        products = lambda query, key, value, bias: chunked_attention(query, key, value, scale, bias)  # noqa: E731
        return jax.vjp(products, *inputs)[1](gradient)

    biased.defvjp(lambda *inputs: (kernel(*inputs), inputs), backward)
    return biased(query, key, value, bias)


def hopper_attention(query, key, value, scale, bias, causal, lengths) -> Float[Array, "B N H D"]:
    """Tokamax's for Hopper and later devices. It is called as a function of this name: see `cost`."""
    import tokamax  # the extra `kernels`  # pyright: ignore[reportMissingImports]

    def hopper_attention(query, key, value, lengths):
        return tokamax.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=causal,
            key_value_seq_lengths=lengths,
            implementation="mosaic",
        )

    return jax.jit(hopper_attention)(query, key, value, lengths)


class Kernel(NamedTuple):
    """A flash kernel.

    Attributes:
        attend: (query, key, value, scale, bias, causal, lengths) -> the result.
        may_run: whether this device can have it.
        takes_bias: whether it takes one.
    """

    attend: Callable[..., Any]
    may_run: Callable[[], bool]
    takes_bias: bool


# In order of preference.
KERNELS = {
    "tokamax": Kernel(hopper_attention, lambda: on_hopper(), takes_bias=False),
    "cuDNN": Kernel(cudnn_attention, lambda: on_cuda(), takes_bias=True),
}


def _first_kernel(query, key, value, scale, bias, causal, lengths) -> Array | None:
    """The result of the first kernel that works here; None if none does."""
    form = Form(causal, lengths is not None, bias is not None)
    for name, kernel in KERNELS.items():
        if kernel.may_run() and works(name, query.dtype.name, query.shape[-1], form):
            try:
                return kernel.attend(query, key, value, scale, bias, causal, lengths)
            except NotImplementedError as error:  # of these shapes
                _warn(name, f"{query.shape} and {key.shape}", error)
    return None


@functools.cache
def works(name: str, dtype: str, head_dim: int, form: Form) -> bool:
    """Whether a kernel and its gradient are right: tried once on the device, with few numbers.

    If it fails or is wrong, one warning says so, and attention goes on without it: with the next kernel, or
    in chunks.
    """
    kernel = KERNELS[name]
    if form.bias and not kernel.takes_bias:
        return False
    try:
        with jax.ensure_compile_time_eval():  # also while something else is traced
            error = _trial_error(kernel, dtype, head_dim, form)
    except ModuleNotFoundError as missing:
        if missing.name == name:  # not installed
            return False
        return _warn(name, f"heads of {head_dim} {dtype}", missing)
    except Exception as failure:  # noqa: BLE001 (of the package, XLA or the driver)
        return _warn(name, f"heads of {head_dim} {dtype}", failure)
    if not error < TRIAL_ERROR:
        return _warn(name, f"heads of {head_dim} {dtype}", f"its error is {error:.2g}")
    return True


def _trial_error(kernel: Kernel, dtype: str, head_dim: int, form: Form) -> float:
    """The largest relative error of a kernel's result and gradients."""
    rng = np.random.default_rng(0)
    query, key, value, weight = (jnp.asarray(rng.normal(size=(2, 64, 2, head_dim)), dtype) for _ in range(4))
    bias = jnp.asarray(rng.normal(size=(1, 2, 64, 64)), dtype) if form.bias else None
    lengths = jnp.array([40, 64], jnp.int32) if form.lengths else None
    scale = head_dim**-0.5

    def weighted(attend):
        def of(query, key, value):
            out = attend(query, key, value)
            return (out.astype(jnp.float32) * weight.astype(jnp.float32)).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))(query, key, value)
        return out, *gradients

    mask = merged_mask(None, form.causal, lengths, 64, 64)
    found = weighted(lambda *x: kernel.attend(*x, scale, bias, form.causal, lengths))
    expected = weighted(lambda q, k, v: explicit_attention(q, k, v, scale, bias, mask)[0])
    errors = []
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (np.asarray(x.astype(jnp.float32)) for x in (ours, theirs))
        errors.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
    return max(errors) if np.isfinite(errors).all() else float("inf")


def _warn(name: str, what: str, reason: Any) -> bool:
    """Say that a kernel is not used. Returns False."""
    line = " ".join(f"{type(reason).__name__}: {reason}".split()) if isinstance(reason, Exception) else reason
    warnings.warn(f"attention without {name}'s kernel for {what}: {cast(str, line)[:200]}", stacklevel=2)
    return False
