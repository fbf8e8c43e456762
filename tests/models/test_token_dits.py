"""Adaptive depth, token pruning and two grains: a DiT where nothing is left out, and the cost otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import models
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.d2it import detailed_regions, grain_loss, with_fine_grain
from jaxldm.nn.routing import ROUTING

SIZES = {"hidden_size": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "sample_size": 16}
TOKENS, WIDTH = 16, 16
X = jax.random.normal(jax.random.key(2), (2, 16, 16, 1))
T = jnp.array([400.0, 450.0])


@functools.cache
def plain():
    """A DiT whose every layer does something, and its parameters."""
    module = models.build("tiny-dit", **SIZES)
    leaves, tree = jax.tree.flatten(models.init(module, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return module, jax.tree.unflatten(
        tree, [leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


def build(name, **options):
    """A dynamic network that begins as the DiT."""
    module = models.build(name, **SIZES, **options)
    return module, models.init_from(module, jax.random.key(3), plain()[1])


def call(module, params, t=T, **options):
    return jax.jit(lambda params: module.apply({"params": params}, X, t, jnp.array([3, 10]), **options))(
        params
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny-adaptive-depth", {}),
        ("tiny-token-pruning", {"token_capacity": 1.0}),
        ("tiny-d2it", {"fine_share": 0.0}),
    ],
)
def test_where_nothing_is_left_out_it_is_the_dit_bit_for_bit(name, options):
    module, params = build(name, **options)
    np.testing.assert_array_equal(call(module, params), call(*plain()))


def with_router(params, kernel, bias):
    return {**params, "time_router": {"router": {"kernel": kernel, "bias": bias}}}


def test_blocks_that_are_skipped_are_those_that_were_masked():
    module, params = build("tiny-adaptive-depth", time_groups=3)
    kernel = jax.random.normal(jax.random.key(5), params["time_router"]["router"]["kernel"].shape)
    params = with_router(params, kernel, jnp.zeros(3))
    fixed = models.fix_routers(module, params)
    assert len(set(fixed.config.plan)) > 1 and "111" not in fixed.config.plan
    costs = [models.count_macs(group) for group in models.planned_groups(fixed)]
    whole, block = models.count_macs(plain()[0]), TOKENS * WIDTH * (12 * WIDTH + 2 * TOKENS) + 6 * WIDTH**2
    assert costs == [whole - block * (3 - gates.count("1")) for gates in fixed.config.plan]
    sliced, masked = (jax.jit(lambda t, m=m: m.apply({"params": params}, X, t)) for m in (fixed, module))
    for t in (jnp.array([10.0, 20.0]), jnp.array([900.0, 990.0]), jnp.array([10.0, 900.0])):
        np.testing.assert_allclose(sliced(t), masked(t), atol=1e-5)

    def error(params):
        return jnp.sum(module.apply({"params": params}, X, jnp.array([10.0, 500.0])) ** 2)

    assert np.all(np.asarray(jax.jit(jax.grad(error))(params)["time_router"]["router"]["bias"]))
    with pytest.raises(InvalidArgumentError, match="plan skips all blocks"):
        models.build("tiny-adaptive-depth", **SIZES, time_groups=1, plan=("000",))


def test_the_most_important_tokens_alone_go_through_the_pruned_blocks():
    """By hand: the middle block of the plain DiT on these tokens, the others as they were."""
    module, params = build("tiny-token-pruning", pruned_blocks=(1, 2), token_capacity=0.25)
    found, left = call(module, params, capture_intermediates=True, mutable=["intermediates"])
    inside = left["intermediates"]
    before, after = inside["blocks_0"]["__call__"][0], inside["blocks_1"]["__call__"][0]
    (scores,) = inside["token_router"]["__call__"]
    which = np.sort(np.argsort(-scores, axis=1)[:, :4], axis=1)
    assert after.shape == (2, 4, WIDTH)
    joined = np.array(before)
    joined[np.arange(2)[:, None], which] = after
    last = models.dit.DiTBlock(plain()[0].config)
    c = inside["t_embedder"]["__call__"][0] + inside["y_embedder"]["__call__"][0]
    expected = last.apply({"params": params["blocks_2"]}, joined, c)
    np.testing.assert_allclose(inside["blocks_2"]["__call__"][0], expected, atol=1e-5)
    saved = 12 * TOKENS * WIDTH * (12 * WIDTH) // TOKENS + 2 * WIDTH * (TOKENS**2 - 4**2)
    router = TOKENS * WIDTH * 8 + TOKENS * 8
    assert models.count_macs(module) == models.count_macs(plain()[0]) - saved + router
    assert found.shape == X.shape

    def error(params):
        return jnp.sum(module.apply({"params": params}, X, T) ** 2)

    assert np.any(np.asarray(jax.jit(jax.grad(error))(params)["token_router"]["fc1"]["kernel"]))


def test_fine_grains_are_where_they_are_predicted_and_cost_four_tokens():
    module, params = build("tiny-d2it", fine_share=0.25)
    regions, fine = TOKENS, 4
    _, left = module.apply({"params": params}, X, T, mutable=[ROUTING])
    (logits,) = left[ROUTING]["grains"]
    assert logits.shape == (2, regions)
    tokens = regions + 3 * fine
    block = lambda n: n * WIDTH * (12 * WIDTH + 2 * n) + 6 * WIDTH**2  # noqa: E731
    plain_cost = models.count_macs(plain()[0])
    further = 3 * (block(tokens) - block(regions)) + block(regions) + regions * WIDTH
    further += 4 * regions * 4 * WIDTH  # the embedding of all fine patches of 2x2 pixels
    further += -fine * WIDTH * 16 + 4 * fine * WIDTH * 4 + 2 * WIDTH**2  # last layers: as many pixels
    assert models.count_macs(module) == plain_cost + further
    # Pixels of a region change with the last layer of its own grain alone.
    fine_last = jax.tree.map(lambda p: p + 1.0, params["fine_final_layer"]["linear"])
    changed = {**params, "fine_final_layer": {**params["fine_final_layer"], "linear": fine_last}}
    moved = np.abs(call(module, changed) - call(module, params)).reshape(2, 4, 4, 4, 4).max(axis=(2, 4))
    which = np.argsort(-logits, axis=1)[:, :fine]
    for image in range(2):
        assert set(np.flatnonzero(moved[image].reshape(-1) > 1e-3)) == set(which[image])


def test_fine_patches_lie_where_their_pixels_are():
    """With a last layer that gives back the tokens' own mean pixel, four values of a region stay apart."""
    module, params = build("tiny-d2it", fine_share=0.5)
    config = module.config
    tokens = jnp.arange(4 * TOKENS, dtype=jnp.float32).reshape(1, 4 * TOKENS, 1) * jnp.ones((1, 1, 4))
    joined = module._joined(tokens, TOKENS)
    picture = module._picture(joined, jnp.zeros((1, 16, 16, 1)))[0, ..., 0]
    np.testing.assert_array_equal(picture[:4, :4], np.kron([[0, 1], [2, 3]], np.ones((2, 2))))
    np.testing.assert_array_equal(picture[4:6, 0:2], np.full((2, 2), 4.0 * 4))  # region 4 begins row two
    enlarged = with_fine_grain(params, config)
    kernel, own = params["x_embedder"]["proj"]["kernel"], enlarged["fine_embedder"]["kernel"]
    patch = jax.random.normal(jax.random.key(0), (2, 2))
    np.testing.assert_allclose(
        jnp.einsum("ij,ijcf->f", patch, own),
        jnp.einsum("ij,ijcf->f", jnp.kron(patch, jnp.ones((2, 2))), kernel),
        atol=1e-5,
    )


def test_grains_are_learned_from_the_detail_of_clean_images():
    images = np.zeros((1, 16, 16, 1), np.float32)
    images[0, :4, 4:8] = np.random.default_rng(0).normal(size=(4, 4, 1))
    images[0, 8:12, 8:12] = 5.0  # bright, and smooth
    images[0, 12:, 12] = 1.0
    np.testing.assert_array_equal(np.flatnonzero(detailed_regions(jnp.asarray(images), 4, 2)[0]), [1, 15])
    right = jnp.full((1, 16), -9.0).at[0, jnp.array([1, 15])].set(9.0)
    assert grain_loss(right, jnp.asarray(images), 4, 2) < 1e-3 < grain_loss(-right, jnp.asarray(images), 4, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny-token-pruning", {"pruned_blocks": (2, 2)}, r"pruned_blocks must be \(first, last\)"),
        ("tiny-token-pruning", {"token_capacity": 0.0}, "token_capacity must be above 0"),
        ("tiny-token-pruning", {"scan": True}, "has no scan"),
        ("tiny-d2it", {"fine_share": 1.0}, r"fine_share must be in \[0, 1\)"),
        ("tiny-d2it", {"position_embedding": "learned"}, "position_embedding 'sincos' alone"),
        ("tiny-d2it", {"route": (0, 1)}, "has no route"),
    ],
)
def test_what_cannot_be_is_refused(name, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        models.build(name, **SIZES | options)
