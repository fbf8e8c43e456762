"""Matrix products with PyTorch's default initialisation, and the compute dtype as a string."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, Num

from jaxldm.arguments import a_dtype
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.indices import check_indices
from jaxldm.nn.initialization import Initializer, fan_in_uniform, normal, parameter
from jaxldm.nn.quantized import Quantized, apply_quantized, observe_input, operands


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype called `name` in a model's config: "float32", "bfloat16" or "float16".

    Raises:
        UnknownNameError: another name.
    """
    return jnp.dtype(a_dtype("dtype", name))


def product_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """In which dtype the compiler is given the operands of a product in `dtype`, and a bias is added to it.

    Sums of products are float32, the bias is added to them, and then they are rounded once: so it is in
    PyTorch, and in the kernels into which XLA fuses the bias on accelerators. On a CPU it would round the
    sum, add the bias and round again; there the products are computed in float32 in any case.
    """
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


class Linear(nn.Module):
    """y = x W + b on the last axis, in `dtype`, the parameters in float32. `[..., in]` -> `[..., features]`.

    Attributes:
        features: width of the result.
        use_bias: without it y = x W.
        dtype: compute dtype; sums of products are float32 in any case.
        kernel_init, bias_init: initializers; None is `fan_in_uniform(in)`.
        output_dtype: dtype of the result, where it must be wider than `dtype`.
    """

    features: int
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None
    output_dtype: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        dtype = compute_dtype(self.dtype)
        output = compute_dtype(self.output_dtype or self.dtype)
        default = fan_in_uniform(x.shape[-1])
        kernel = parameter(self, "kernel", self.kernel_init or default, (x.shape[-1], self.features))
        wide = product_dtype(dtype)
        observe_input(self, x)
        if isinstance(kernel, Quantized):
            y = quantized_matmul(x.astype(dtype), kernel, wide)
        else:
            x, kernel = (value.astype(dtype).astype(wide) for value in (x, kernel))
            y = flat_matmul(x, kernel, wide if wide == jnp.float32 else output)
        if self.use_bias:
            bias = parameter(self, "bias", self.bias_init or default, (self.features,))
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y.astype(output)


def flat_matmul(
    x: Num[Array, "... in"], kernel: Num[Array, "in out"], dtype: jnp.dtype | None = None
) -> Num[Array, "... out"]:
    """x @ kernel as ONE matrix product, all leading axes joined into rows; in the dtype of x by default.

    The gradient of the kernel is then a plain matrix product as well. That of a batched product sums over
    two axes, for which XLA's CPU backend first transposes the whole input: a sixth of a DiT block's time.
    """
    rows = x.reshape(-1, x.shape[-1])
    tall = kernel.shape[0] > kernel.shape[1] and jnp.issubdtype(kernel.dtype, jnp.floating)
    product = _product_of_tall if tall and jax.default_backend() == "cpu" else _product
    return product(rows, kernel, dtype).reshape(*x.shape[:-1], kernel.shape[1])


def _product(
    rows: Num[Array, "N in"], kernel: Num[Array, "in out"], dtype: jnp.dtype | None
) -> Num[Array, "N out"]:
    return jnp.matmul(rows, kernel, preferred_element_type=dtype)


# The same with another gradient: (g^T x)^T and not x^T g, as XLA's CPU product of many rows and few columns
# runs at half speed. The kernel itself is left as it is: transposed in every call, it would be copied.
_product_of_tall = jax.custom_jvp(_product, nondiff_argnums=(2,))


def _tangent_of_tall(
    dtype: jnp.dtype | None, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    (rows, kernel), (rows_dot, kernel_dot) = primals, tangents
    parts = []
    if not isinstance(rows_dot, SymbolicZero):
        parts.append(_product_of_tall(rows_dot, kernel, dtype))
    if not isinstance(kernel_dot, SymbolicZero):
        # The barrier keeps the compiler from taking the two transpositions away.
        parts.append(_product(rows, jax.lax.optimization_barrier(kernel_dot.T).T, dtype))
    out = _product_of_tall(rows, kernel, dtype)
    return out, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(out)


_product_of_tall.defjvp(_tangent_of_tall, symbolic_zeros=True)


def quantized_matmul(
    x: Float[Array, "... in"], kernel: Quantized, dtype: jnp.dtype
) -> Float[Array, "... out"]:
    """x @ kernel of a kernel in fewer bits, float32: a product of codes where activations have as few bits.

    On a processor codes are multiplied in float32, which is exact to its rounding and has fast products.
    """

    def contract(x: Array, kernel: Array) -> Array:
        if jax.default_backend() == "cpu":
            x, kernel = operands(x, kernel, jnp.float32)
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        return flat_matmul(x, kernel, jnp.dtype(jnp.int32 if whole else jnp.float32)).astype(jnp.float32)

    return apply_quantized(x, kernel, contract, dtype)


class Embedding(nn.Module):
    """A table `[num_embeddings, features]` indexed by integers. indices `[...]` -> `[..., features]`.

    Starts from N(0, 1) as PyTorch's does.

    Raises:
        InvalidArgumentError: indices that are no whole numbers, or that are outside of the table. Inside of
            jit, grad and vmap the numbers cannot be seen, and an index outside gives the nearest row: labels
            and token ids are checked where they enter the program.
    """

    num_embeddings: int
    features: int
    dtype: str = "float32"
    embedding_init: Initializer = normal(1.0)

    @nn.compact
    def __call__(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise InvalidArgumentError(
                f"token ids and class labels must be whole numbers, got {shown(indices)}"
            )
        where = f"the table {self.name!r}"
        check_indices("token ids and class labels", indices, self.num_embeddings, where=where)
        table = parameter(self, "embedding", self.embedding_init, (self.num_embeddings, self.features))
        return jnp.take(table, indices, axis=0, mode="clip").astype(compute_dtype(self.dtype))
