"""The flattened matrix product of `Linear` against the plain one: values, both derivatives, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.linear import Embedding, flat_matmul


@pytest.mark.parametrize(("leading", "features_in", "features_out"), [((3, 4), 12, 5), ((2, 3, 2), 5, 12)])
def test_value_and_derivatives_are_those_of_the_plain_product(leading, features_in, features_out):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (*leading, features_in))
    kernel = jax.random.normal(keys[1], (features_in, features_out))
    cotangent = jax.random.normal(keys[2], (*leading, features_out))
    tangents = (x + 1.0, jax.random.normal(keys[3], kernel.shape))

    def plain(x, kernel):
        return jnp.tensordot(x, kernel, 1)

    np.testing.assert_allclose(jax.jit(flat_matmul)(x, kernel), plain(x, kernel), rtol=1e-5, atol=1e-5)

    def gradients(product):
        return jax.jit(lambda x, kernel: jax.vjp(product, x, kernel)[1](cotangent))(x, kernel)

    for ours, expected in zip(gradients(flat_matmul), gradients(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    forward = [jax.jvp(f, (x, kernel), tangents)[1] for f in (flat_matmul, plain)]
    np.testing.assert_allclose(*forward, rtol=1e-5, atol=1e-5)


def test_a_tall_kernel_is_not_transposed_where_no_gradient_is_taken():
    """On a processor that would copy it in every call; its gradient is (g^T x)^T, twice as fast as x^T g."""
    x, kernel = jnp.ones((6, 16)), jnp.ones((16, 4))
    assert "transpose" not in jax.jit(flat_matmul).lower(x, kernel).as_text()
    gradient = jax.jit(jax.grad(lambda kernel: jnp.sin(flat_matmul(x, kernel)).sum())).lower(kernel).as_text()
    products = [line.split("->")[-1].strip() for line in gradient.splitlines() if "dot_general" in line]
    assert products == ["tensor<6x4xf32>", "tensor<4x16xf32>"]
    assert "optimization_barrier" in gradient


@pytest.mark.parametrize("varied", [0, 1])
def test_the_derivative_along_one_argument_is_one_more_product(varied):
    given = [jnp.arange(96.0).reshape(6, 16) / 50, jnp.arange(64.0).reshape(16, 4) / 9]

    def along(direction):
        def product(one):
            return flat_matmul(one, given[1]) if varied == 0 else flat_matmul(given[0], one)

        return jax.jvp(product, (given[varied],), (direction,))[1]

    ones = jnp.ones_like(given[varied])
    expected = ones @ given[1] if varied == 0 else given[0] @ ones
    np.testing.assert_allclose(along(ones), expected, rtol=1e-4)
    program = jax.jit(along).lower(ones).as_text()
    assert program.count("dot_general") == 1  # of the derivative; no product with zeros


def test_it_can_be_mapped_and_keeps_bfloat16():
    x, kernel = jnp.ones((3, 2, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)
    mapped = jax.vmap(flat_matmul, (0, None))(x, kernel)
    assert mapped.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mapped.astype(jnp.float32), np.full((3, 2, 4), 8.0))


@pytest.mark.unchecked
def test_indices_outside_of_a_table_are_refused_where_they_can_be_seen():
    """Inside of jit they cannot: there the nearest row answers."""
    table = Embedding(4, 2)
    params = table.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    for wrong in (4, -1):
        with pytest.raises(InvalidArgumentError, match=r"must lie in \[0, 3\].*" + str(wrong)):
            table.apply(params, jnp.array([0, wrong]))
        nearest = table.apply(params, jnp.array([0, min(max(wrong, 0), 3)]))
        np.testing.assert_array_equal(jax.jit(table.apply)(params, jnp.array([0, wrong])), nearest)
    with pytest.raises(InvalidArgumentError, match="whole numbers, got an array"):
        table.apply(params, jnp.ones(2))


def test_indices_that_a_jitted_function_holds_are_seen_too():
    table, ids = Embedding(4, 2), jnp.array([3, 1])
    params = table.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(jax.jit(lambda p: table.apply(p, ids))(params), table.apply(params, ids))
    beyond = ids + 1
    with pytest.raises(InvalidArgumentError, match=r"must lie in \[0, 3\].*4"):
        jax.jit(lambda p: table.apply(p, beyond))(params)
