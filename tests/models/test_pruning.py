"""Pruned networks: the same function as with the units at zero, and the importance of units."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError
from jaxldm.models import pruning

SIZES = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 16,
    "num_heads": 4,
    "num_classes": 3,
}


def random_params(module, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), models.shapes(module)
    )


def network(kind="tiny-dit", **changes):
    config = {**SIZES, "mlp_ratio": 1.5, "depth": 2, **changes}
    module = models.build(kind, **config)
    return module, random_params(module)


def inputs(batch=2):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, 8, 8, 1)).astype(np.float32)
    return jnp.asarray(x), jnp.full(batch, 0.4), jnp.arange(batch)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, *inputs):
    return module.apply({"params": params}, *inputs)


def random_units(module, seed=2):
    rng = np.random.default_rng(seed)
    return pruning.Units(*(rng.uniform(size=shape) for shape in pruning.unit_counts(module)))


@pytest.mark.parametrize(
    ("kind", "changes", "shares"),
    [
        ("tiny-dit", {}, (0.5, 0.5)),
        ("tiny-dit", {"scan": True}, (0.25, 1.0)),
        ("sit-s-2", {"depth": 3, "route": (1, 2)}, (1.0, 0.3)),
    ],
)
def test_the_masked_network_is_the_sliced_one(kind, changes, shares):
    module, params = network(kind, **changes)
    keep = pruning.mask(random_units(module), *shares)
    zeroed = pruning.masked(module, params, keep)
    smaller, fewer = pruning.sliced(module, params, keep)
    x, t, labels = inputs()
    wanted, whole = (apply(module, each, x, t, labels) for each in (zeroed, params))
    found = apply(smaller, fewer, x, t, labels)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    assert np.abs(found - whole).max() > 0.01 * np.abs(whole).max()
    assert jax.tree.map(np.shape, fewer) == jax.tree.map(lambda leaf: leaf.shape, models.shapes(smaller))
    assert models.count_macs(smaller) < models.count_macs(module)


def test_what_is_masked_gets_no_gradient_and_all_else_the_same():
    module, params = network()
    keep = pruning.mask(random_units(module), 0.5, 0.5)
    x, t, labels = inputs()

    def loss(params):
        return jnp.sum(module.apply({"params": pruning.masked(module, params, keep)}, x, t, labels) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    gone = pruning.Units(*(~stays for stays in keep))
    rest = pruning.masked(module, grads, gone)
    for name in ("attn", "mlp"):
        for block in range(2):
            for leaf in jax.tree.leaves(
                {k: v for k, v in rest[f"blocks_{block}"][name].items() if k not in ("proj", "fc2")}
            ):
                assert not np.any(leaf)
            last = rest[f"blocks_{block}"][name]["proj" if name == "attn" else "fc2"]["kernel"]
            assert not np.any(last)
    smaller, fewer = pruning.sliced(module, params, keep)
    of_smaller = jax.jit(jax.grad(lambda p: jnp.sum(smaller.apply({"params": p}, x, t, labels) ** 2)))(fewer)
    _, taken = pruning.sliced(module, grads, keep)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()),
        taken,
        of_smaller,
    )


def test_importance_is_the_sum_of_products_and_the_same_for_scans():
    single, params = network(depth=2)
    scanned, _ = network(depth=2, scan=True)
    stacked = checkpoints.from_state_dict(checkpoints.to_state_dict(params), models.shapes(scanned))
    x, _, labels = inputs()
    times = np.array([0.1, 0.9], np.float32)

    def loss_of(module):
        return lambda params, t: jnp.mean(module.apply({"params": params}, x, jnp.full(2, t), labels) ** 2)

    found = pruning.importance(single, params, loss_of(single), times)
    other = pruning.importance(scanned, stacked, loss_of(scanned), times)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, other)
    assert found.heads.shape == (2, 4) and found.channels.shape == (2, 24)
    # Head 2 and channel 5 of block 1, by their places in the kernels.
    heads, channels, gradient = 0.0, 0.0, jax.jit(jax.grad(loss_of(single)))
    for t in times:
        grads = gradient(params, t)
        product = jax.tree.map(lambda w, g: np.abs(w * g), params["blocks_1"], grads["blocks_1"])
        qkv, proj = product["attn"]["qkv"], product["attn"]["proj"]["kernel"]
        columns = [part * 16 + 2 * 4 + d for part in range(3) for d in range(4)]
        heads += qkv["kernel"][:, columns].sum() + qkv["bias"][columns].sum() + proj[8:12].sum()
        first, second = product["mlp"]["fc1"], product["mlp"]["fc2"]["kernel"]
        channels += first["kernel"][:, 5].sum() + first["bias"][5] + second[5].sum()
    np.testing.assert_allclose(found.heads[1, 2], heads / 2, rtol=1e-4)
    np.testing.assert_allclose(found.channels[1, 5], channels / 2, rtol=1e-4)


def test_a_unit_without_effect_goes_first():
    module, params = network(depth=1)
    params["blocks_0"]["attn"]["proj"]["kernel"][4:8] = 0.0
    params["blocks_0"]["mlp"]["fc2"]["kernel"][7] = 0.0
    x, _, labels = inputs()

    def loss(params, t):
        return jnp.mean(module.apply({"params": params}, x, jnp.full(2, t), labels) ** 2)

    keep = pruning.mask(pruning.importance(module, params, loss, np.ones(1, np.float32)), 0.75, 23 / 24)
    assert list(np.flatnonzero(~keep.heads[0])) == [1] and list(np.flatnonzero(~keep.channels[0])) == [7]
    smaller, fewer = pruning.sliced(module, params, keep)
    whole = apply(module, params, *inputs())
    np.testing.assert_allclose(apply(smaller, fewer, *inputs()), whole, atol=1e-5)


@pytest.mark.parametrize("hidden", [16, 128, 1152])
def test_the_ratio_of_an_mlp_gives_each_number_of_channels(hidden):
    for channels in range(1, 4 * hidden + 1, max(1, hidden // 64)):
        assert int(hidden * pruning._ratio(channels, hidden)) == channels


def test_pruned_again_and_written(tmp_path):
    module, params = network()
    keep = pruning.mask(random_units(module), 0.5, 0.5)
    smaller, fewer = pruning.sliced(module, params, keep)
    checkpoints.save(tmp_path, smaller, fewer)
    read, again = checkpoints.load(tmp_path)
    assert read.config == smaller.config and smaller.config.head_dim == 4
    jax.tree.map(np.testing.assert_array_equal, again, fewer)
    assert "head_dim" not in module.config.to_dict()
    least, _ = pruning.sliced(read, again, pruning.mask(random_units(read), 0.5, 0.5))
    assert (least.config.num_heads, least.config.mlp_ratio) == (1, 6 / 16)


def test_what_cannot_be_pruned_is_refused():
    module, params = network(depth=1)
    ones = pruning.Units(np.ones((1, 4)), np.ones((1, 24)))
    unet = models.build("mini-unet", block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
    uneven = pruning.Units(np.ones((2, 4), bool), np.arange(48).reshape(2, 24) < 30)
    deep, deep_params = network(depth=2)
    for call, match in (
        (lambda: pruning.mask(ones, heads=0.0), "keeps none of the 4 heads"),
        (lambda: pruning.mask(ones, channels=0.02), "keeps none of the 24 channels of a block: keep 0.042"),
        (lambda: pruning.mask(ones, heads=1.5), "heads must be"),
        (lambda: pruning.mask(ones._replace(heads=np.full((1, 4), np.nan)), 0.5), "not finite"),
        (lambda: pruning.sliced(unet, random_params(unet), ones), "for DiT and SiT.* not for a UNet2DModel"),
        (lambda: pruning.masked(module, params, ones._replace(heads=np.ones((1, 3)))), r"must be \[1, 4\]"),
        (lambda: pruning.masked(module, params, ones), "True where a unit stays, got float.*pruning.mask"),
        (lambda: pruning.mask(pruning.mask(ones)), r"must be numbers \[L, units\].* of bool"),
        (lambda: pruning.mask(pruning.Units(None, None)), "importance of the heads must be numbers"),
        (lambda: pruning.sliced(deep, deep_params, uneven), "the same number of channels"),
        (
            lambda: pruning.sliced(
                module, models.quantize(module, params, models.quantization("int8")), pruning.mask(ones)
            ),
            "pruning needs a network in full precision",
        ),
    ):
        with pytest.raises(InvalidArgumentError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(InvalidArgumentError, match="cannot be split"):
        dataclasses.replace(module.config, num_heads=3)
