"""Matrix products with PyTorch's default initialisation, and the compute dtype as a string."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.errors import one_of

Initializer = Callable[..., Array]
DTYPES = ("float32", "bfloat16", "float16")


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype called `name` in a model's config: "float32", "bfloat16" or "float16".

    Raises:
      UnknownNameError: another name.
    """
    return jnp.dtype(one_of("dtype", name, DTYPES))


def fan_in_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): how PyTorch starts weights and biases of linear and convolution
    layers.

    The models' published training runs all began from it (LeCun et al. 1998, section 4.6, up to a factor).
    """
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """y = x W + b on the last axis. x `[..., in]` -> `[..., features]`, computed in `dtype`; parameters are
    float32.

    `kernel_init` and `bias_init` default to `fan_in_uniform(in)`.
    """

    features: int
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        dtype = compute_dtype(self.dtype)
        default = fan_in_uniform(x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or default, (x.shape[-1], self.features), jnp.float32)
        y = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (((x.ndim - 1,), (0,)), ((), ())))
        if self.use_bias:
            bias = self.param("bias", self.bias_init or default, (self.features,), jnp.float32)
            y = y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class Embedding(nn.Module):
    """A table `[num_embeddings, features]` read by integer index. indices `[...]` -> `[..., features]`.

    Starts from N(0, 1) as PyTorch's does. An index outside the table reads its nearest row: labels are
    checked where they enter the program.
    """

    num_embeddings: int
    features: int
    dtype: str = "float32"
    embedding_init: Initializer | None = None

    @nn.compact
    def __call__(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        init = self.embedding_init or nn.initializers.normal(1.0)
        table = self.param("embedding", init, (self.num_embeddings, self.features), jnp.float32)
        return jnp.take(table, indices, axis=0, mode="clip").astype(compute_dtype(self.dtype))
