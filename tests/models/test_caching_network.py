"""Networks that reuse what they computed: the plain network to the last bit wherever a step computes."""

import dataclasses

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import NETWORKS, UNET, B, build, params_of

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.errors import InvalidArgumentError


@pytest.fixture(scope="module", params=NETWORKS)
def run(request):
    """(outputs of 3 steps under a cache, one program for all of them; those of the plain network).

    The second step is the first one again.
    """
    module, x, condition = build(request.param)
    inputs = [(x * scale, jnp.full(B, t)) for scale, t in ((1, 0.9), (1.5, 0.6))]
    inputs, params = [inputs[0], *inputs], params_of(module)

    # Parameters and conditions are arguments: XLA folds constants, in another order of sums.
    @jax.jit
    def step(params, condition, cache, memory, i, x, t):
        return models.caching_network(module, params)(cache, memory, i, x, t, condition)

    plain = jax.jit(models.network(module))

    def cached(cache):
        shapes = jax.eval_shape(
            lambda *inputs: step(params, condition, cache, None, 0, *inputs)[1], *inputs[0]
        )
        memory, outputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), []
        for i, (x, t) in enumerate(inputs):
            output, memory = step(params, condition, cache, memory, jnp.int32(i), x, t)
            outputs.append(np.asarray(output))
        return outputs

    cached.is_unet = request.param in ("unet", "unet-of-texts")
    return cached, [np.asarray(plain(params, x, t, condition)) for x, t in inputs]


def test_steps_that_compute_are_those_of_the_plain_network(run):
    cached, plain = run
    always, some, once = (
        cached(D.caching.at_steps([True, *steps])) for steps in ([True] * 2, [False, True], [False] * 2)
    )
    np.testing.assert_array_equal(always, plain)
    np.testing.assert_array_equal([some[0], some[2]], [plain[0], plain[2]])
    np.testing.assert_allclose(some[1], plain[1], rtol=1e-4, atol=1e-4 * np.abs(plain[1]).max())
    assert np.abs(once[2] - plain[2]).max() > 1e-3 * np.abs(plain[2]).max()


LOOKING = {
    "first-block": lambda **options: D.caching.first_block(1e9, first_blocks=1, last_blocks=1, **options),
    "teacache": lambda warm_up, **options: D.caching.teacache([1.0], 1e9, warm_up=warm_up),
}


@pytest.mark.parametrize("form", LOOKING)
def test_caches_that_look_at_the_blocks(run, form):
    """With extrapolation, too: bit for bit where nothing is reused, and otherwise not."""
    cached, plain = run
    always = D.caching.extrapolate(LOOKING[form](warm_up=3), 2)
    if cached.is_unet:
        with pytest.raises(InvalidArgumentError, match="looks at the first blocks of a transformer"):
            cached(always)
        return
    np.testing.assert_array_equal(cached(always), plain)
    some = cached(D.caching.extrapolate(LOOKING[form](warm_up=1, max_skips=9), 2))
    np.testing.assert_array_equal(some[0], plain[0])
    assert np.abs(some[2] - plain[2]).max() > 1e-3 * np.abs(plain[2]).max()


# ---------------------------------------------------------------- which blocks

DIT = models.build("sit-s-8", depth=4, hidden_size=16, num_heads=2, num_classes=4, sample_size=8)
UNET_MODULE = models.build("mini-unet", **UNET)


def memory_of(module, cache):
    """The shapes of what a network remembers under a cache."""
    shape = jax.ShapeDtypeStruct(module.example_inputs()[0].shape, jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)

    def run(params, x, t, labels):
        return models.caching_network(module, params)(cache, None, 0, x, t, labels)[1]

    return jax.eval_shape(run, models.shapes(module), shape, t, labels)


def test_first_and_last_blocks_always_run():
    """Where the middle is reused, other weights change the output of first and last blocks alone."""
    cache = dataclasses.replace(D.caching.fora(10), first_blocks=1, last_blocks=1)
    params = params_of(DIT)
    x, t, labels = jnp.ones((B, 8, 8, 4)), jnp.full(B, 0.5), jnp.zeros(B, jnp.int32)

    @jax.jit
    def second(first, then):
        _, memory = models.caching_network(DIT, first)(cache, None, 0, x, t, labels)
        return models.caching_network(DIT, then)(cache, memory, 1, x, t, labels)[0]

    plain = second(params, params)
    for block in range(4):
        changed = jax.tree.map(lambda leaf: leaf.at[block].add(0.1), params["blocks_0to3"])  # noqa: B023
        output = second(params, {**params, "blocks_0to3": changed})
        assert bool((output == plain).all()) == (block in (1, 2))


def test_teacache_looks_at_the_modulated_input_of_the_first_block():
    cache = D.caching.teacache([1.0, 0.0], 0.1)
    assert memory_of(DIT, cache).decision.signal.shape == (1, 1, 16)
    tokens = models.build("tiny-dit", depth=2)
    assert memory_of(tokens, cache).decision.signal.shape == (1, 49, 128)


@pytest.mark.parametrize(
    "module, cache, words",
    [
        (DIT, D.caching.deepcache(3), "this cache is for U-Nets"),
        (DIT, D.caching.first_block(0.1, first_blocks=3, last_blocks=1), "none of the 4 blocks to reuse"),
        (UNET_MODULE, D.caching.first_block(0.1), "looks at the first blocks of a transformer"),
        (UNET_MODULE, D.caching.teacache([1.0, 0.0]), "looks at the first blocks of a transformer"),
        (UNET_MODULE, D.caching.deepcache(3, skips=3), "skips=3 of the cache is beyond"),
    ],
)
def test_caches_of_other_networks_are_refused(module, cache, words):
    with pytest.raises(InvalidArgumentError, match=words):
        memory_of(module, cache)


def test_a_network_without_such_blocks_says_so():
    class Identity(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, t, labels):
            return x

    call = models.caching_network(Identity(), {})
    with pytest.raises(InvalidArgumentError, match="Identity has nothing that a cache can reuse"):
        call(D.caching.fora(3), None, 0, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("skips", [2, 3])
def test_every_cut_of_a_unet_is_the_unet(skips):
    module = models.build("mini-unet", **UNET | {"layers_per_block": 2})
    params, x = params_of(module), jnp.ones((B, 7, 7, 4))
    cache = D.caching.deepcache(3, skips=skips)

    @jax.jit
    def both(x, t, labels):
        reusing = models.caching_network(module, params)
        output, memory = reusing(cache, None, 0, x, t, labels)
        return output, memory, models.network(module)(params, x, t, labels)

    output, memory, plain = both(x, jnp.full(B, 0.5), jnp.zeros(B, jnp.int32))
    np.testing.assert_allclose(output, plain, rtol=1e-5, atol=1e-5)
    assert memory.runs["deep"].shape == (B, 7, 7, 8)
