"""DyDiT: a DiT while its gates are open, the same numbers masked and sliced, and its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import models
from jaxldm.errors import InvalidArgumentError
from jaxldm.nn.routing import ROUTING, pass_through, straight_through, time_group

SMALL = {"hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 7}


def build(**options):
    return models.build("tiny-dydit", **SMALL | {"channel_groups": 4} | options)


@functools.cache
def plain():
    """A DiT whose every layer does something, and its parameters."""
    module = models.build("tiny-dit", **SMALL)
    params, key = models.init(module, jax.random.key(0)), jax.random.key(1)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return module, jax.tree.unflatten(
        tree, [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


def inputs(*times):
    key = jax.random.key(2)
    return jax.random.normal(key, (len(times), 28, 28, 1)), jnp.array(times, jnp.float32)


def call(module, params, x, t, **options):
    labels = jnp.arange(len(t)) % 11
    return jax.jit(lambda params: module.apply({"params": params}, x, t, labels, **options))(params)


def from_plain(module):
    return models.init_from(module, jax.random.key(3), plain()[1])


def test_with_open_gates_it_is_the_dit_bit_for_bit():
    x, t = inputs(10, 990, 500)
    expected = call(*plain(), x, t)
    dydit = build()
    params = from_plain(dydit)
    np.testing.assert_array_equal(call(dydit, params, x, t), expected)
    np.testing.assert_array_equal(call(models.fix_routers(dydit, params), params, x, t), expected)


def closing(params, seed=4):
    """The parameters with a router that closes about half, other parts at each time."""
    router = params["time_router"]["router"]
    kernel = 3 * jax.random.normal(jax.random.key(seed), router["kernel"].shape)
    return {**params, "time_router": {"router": {"kernel": kernel, "bias": jnp.zeros_like(router["bias"])}}}


def compiled(module):
    return jax.jit(lambda params, x, t: module.apply({"params": params}, x, t, jnp.array([3, 10])))


@pytest.mark.parametrize("capacity", [1.0, 0.5])
def test_what_is_sliced_is_what_was_masked_and_mixed_times_too(capacity):
    dydit = build(token_capacity=capacity, time_groups=2)
    params = closing(from_plain(dydit))
    fixed = models.fix_routers(dydit, params)
    assert len(set(fixed.config.plan)) == 2 and "0" in fixed.config.plan[0] and "0" in fixed.config.plan[1]
    masked, sliced = compiled(dydit), compiled(fixed)
    found = []
    for times in [(10, 10), (990, 990), (10, 990)]:
        x, t = inputs(*times)
        found.append(masked(params, x, t))
        np.testing.assert_allclose(sliced(params, x, t), found[-1], atol=2e-5)
    assert sliced._cache_size() == 1  # one compiled function for all times
    np.testing.assert_allclose(found[-1], jnp.stack([found[0][0], found[1][1]]), atol=2e-5)
    assert np.abs(found[0] - compiled(plain()[0])(plain()[1], *inputs(10, 10))).max() > 1e-2


def test_a_plan_can_be_trained_on():
    dydit = build(time_groups=2)
    params = closing(from_plain(dydit))
    fixed, (x, t) = models.fix_routers(dydit, params), inputs(10, 990)
    np.testing.assert_array_equal(
        call(fixed, params, x, t, train=True), call(dydit, params, x, t, train=True)
    )


def test_a_capacity_of_all_tokens_has_no_router():
    assert "token_router" not in models.shapes(build(token_capacity=1))["blocks_0"]
    assert "token_router" in models.shapes(build(token_capacity=0.9))["blocks_0"]


def test_gradients_reach_the_routers():
    dydit = build(token_capacity=0.5)
    params = closing(from_plain(dydit))
    x, t = inputs(10, 300, 600, 900)

    def error(params):
        return jnp.sum(dydit.apply({"params": params}, x, t, train=True) ** 2)

    def cost(params):
        _, left = dydit.apply({"params": params}, x, t, mutable=[ROUTING])
        return left[ROUTING]["compute"][0].mean()

    of_error, of_cost = jax.jit(jax.grad(error))(params), jax.jit(jax.grad(cost))(params)
    assert np.all(np.any(np.asarray(of_error["time_router"]["router"]["kernel"]), axis=0))  # every gate
    assert np.all(np.asarray(of_cost["time_router"]["router"]["bias"]) > 0)  # opening costs
    for block in ("blocks_0", "blocks_1"):
        assert np.any(np.asarray(of_error[block]["token_router"]["fc1"]["kernel"]))


def test_multiply_accumulates_are_those_of_the_closed_form():
    config = build().config
    tokens, size, hidden = 16, 32, 128
    dydit = build(token_capacity=0.5)
    params = closing(from_plain(dydit))
    fixed = models.fix_routers(dydit, params)
    whole = models.count_macs(models.build("tiny-dit", **SMALL))
    router = tokens * size * 8 + tokens * 8
    found = []
    for group, gates in zip(models.planned_groups(fixed), fixed.config.table(), strict=True):
        heads, channels = config.split(gates)
        attention = tokens * size * (4 * size + 2 * tokens) * heads.mean(axis=1)
        mlp = 2 * tokens * size * hidden * channels.mean(axis=1)
        full = 2 * (tokens * size * (4 * size + 2 * tokens) + 2 * tokens * size * hidden)
        expected = whole - full + attention.sum() + mlp.sum() / 2 + 2 * router
        assert models.count_macs(group) == expected
        found.append((attention.sum() + mlp.sum() / 2) / full)
    _, left = dydit.apply({"params": params}, *inputs(10, 300, 600, 900), mutable=[ROUTING])
    np.testing.assert_allclose(left[ROUTING]["compute"][0], found, rtol=1e-5)


def test_configs_survive_their_file_and_refuse_what_cannot_be():
    dydit = build(time_groups=2)
    fixed = models.fix_routers(dydit, closing(from_plain(dydit)))
    assert models.config_from_dict(models.config_to_dict(fixed.config)) == fixed.config
    for options, message in (
        ({"channel_groups": 3}, "cannot be split into 3 groups"),
        ({"token_capacity": 0.0}, "token_capacity must be above 0 and at most 1"),
        ({"token_capacity": 1.5}, "token_capacity must be above 0 and at most 1"),
        ({"max_time": 0.0}, "max_time must be above 0"),
        ({"scan": True}, "has no scan"),
        ({"route": (0, 1)}, "has no route"),
        ({"plan": ("1",)}, r"plan must be 4 texts \(time_groups\) of 16 gates"),
        ({"plan": ("0" * 16,) * 4}, "closes all heads"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            build(**options)
    with pytest.raises(InvalidArgumentError, match="must be a DiT with routers of the time"):
        models.fix_routers(plain()[0], plain()[1])
    with pytest.raises(InvalidArgumentError, match="has no plan"):
        models.planned_groups(dydit)


def test_gates_are_exact_and_times_lie_in_equal_parts():
    logits = jnp.array([[-3.0, -1.0, -2.0], [0.3, -5.0, 7.0]])
    np.testing.assert_array_equal(straight_through(logits), [[0, 1, 0], [1, 0, 1]])
    times = jnp.array([0.0, 249, 250, 999, 1000])
    np.testing.assert_array_equal(time_group(times, 4, 1000.0), [0, 0, 1, 3, 3])
    new, old = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    gate = straight_through(jnp.array([[1.0], [-1.0], [2.0]]), jnp.array([[True], [False], [True]]))
    picked = pass_through(new, old, gate[..., None])
    np.testing.assert_array_equal(picked, jnp.stack([new[0], old[1], new[2]]))
