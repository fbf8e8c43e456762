"""What `kept_programs` takes for equal, and what not."""

import jax
import numpy as np
import pytest
from jax._src import compiler

X = np.arange(3, dtype=np.float32)


@pytest.fixture
def built(monkeypatch):
    """One entry for every program that XLA builds."""
    seen, real = [], compiler.backend_compile_and_load

    def build(*inputs):
        seen.append(inputs)
        return real(*inputs)

    monkeypatch.setattr(compiler, "backend_compile_and_load", build)
    return seen


@pytest.mark.skipif(compiler._cache_read.__name__ != "read_kept", reason="not with this release of JAX")
def test_equal_programs_of_two_functions_are_built_once(built):
    def made(factor):
        return jax.jit(lambda x: x * factor + 0.1875)(X)

    results = [made(3.0), made(3.0)]
    assert len(built) == 1
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(made(4.0), 4 * X + np.float32(0.1875))
    assert len(built) == 2
    jax.clear_caches()
    made(3.0)
    assert len(built) == 2
    placed = jax.jit(lambda x: x * 3.0 + 0.1875)(jax.device_put(X, jax.devices()[1]))
    assert len(built) == 3 and placed.devices() == {jax.devices()[1]}


def test_a_program_that_calls_back_is_of_one_function():
    def answer(value):
        spec = jax.ShapeDtypeStruct((), np.float32)
        return jax.jit(lambda x: jax.pure_callback(lambda _: np.float32(value), spec, x))(X)

    assert [float(answer(value)) for value in (1, 2)] == [1, 2]
