import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm.training.flat import FlatLayout
from jaxldm.training.optimizer import optimizer


@pytest.fixture(scope="module")
def params():
    numbers = np.random.default_rng(0)
    shapes = {"bias": (5,), "kernel": (3, 3, 2, 5), "inner": {"scale": (2,), "kernel": (4, 2)}}
    draw = lambda shape: jnp.asarray(numbers.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda shape: isinstance(shape, tuple))


def test_round_trip_is_exact_on_device_and_host(params):
    layout = FlatLayout(params)
    vector = layout.flatten(params)
    assert vector.shape == (layout.size,) == (90 + 8 + 7,)
    chex.assert_trees_all_equal(layout.unflatten(vector), params)
    host = layout.split(np.asarray(vector))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    chex.assert_trees_all_equal(host, params)
    with pytest.raises(AssertionError):
        layout.unflatten(vector[1:])


def test_the_gradient_of_the_vector_is_that_of_the_tree(params):
    def loss(tree):
        return jnp.sum(jnp.sin(tree["kernel"])) * jnp.sum(tree["inner"]["scale"] ** 2) + tree["bias"][0]

    layout = FlatLayout(params)
    flat = jax.jit(jax.grad(lambda vector: loss(layout.unflatten(vector))))(layout.flatten(params))
    chex.assert_trees_all_close(layout.unflatten(flat), jax.jit(jax.grad(loss))(params), rtol=1e-6)


def test_an_update_of_the_vector_is_that_of_the_tree(params):
    """Clipping, Adam and the decay of matrices alone, for three steps."""
    layout = FlatLayout(params)
    options = {"total_steps": 9, "weight_decay": 0.3, "max_grad_norm": 0.5}
    on_tree, on_vector = optimizer(0.1, **options), optimizer(0.1, **options, decays=layout.decays)

    @jax.jit
    def both(tree, tree_state, vector, vector_state):
        tree_update, tree_state = on_tree.update(jax.tree.map(jnp.cos, tree), tree_state, tree)
        vector_update, vector_state = on_vector.update(jnp.cos(vector), vector_state, vector)
        return jax.tree.map(jnp.add, tree, tree_update), tree_state, vector + vector_update, vector_state

    state = params, on_tree.init(params), layout.flatten(params), on_vector.init(layout.flatten(params))
    for _ in range(3):
        state = both(*state)
    chex.assert_trees_all_close(layout.unflatten(state[2]), state[0], atol=1e-6)
    assert not np.allclose(state[0]["kernel"], params["kernel"], atol=0.05)
