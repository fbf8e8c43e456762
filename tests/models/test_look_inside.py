"""The attention maps that `look_inside` returns are those that the network computed with."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TEXT_UNET, random_params

from jaxldm import checkpoints, models
from jaxldm.errors import InvalidArgumentError
from jaxldm.nn import attention
from jaxldm.nn.attention import CrossAttention, SelfAttention, attend

DIT = dict(sample_size=8, patch_size=2, in_channels=3, hidden_size=16, num_heads=2, num_classes=3, depth=2)


def inputs(batch=2, side=8, channels=3):
    random = np.random.default_rng(0)
    x = random.standard_normal([batch, side, side, channels], dtype=np.float32)
    return x, np.linspace(1, 50, batch, dtype=np.float32)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def recomputed(module, params, x, t, condition):
    """The maps of every layer in float64, from what went into it: softmax(q k / sqrt(d)), by its path."""
    maps = {}

    def project(layer, name, rows):
        tree = params
        for part in (*layer.path, name):
            tree = tree[part]
        rows = np.asarray(rows, np.float64) @ np.asarray(tree["kernel"], np.float64)
        return rows + np.asarray(tree.get("bias", 0), np.float64)

    def note(call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, SelfAttention | CrossAttention) and context.method_name == "__call__":
            rows = args[0]
            if isinstance(layer, SelfAttention):
                q, k, _ = np.split(project(layer, "qkv", rows), 3, axis=-1)
            else:
                context_rows = args[1] if len(args) > 1 and args[1] is not None else rows
                q, k = project(layer, "to_q", rows), project(layer, "to_k", context_rows)
            q, k = (y.reshape(*y.shape[:2], layer.num_heads, -1) for y in (q, k))
            logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
            maps[".".join(layer.path)] = softmax(logits)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        models.network(module)(params, x, t, condition)
    return maps


def text_unet():
    module = models.UNet2DConditionModel(models.UNet2DConditionConfig(**TEXT_UNET))
    states = np.random.default_rng(1).standard_normal([2, 5, 8], dtype=np.float32)
    return module, inputs(channels=4), {"encoder_hidden_states": states}


def dit():
    return models.build("tiny-dit", **DIT), inputs(), np.array([0, 2], np.int32)


@pytest.mark.parametrize("make", [dit, text_unet])
def test_maps_are_the_softmax_of_the_queries_and_keys(make):
    module, (x, t), condition = make()
    params = random_params(module)
    inside = models.look_inside(module, params, x, t, condition)
    expected = recomputed(module, params, x, t, condition)
    assert inside.attention.keys() == expected.keys() and len(expected) >= 2
    for name, maps in inside.attention.items():
        assert maps.dtype == jnp.float32
        np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(maps, expected[name], atol=2e-5)
    output = models.network(module)(params, x, t, condition)
    np.testing.assert_allclose(inside.output, output, atol=1e-4 * np.abs(output).max())


class LooksAhead(nn.Module):
    """A hand-built network: patch n of 4 takes all it gets from patch n + 1, the last from the first.

    Its queries are the names of the wanted patches, its keys the patches' own names.
    """

    @nn.compact
    def __call__(self, x, t):
        rows = x.reshape(x.shape[0], 4, 1)
        names = jnp.broadcast_to(100 * jnp.eye(4), (x.shape[0], 4, 4))
        return attend(self, jnp.roll(names, -1, axis=1), names, jnp.broadcast_to(rows, names.shape), 1)[
            ..., :1
        ].reshape(x.shape)


def test_a_network_with_known_attention_has_the_known_map():
    x = np.array([[[[1.0], [2.0]], [[3.0], [4.0]]]], np.float32)
    inside = models.look_inside(LooksAhead(), {}, x, np.zeros(1, np.float32))
    (maps,) = inside.attention.values()
    np.testing.assert_array_equal(maps[0, 0], np.roll(np.eye(4), 1, axis=1))
    np.testing.assert_array_equal(inside.output.reshape(-1), [2, 3, 4, 1])


def test_a_scan_has_the_layers_of_the_blocks_written_out():
    plain, scanned = (models.build("tiny-dit", **DIT, scan=scan) for scan in (False, True))
    params = random_params(plain)
    stacked = checkpoints.from_state_dict(checkpoints.to_state_dict(params), models.shapes(scanned))
    (x, t), label = inputs(), np.array([0, 2], np.int32)
    one, other = (models.look_inside(m, p, x, t, label) for m, p in ((plain, params), (scanned, stacked)))
    assert list(one.attention) == list(other.attention) == ["blocks_0.attn", "blocks_1.attn"]
    assert list(one.outputs) == list(other.outputs)
    assert list(one.outputs) == [
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "blocks_0",
        "blocks_1",
        "final_layer",
    ]
    for name, value in one.outputs.items():
        np.testing.assert_allclose(value, other.outputs[name], atol=1e-4 * np.abs(value).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.attention, other.attention)


def test_only_who_looks_inside_asks_for_weights(monkeypatch):
    module, (x, t), label = dit()
    params, asked, plain = random_params(module), [], attention.dot_product_attention

    def noting(*heads, **options):
        asked.append(options.get("return_weights", False))
        return plain(*heads, **options)

    monkeypatch.setattr(attention, "dot_product_attention", noting)
    jax.eval_shape(models.network(module), params, x, t, label)
    assert asked == [False, False]
    jax.eval_shape(functools.partial(models.look_inside, module), params, x, t, label)
    assert asked[2:] == [True, True]
    outputs_alone = functools.partial(models.look_inside, module, attention=False)
    assert jax.eval_shape(outputs_alone, params, x, t, label).attention == {}


def test_a_condition_that_does_not_fit_is_refused():
    module, (x, t), _ = dit()
    with pytest.raises(InvalidArgumentError, match="condition"):
        models.look_inside(module, random_params(module), x, t, {"text": x})
