"""Activations in 16 bits are the float32 ones, rounded once, and their gradients keep nothing wider."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm.nn.activations import ACTIVATIONS

FORMS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_new": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_dtype_is_near_the_formula(name, optimized):
    x = np.random.default_rng(0).standard_normal(4000) * 2
    for dtype, rounding in (("float32", 2.0**-24), ("bfloat16", 2.0**-9), ("float16", 2.0**-12)):
        given = jnp.asarray(x, dtype)
        result = jax.jit(ACTIVATIONS[name])(given)
        assert result.dtype == dtype
        exact = FORMS[name](np.asarray(given, np.float64))
        error = np.asarray(result, np.float64) - exact
        # Rounding once: half of the last place at most, 0.58 of that on average.
        assert np.sqrt(np.square(error).mean() / np.square(exact).mean()) < 1.1 * rounding, dtype


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"relu"}))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_keep_16_bits(name, dtype):
    x = jnp.linspace(-3, 3, 7, dtype=dtype)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(ACTIVATIONS[name], x)[1], x))
    assert {leaf.dtype for leaf in kept if leaf.shape == x.shape} == {jnp.dtype(dtype)}
    gradient = jax.grad(lambda x: ACTIVATIONS[name](x).sum())(x)
    wide = jax.grad(lambda x: ACTIVATIONS[name](x).sum())(x.astype(jnp.float32))
    np.testing.assert_array_equal(
        np.asarray(gradient, np.float32), np.asarray(wide.astype(dtype), np.float32)
    )
