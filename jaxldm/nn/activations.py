"""Activations, computed in float32 and rounded once, by the names that config.json uses."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, " *shape"]], Float[Array, " *shape"]]


def rounded_once(function: Activation) -> Activation:
    """The function in float32, its result in the dtype of the argument, as PyTorch's kernels have it.

    In 16 bits each of its operations would round: that makes SiLU's error 1.7 times as large. The gradient
    computes it again, so that a training step keeps the argument in 16 bits and nothing in float32.
    """

    @jax.checkpoint
    def through_float32(x: Array) -> Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    @functools.wraps(function)
    def activation(x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
        return through_float32(x) if x.dtype in (jnp.bfloat16, jnp.float16) else function(x)

    return activation


@rounded_once
def silu(x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """x sigmoid(x). Elfwing et al. 2017."""
    return jax.nn.silu(x)


@rounded_once
def gelu(x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """x Phi(x), with the error function. Hendrycks & Gimpel 2016."""
    return jax.nn.gelu(x, approximate=False)


@rounded_once
def gelu_tanh(x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """The approximation of GELU by a hyperbolic tangent. Hendrycks & Gimpel 2016, section 2."""
    return jax.nn.gelu(x, approximate=True)


@rounded_once
def quick_gelu(x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """x sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with.

    Hendrycks & Gimpel 2016, section 2.
    """
    return x * jax.nn.sigmoid(1.702 * x)


# "gelu" is exact, with the error function; "gelu_new" its tanh form.
ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": silu,
}
